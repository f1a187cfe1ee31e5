"""What tests of the noise share: tensors, their bit patterns, and what the reference gives."""

import numpy as np
import torch

from randopt import noise
from randopt.noise import reference

NAME = "model.layers.0.self_attn.q_proj.weight"
KEY = noise.tensor_key(NAME)
TERM = [(42, 1e-3)]
DTYPES = ("bfloat16", "float16", "float32")


def tensor(bits: np.ndarray, dtype: str) -> torch.Tensor:
    """A torch tensor of that dtype with its own copy of the bit patterns (uint16 or uint32)."""
    signed = np.int32 if dtype == "float32" else np.int16
    return torch.from_numpy(bits.view(signed).copy()).view(getattr(torch, dtype))


def bits(values: torch.Tensor) -> np.ndarray:
    """The bit patterns of a torch tensor, same shape."""
    if values.dtype == torch.float32:
        return values.contiguous().view(torch.int32).numpy().view(np.uint32)
    return values.contiguous().view(torch.int16).numpy().view(np.uint16)


def expected(base: torch.Tensor, terms, start: int = 0, key: int = KEY) -> np.ndarray:
    """The bit patterns that the reference gives."""
    array = bits(base) if base.dtype == torch.bfloat16 else base.contiguous().numpy()
    result = reference.perturb(array, key, terms, start)
    return result.view(np.uint32 if base.dtype == torch.float32 else np.uint16)


def random_base(size: int, dtype: str, seed: int = 0) -> torch.Tensor:
    values = np.random.default_rng(seed).standard_normal(size, dtype=np.float32) * np.float32(0.02)
    return torch.from_numpy(values).to(getattr(torch, dtype))
