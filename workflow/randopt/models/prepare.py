"""prepare_model: fetch or convert once, check, and write the manifest every later job relies on."""

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from randopt.errors import UserError
from randopt.files import write_text_atomic
from randopt.models import checkpoint
from randopt.models.source import Source
from randopt.models.vision import is_vision_language

log = logging.getLogger(__name__)

# What generation needs from a Hub snapshot; pickled weights are never fetched.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class Manifest:
    """What is recorded of a prepared model: where it lies and what it must still be."""

    path: Path
    content: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Folder of the checkpoint; a converted one lies beside the manifest."""
        return (self.path.parent / self.content["folder"]).resolve()

    @property
    def tensors(self) -> list[checkpoint.TensorInfo]:
        """The tensor table."""
        return [
            checkpoint.TensorInfo(t["name"], t["file"], t["dtype"], tuple(t["shape"])) for t in self.content["tensors"]
        ]


def prepare(source: Source, dtype: str, root: Path, out: Path) -> None:
    """Make `out` (manifest.json) for `source` in `dtype`, with the checkpoint beside it if converted.

    Raises UserError when the model cannot be fetched, is quantised, damaged or has no tokenizer.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if source.kind == "package":
        folder = _convert_gguf(source, dtype, out.parent / "checkpoint")
        recorded = "checkpoint"
    else:
        folder = hub_snapshot(source) if source.kind == "hf" else (root / source.location).resolve()
        recorded = str(folder)
    checkpoint.refuse_quantised(folder)
    table = checkpoint.tensor_table(folder)
    content = {
        **source.identity(),
        "folder": recorded,
        "dtype": dtype,
        "parameters": sum(_count(info.shape) for info in table if info.dtype in checkpoint.FLOATING),
        "files": _file_records(folder),
        "tensors": [{"name": t.name, "file": t.file, "dtype": t.dtype, "shape": list(t.shape)} for t in table],
        "weights_digest": checkpoint.weights_digest(_cast(checkpoint.tensors(folder, table), dtype)),
        "chat_template": _chat_template(folder),
    }
    write_text_atomic(out, json.dumps(content, indent=1, sort_keys=True) + "\n")


def load_manifest(path: Path) -> Manifest:
    """The manifest, its files checked."""
    manifest = read_manifest(path)
    check_files(manifest)
    return manifest


def read_manifest(path: Path) -> Manifest:
    """The manifest, without a look at the files it records."""
    path = Path(path)
    try:
        return Manifest(path, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it and run again.") from error


def check_files(manifest: Manifest) -> None:
    """Compare size and time of the recorded files.

    A file that was touched is hashed again: equal content passes, other content is a UserError,
    since seeds found on other weights mean nothing.
    """
    folder = manifest.folder
    if not os.path.isdir(folder):  # not Path.is_dir, which raises where a parent must not be entered
        raise UserError(
            f"{folder}, the model's folder according to {manifest.path}, cannot be seen on {socket.gethostname()}. "
            f"{_remedy(manifest)} If it was only unavailable, run the same command again."
        )
    for name, record in manifest.content["files"].items():
        file = folder / name
        if not os.path.isfile(file):
            raise UserError(
                f"{file} is gone since the model was prepared, or cannot be seen on {socket.gethostname()}; "
                f"restore it, or remove {manifest.path} and run again."
            )
        status = file.stat()
        unchanged = status.st_size == record["size"] and status.st_mtime_ns == record["mtime_ns"]
        if not unchanged and (status.st_size != record["size"] or sha256(file) != record["sha256"]):
            raise UserError(
                f"{file} changed since the model was prepared; candidates scored on other weights mean nothing. "
                "Restore the file, or give the changed model another folder and name."
            )


def _remedy(manifest: Manifest) -> str:
    """What to do about a folder that this machine does not see."""
    again = f"remove {manifest.path} and run again on a machine with internet"
    kind = manifest.content["source"].partition(":")[0]
    if kind == "hf":
        return f"It is in the Hub's cache: set HF_HOME to a folder that every node sees, {again}."
    if kind == "path":
        return "Move the model to a folder that every node sees, and name that one in models.source."
    return f"To make it again, remove {manifest.path} and run again."


def hub_snapshot(source: Source) -> Path:
    """The folder of a Hub model in the Hub's cache, fetched unless it is whole there; UserError otherwise."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    fetch = partial(snapshot_download, source.location, revision=source.revision, allow_patterns=HUB_PATTERNS)
    try:  # a complete copy in the cache needs no network
        cached = Path(fetch(local_files_only=True)).absolute()  # HF_HOME may be relative
        if not checkpoint.missing_files(cached):
            return cached
    except LocalEntryNotFoundError:
        pass
    log.info("fetching %s at %s from the Hub", source.location, source.revision)
    try:
        return Path(fetch()).absolute()
    except Exception as error:
        raise UserError(
            f"cannot fetch {source.location} at {source.revision} from the Hub: {str(error).splitlines()[0]} "
            "Check the name and the commit; on a machine without internet fetch it elsewhere and copy the Hub "
            "cache (HF_HOME), or use path:DIR."
        ) from error


def _convert_gguf(source: Source, dtype: str, target: Path) -> Path:
    """Dequantise the GGUF file inside an installed package and store it once as safetensors."""
    import torch
    import transformers

    name = source.location.replace("-", "_")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {source.location} has no importable folder {name}.")
    found = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    if len(found) != 1:
        raise UserError(f"the package {source.location} ships {len(found)} GGUF files, expected exactly one.")
    log.info("converting %s to safetensors", found[0].name)
    arguments = {"gguf_file": found[0].name, "local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        found[0].parent,
        dtype=getattr(torch, dtype),
        quantization_config=transformers.GgufConfig(dequantize=True),
        **arguments,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(found[0].parent, **arguments)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    return target


def _cast(named: Any, dtype: str) -> Any:
    """Floating tensors in the run's dtype, as the engine holds them."""
    import torch

    wanted = getattr(torch, dtype)
    return [(name, t.to(wanted) if t.is_floating_point() else t) for name, t in named]


def _chat_template(folder: Path) -> str | None:
    """The chat template of tokenizer or processor, or None; a model whose own cannot be used is refused."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise UserError(f"{folder} has no tokenizer that Transformers can read: {error}") from error
    if is_vision_language(folder):
        from randopt.engines.vision import load_processor

        return load_processor(folder).chat_template
    return tokenizer.chat_template


def _file_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Size, time and SHA-256 of each file that generation reads."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(sha256, files))
    return {
        path.name: {"size": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns, "sha256": sha}
        for path, sha in zip(files, hashes, strict=True)
    }


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total
