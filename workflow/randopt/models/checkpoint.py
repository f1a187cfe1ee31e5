"""Safetensors checkpoints: headers checked before any weight is read, tensors without copies."""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from randopt.errors import UserError

if TYPE_CHECKING:
    import torch

FLOATING = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
HARMLESS = {"I64", "BOOL"}  # position ids and masks that some checkpoints carry; never perturbed


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, as its file's header describes it."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]


def tensor_table(folder: Path) -> list[TensorInfo]:
    """Every tensor of the folder's safetensors files, sorted by name.

    Raises UserError for a damaged file, a tensor that stands in two files, or a quantised checkpoint.
    """
    table: dict[str, TensorInfo] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        for name, entry in _header(path).items():
            if name in table:
                raise UserError(f"tensor {name} stands in both {table[name].file} and {path.name} of {folder}.")
            table[name] = TensorInfo(name, path.name, entry["dtype"], tuple(entry["shape"]))
    missing = missing_files(folder)
    if missing or not table:
        raise UserError(
            f"{folder} lacks {', '.join(missing) or 'tensors in its *.safetensors files'}; "
            "fetch or copy the checkpoint again."
        )
    quantised = [info for info in table.values() if info.dtype not in FLOATING and info.dtype not in HARMLESS]
    if quantised:
        first = quantised[0]
        raise UserError(
            f"{folder} is a quantised checkpoint: {len(quantised)} tensor(s) such as {first.name} are stored as "
            f"{first.dtype}. Gaussian noise needs bfloat16, float16 or float32 weights; use the unquantised model."
        )
    return [table[name] for name in sorted(table)]


def missing_files(folder: Path) -> list[str]:
    """Weight files that the checkpoint's index names and the folder lacks: a download that was cut short."""
    index = Path(folder) / "model.safetensors.index.json"
    if not index.is_file():
        return [] if any(Path(folder).glob("*.safetensors")) else ["*.safetensors"]
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} cannot be read ({error!r}); fetch or copy the checkpoint again.") from error
    return sorted(name for name in named if not (Path(folder) / name).is_file())


def refuse_quantised(folder: Path) -> None:
    """Raise UserError when config.json declares a quantisation or is no JSON object."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        method = config.get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as a JSON object: {error}.") from error
    if method:
        name = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise UserError(
            f"{folder} is a quantised checkpoint (quantization_config in config.json: {name}). "
            "Gaussian noise needs bfloat16, float16 or float32 weights; use the unquantised model."
        )


def tensors(folder: Path, table: Iterable[TensorInfo]) -> Iterator[tuple[str, "torch.Tensor"]]:
    """(name, tensor) in the table's order, memory-mapped: nothing is copied until it is used."""
    from safetensors import safe_open

    handles: dict[str, Any] = {}
    for info in table:
        if info.file not in handles:
            handles[info.file] = safe_open(Path(folder) / info.file, framework="pt", device="cpu")
        yield info.name, handles[info.file].get_tensor(info.name)


def weights_digest(named: Iterable[tuple[str, "torch.Tensor"]]) -> str:
    """BLAKE2b (32 hex digits) over name, dtype, shape and bytes of every tensor, in name order.

    Tensors are hashed side by side (hashlib releases the interpreter lock); a tensor on an
    accelerator is copied to the host.
    """
    ordered = sorted(named, key=lambda pair: pair[0])
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda pair: tensor_digest(pair[1]), ordered)
    return combined_digest(zip((name for name, _ in ordered), digests, strict=True))


def combined_digest(digests: Iterable[tuple[str, bytes]]) -> str:
    """weights_digest from each tensor's name and digest, given in name order."""
    total = hashlib.blake2b(digest_size=16)
    for name, digest in digests:
        total.update(name.encode() + b"\0" + digest)
    return total.hexdigest()


def tensor_digest(tensor: "torch.Tensor") -> bytes:
    """BLAKE2b (32 bytes) over dtype, shape and bytes of a tensor."""
    import torch

    host = tensor.detach().to("cpu").contiguous()
    digest = hashlib.blake2b(f"{host.dtype}{tuple(host.shape)}".encode(), digest_size=32)
    digest.update(host.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, after its offsets were checked against the file's size."""
    damaged = f"{path} is not a whole safetensors file"
    remedy = "Fetch or copy it again; its size is {} bytes."
    size = path.stat().st_size
    with open(path, "rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= size - 8:
            raise UserError(f"{damaged}: its header length is impossible. {remedy.format(size)}")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if size != 8 + length + end:
                raise UserError(f"{damaged}: its header promises {8 + length + end} bytes. {remedy.format(size)}")
            for name, entry in header.items():
                count = 1
                for side in entry["shape"]:
                    count *= side
                start, stop = entry["data_offsets"]
                if entry["dtype"] in BYTES and stop - start != count * BYTES[entry["dtype"]]:
                    raise UserError(f"{damaged}: tensor {name} has another size than its shape says.")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{damaged}: its header is unreadable ({error}). {remedy.format(size)}") from error
    return header
