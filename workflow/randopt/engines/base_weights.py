"""The pristine base as engines hold it: checkpoint tensors in the run's dtype, and which of them are perturbed."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path

import torch

from randopt.errors import UserError
from randopt.models import checkpoint
from randopt.models.vision import TOWER


def base_tensors(folder: Path, table: Sequence[checkpoint.TensorInfo], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Checkpoint name -> tensor on the host, floating ones in `dtype`; memory-mapped where the file has that dtype."""
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in checkpoint.tensors(folder, table)
    }


def perturbed_names(table: Sequence[checkpoint.TensorInfo], exclude: Sequence[str]) -> list[str]:
    """Names of the floating-point tensors that no pattern excludes, in order.

    Raises UserError if there is none, or if the default for vision-language models finds no vision tower.
    """
    names = [
        info.name
        for info in table
        if info.dtype in checkpoint.FLOATING and not any(fnmatch.fnmatchcase(info.name, p) for p in exclude)
    ]
    if set(exclude) == set(TOWER) and len(names) == sum(info.dtype in checkpoint.FLOATING for info in table):
        raise UserError(
            f"models.exclude: its default for tasks with pictures, {list(exclude)}, matches no tensor of the model; "
            "give patterns for its vision tower, or [] to perturb everything."
        )
    if not names:
        raise UserError(f"models.exclude: {list(exclude)} excludes every tensor of the model.")
    return names
