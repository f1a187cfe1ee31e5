"""Engines: the only code that turns weights and prompts into text.

An engine is named in the configuration and loaded by `load`; nothing is imported before that.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from randopt.models.prepare import Manifest
from randopt.requests import Decoding, Perturbation


@dataclass(frozen=True)
class Item:
    """One problem as the engine sees it: an id and chat messages ({role, content})."""

    item_id: str
    messages: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Completion:
    """What the engine returned for one item. `finish_reason` is stop or length (pruned where it was not asked)."""

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


class Engine(Protocol):
    """Holds one model on one device."""

    device: str

    def set_weights(self, perturbation: Perturbation) -> None:
        """Make the weights base + Σ coefficient·ε(seed), always from the pristine base."""

    def generate(self, items: Sequence[Item], decoding: Decoding) -> Generator[Completion, None, None]:
        """Completions as they finish, in no particular order; closing the iterator drops the rest."""

    def weights_digest(self) -> str:
        """Digest of the weights in use (randopt.models.checkpoint.weights_digest)."""


def load(name: str, manifest: Manifest, settings: EngineSettings) -> Engine:
    """The engine `name` with the manifest's model, its base weights in place."""
    if name == "transformers":
        from randopt.engines.transformers_engine import TransformersEngine

        return TransformersEngine(manifest, settings)
    raise ValueError(f"unknown engine {name}")
