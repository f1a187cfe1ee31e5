"""Noise version 1: Gaussian perturbations that are the same bits on every machine.

ε is a pure function of (seed, tensor, flat index), so that an expert is stored as its terms alone and a
published seed means the same weights in every engine, sharding and year. The definition is in reference.py.
Importing this module is cheap: NumPy, Numba, Triton and torch wait until something is perturbed.
"""

import hashlib
import importlib.util
import logging
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeVar

from randopt.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = TypeVar("Array", np.ndarray, torch.Tensor)

__all__ = ["LAWS", "NOISE_VERSION", "Together", "perturb", "perturb_all", "runs_on", "shape_key", "tensor_key"]

log = logging.getLogger(__name__)

NOISE_VERSION = 1

# iid: every tensor of the checkpoint has noise of its own.
# tied: all tensors of one shape share it, the habit of the paper's public code, for comparison.
LAWS = ("iid", "tied")

DTYPES = ("bfloat16", "float16", "float32")


@lru_cache(maxsize=1 << 16)  # names and shapes come again with each candidate
def _hash(text: str) -> int:
    """The first 8 bytes, little-endian, of BLAKE2b(digest_size=8) of the UTF-8 text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def tensor_key(name: str) -> int:
    """t of law "iid": 64 bits of the tensor's name in the checkpoint (safetensors) file."""
    return _hash(name)


def shape_key(shape: Sequence[int]) -> int:
    """t of law "tied": 64 bits of the text shape:4096x1024."""
    return _hash("shape:" + "x".join(str(int(size)) for size in shape))


def perturb(
    base: "Array",
    name: str,
    terms: Sequence[tuple[int, float]],
    *,
    law: str = "iid",
    out: "Array | None" = None,
    start: int = 0,
    shape: Sequence[int] | None = None,
    threads: int | None = None,
) -> "Array":
    """base + Σ coefficient · ε(seed), added in float32 in the order of the terms and rounded once.

    base: a torch tensor (bfloat16, float16, float32) or a NumPy array (float16, float32), of any shape and
        strides.
    name: the tensor's name in the checkpoint.
    terms: (seed, coefficient) pairs, seed in [0, 2**64), coefficient finite. With none at all, out is a
        copy of base.
    law: "iid" or "tied", see LAWS.
    out: where the result goes and what is returned: type, dtype and shape of base, contiguous; base itself
        perturbs in place; by default a new one.
    start, shape: for a slice of a larger tensor, the flat C-order index of its first element there and, with
        law "tied", the shape of the whole. The slice must be one range of flat indices (some rows, say).
    threads: an upper limit; by default as many as Numba and, for a torch tensor, torch may use. The result
        does not depend on it.

    Restore a model by copying its pristine base back, never by a perturbation with the sign turned.
    Infinities and NaN stay, a NaN as the quiet NaN without payload; a sum beyond the dtype becomes infinite.
    An out on a GPU is written there by one fused kernel where runs_on says so, on the current stream; a base that
    lies elsewhere is first copied into it. Otherwise a GPU's tensors are computed on the host and copied. The bits
    are the same, but neither way has been run on a GPU yet.

    Raises UserError for anything else than the above.
    """
    dtype = _checked_dtype(base, name)
    checked = _checked_terms(terms)
    key = _checked_key(name, law, tuple(base.shape), start, shape)
    if out is None:
        result: Any = _new(base, base.device if _is_torch(base) else None)
    else:
        _check_out(base, out, name)
        result = out

    if _is_torch(result) and result.is_cuda and runs_on(result.device):
        _perturb_on_gpu(base, result, key, checked, start)
        return result
    # What the kernel writes: the result itself, or a copy on the host of a result on a GPU.
    target = result if _on_host(result) else _new(base, "cpu")
    source_bits, target_bits = _bits(base), _bits(target)
    if target_bits.size:
        _perturb_bits(source_bits, target_bits, dtype, key, checked, start, _thread_limit(base, threads))
    if target is not result:
        result.detach().copy_(target)
    return result


def perturb_all(
    bases: "Mapping[str, torch.Tensor]",
    terms: Sequence[tuple[int, float]],
    *,
    law: str = "iid",
    out: "Mapping[str, torch.Tensor] | None" = None,
) -> "dict[str, torch.Tensor]":
    """Checkpoint name -> perturb(base, name, terms, law=law, out=out[name]), for many torch tensors: the same bits.

    On the host their kernel is called once: with tensors as small as a layer norm the calls took a quarter of the
    time. No out may overlap the base of another tensor.
    Raises UserError as perturb does, before anything is written, for all tensors on the host.
    """
    together = Together(bases, law=law, out=out)
    together.begin(terms)
    return together.finish()


class Together:
    """perturb_all in steps, for tensors that are perturbed again and again, from the same bases into the same out."""

    def __init__(
        self,
        bases: "Mapping[str, torch.Tensor]",
        *,
        law: str = "iid",
        out: "Mapping[str, torch.Tensor] | None" = None,
    ) -> None:
        """Raises UserError as perturb_all does, but for the terms."""
        from randopt.noise import kernel

        self._bases, self._law = bases, law
        self._out: dict[str, Any] = {}  # of the tensors that the kernel takes together; it knows their addresses alone
        self._others: dict[str, Any] = {}  # the out of the others, if given
        self._terms: list[tuple[int, float]] = []
        self._left = False
        pieces: dict[str, list[kernel.Piece]] = {}
        for name, base in bases.items():
            target = None if out is None else out[name]
            if not _fit_for_pieces(base, target):
                self._others[name] = target
                continue
            dtype = _checked_dtype(base, name)
            key = _checked_key(name, law, tuple(base.shape), 0, None)
            if target is None:
                target = _new(base, "cpu")
            else:
                _check_out(base, target, name)
            pieces.setdefault(dtype, []).append(kernel.Piece(base.data_ptr(), target.data_ptr(), base.numel(), key))
            self._out[name] = target
        self._strips = [kernel.Strips(same, kernel.LAYOUTS[dtype]) for dtype, same in pieces.items()]

    def begin(self, terms: Sequence[tuple[int, float]]) -> None:
        """Do nothing yet, but forget what was done of other terms. Raises UserError for a term out of range."""
        self._terms = _checked_terms(terms)
        self._left = bool(self._others) or not self._terms
        for strips in self._strips:
            if self._terms:
                strips.begin(self._terms)

    @property
    def done(self) -> bool:
        """Whether nothing is left, of which a call that is still running says nothing."""
        return not self._left and all(strips.done for strips in self._strips)

    def run_until(self, stop: "np.ndarray") -> None:
        """Do, in the calling thread alone and without the GIL, what one can until another thread sets stop (1,) int64.

        Only of tensors on the host. Whoever goes on with finish() waits for this call to return.
        """
        for strips in self._strips if self._terms else ():
            strips.run_until(stop)

    def finish(self) -> "dict[str, torch.Tensor]":
        """Do what is left, with every thread that torch may use; what perturb_all returns."""
        alone = self._others if self._terms else self._others | self._out
        made = {
            name: perturb(self._bases[name], name, self._terms, law=self._law, out=out) for name, out in alone.items()
        }
        for strips in self._strips if self._terms else ():
            strips.run(_thread_limit(next(iter(self._out.values())), None))
        self._left = False
        return {name: made[name] if name in made else self._out[name] for name in self._bases}


def _fit_for_pieces(base: Any, target: Any) -> bool:
    """Whether both, if target is given, are contiguous torch tensors on the host, the same memory or disjoint."""
    given = (base,) if target is None else (base, target)
    if not all(_is_torch(array) and array.device.type == "cpu" and array.is_contiguous() for array in given):
        return False
    if target is None or base.data_ptr() == target.data_ptr():
        return True
    return base.untyped_storage().data_ptr() != target.untyped_storage().data_ptr()


def runs_on(device: "torch.device") -> bool:
    """Whether perturb works on that device itself; if not, a tensor there is computed on the host and copied.

    True for the host, and for a GPU of compute capability 8.0 or higher (A100 and newer) if Triton starts.
    """
    if device.type == "cpu":
        return True
    import torch

    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and _triton_starts()


@lru_cache(maxsize=1)
def _triton_starts() -> bool:
    """Whether Triton is installed and finds a GPU; a warning, once, if it is but does not.

    It compiles its link to the driver when it first starts, so that a node without a C compiler is found here.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except (RuntimeError, AssertionError, OSError, ImportError, subprocess.SubprocessError) as error:
        log.warning(
            "Triton cannot start (%s), so weights are perturbed on the host, with the same bits but slower. "
            "It needs a GPU, its driver, a C compiler and Python's header files.",
            error,
        )
        return False
    return True


def _perturb_on_gpu(base: Any, result: Any, key: int, terms: list[tuple[int, float]], start: int) -> None:
    """perturb on checked input: result is contiguous, on a GPU; base has its shape and dtype and lies anywhere."""
    from randopt.noise import triton_kernel

    base, result = base.detach(), result.detach()
    in_place = base.data_ptr() == result.data_ptr() and base.is_contiguous()
    if not in_place and base.untyped_storage().data_ptr() == result.untyped_storage().data_ptr():
        base = base.clone()  # out may lie askew over base: the kernel would read what it has written
    if not terms or base.device != result.device:
        base = result.copy_(base)
    if terms and result.numel():
        triton_kernel.perturb_into(base.contiguous(), result, key, terms, start)


def _perturb_bits(
    source: "np.ndarray",
    target: "np.ndarray",
    dtype: str,
    key: int,
    terms: list[tuple[int, float]],
    start: int,
    threads: int | None,
) -> None:
    """perturb on checked input: source, target (n,) unsigned bit patterns, n > 0."""
    import numpy as np

    if source.ctypes.data != target.ctypes.data and np.may_share_memory(source, target):
        source = source.copy()  # out lies askew over base: the kernel would read what it has written
    if not terms:
        target[:] = source
        return
    from randopt.noise import kernel

    piece = kernel.Piece(source.ctypes.data, target.ctypes.data, source.size, key, start)
    strips = kernel.Strips([piece], kernel.LAYOUTS[dtype])
    strips.begin(terms)
    strips.run(threads)


def _is_torch(array: Any) -> bool:
    """Whether array is a torch tensor, without importing torch: nobody can hold one before it is imported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _on_host(array: Any) -> bool:
    return not _is_torch(array) or array.device.type == "cpu"


def _thread_limit(base: Any, threads: int | None) -> int | None:
    if threads is None and _is_torch(base):
        import torch

        return torch.get_num_threads()
    return threads


def _new(like: Any, device: Any) -> Any:
    """An uninitialised contiguous array of like's type, shape and dtype; device for torch only."""
    if _is_torch(like):
        import torch

        return torch.empty(like.shape, dtype=like.dtype, device=device)
    import numpy as np

    return np.empty(like.shape, dtype=like.dtype)


def _bits(array: Any) -> "np.ndarray":
    """array's bit patterns in C order, (n,) uint16 or uint32; its own memory if contiguous on the host."""
    import numpy as np

    if _is_torch(array):
        import torch

        signed = torch.int32 if array.dtype.itemsize == 4 else torch.int16
        array = array.detach().cpu().contiguous().reshape(-1).view(signed).numpy()
    array = np.require(array, requirements=["C", "ALIGNED"])
    return array.reshape(-1).view(np.uint32 if array.dtype.itemsize == 4 else np.uint16)


def _dtype_name(array: Any) -> str:
    """float32 for both torch.float32 and NumPy's."""
    return str(array.dtype).removeprefix("torch.")


def _checked_dtype(base: Any, name: str) -> str:
    """The name of base's dtype. Raises UserError if base is no array or its dtype is not one of DTYPES."""
    numpy = sys.modules.get("numpy")
    if not _is_torch(base) and not (numpy is not None and isinstance(base, numpy.ndarray)):
        raise UserError(
            f"The tensor {name!r} was given as {type(base).__name__}; expected a torch tensor or a NumPy array."
        )
    dtype = _dtype_name(base)
    if dtype not in DTYPES:
        raise UserError(
            f"The tensor {name!r} has dtype {dtype}; only {', '.join(DTYPES)} can be perturbed. "
            "If the checkpoint is quantised, use the unquantised one it was made from."
        )
    return dtype


def _checked_terms(terms: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The terms as Python numbers. Raises UserError for a seed or a coefficient out of range."""
    checked: list[tuple[int, float]] = []
    for position, term in enumerate(terms, start=1):
        try:
            seed, coefficient = term
        except (TypeError, ValueError):
            raise UserError(
                f"Term {position} of the perturbation is {term!r}; expected a pair (seed, coefficient)."
            ) from None
        if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= seed < 2**64:
            raise UserError(
                f"Term {position} of the perturbation has the seed {seed!r}; "
                "expected an integer from 0 to 2**64 - 1. Mend the seed in the plan or the request."
            )
        if not isinstance(coefficient, Real) or not math.isfinite(coefficient):
            raise UserError(
                f"Term {position} of the perturbation (seed {seed}) has the coefficient {coefficient!r}; "
                "expected a finite number. Mend sigma in the plan or the coefficient in the request."
            )
        checked.append((int(seed), float(coefficient)))
    return checked


def _checked_key(name: str, law: str, part: tuple[int, ...], start: int, whole: Sequence[int] | None) -> int:
    """t for a tensor, or for the part of it that starts at flat index `start`."""
    if law not in LAWS:
        raise UserError(f"The noise law is {law!r}; expected one of {', '.join(LAWS)}. Correct the law in the config.")
    if not isinstance(name, str):
        raise UserError(f"The tensor name is {name!r}; expected its name in the checkpoint, a text.")
    size = math.prod(part)
    limit = 2**64 if whole is None else math.prod(whole)
    if not isinstance(start, Integral) or start < 0 or start + size > limit:
        bound = "2**64" if whole is None else f"{limit}, the size of shape {tuple(whole)}"
        raise UserError(
            f"The slice of {name!r} starts at {start!r} and has {size} elements; "
            f"expected an integer from 0 on, and an end of at most {bound}."
        )
    if law == "iid":
        return tensor_key(name)
    if whole is None and start != 0:
        raise UserError(
            f"A slice of {name!r} (start {start}) was given with the law 'tied', whose noise depends on the "
            "shape of the whole tensor. Pass it as shape=."
        )
    return shape_key(part if whole is None else whole)


def _check_out(base: Any, out: Any, name: str) -> None:
    """Raises UserError unless out can take the perturbed base."""
    if _is_torch(base) != _is_torch(out) or not hasattr(out, "dtype"):
        given = f"{type(out).__module__}.{type(out).__name__}"
        raise UserError(f"out for {name!r} is a {given}; expected the type of base, {type(base).__name__}.")
    if out.dtype != base.dtype or tuple(out.shape) != tuple(base.shape):
        raise UserError(
            f"out for {name!r} is {_dtype_name(out)} {tuple(out.shape)}; "
            f"expected that of base, {_dtype_name(base)} {tuple(base.shape)}."
        )
    if not (out.is_contiguous() if _is_torch(out) else out.flags.carray):
        raise UserError(
            f"out for {name!r} is not contiguous, aligned and writable; expected an array that is. "
            "Leave out away and copy the result, or pass a contiguous buffer."
        )
