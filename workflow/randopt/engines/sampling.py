"""Choosing the next token: greedy, or sampled from a seed that belongs to (sample, item, step).

Sampling draws one uniform number per token by hashing, so a text depends on its own seed and item
alone: not on the batch it ran in, the device's generator, or what was generated before it.
"""

import hashlib
from collections.abc import Sequence

import torch

from randopt.requests import Decoding


def next_tokens(logits: torch.Tensor, decoding: Decoding, item_ids: Sequence[str], step: int) -> torch.Tensor:
    """Token ids [B] from logits [B, V] (one row per item id) for generation step `step`."""
    if decoding.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.float() / decoding.temperature, dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    draws = [uniform(decoding.sample_seed, item_id, step) for item_id in item_ids]
    # scaled by the last entry, which differs from 1 by rounding: a draw never falls off the end
    target = torch.tensor(draws, dtype=torch.float32, device=logits.device) * cumulative[:, -1]
    picked = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    return picked.clamp_(max=logits.shape[-1] - 1)


def uniform(sample_seed: int, item_id: str, step: int) -> float:
    """A number in [0, 1) from 53 bits of BLAKE2b over (sample seed, item id, step)."""
    return (_word(f"{sample_seed}\0{item_id}\0{step}") >> 11) * 2.0**-53


def stream_seed(sample_seed: int, item_id: str) -> int:
    """Seed in [0, 2**63) of an item's own generator, for an engine that draws by itself."""
    return _word(f"{sample_seed}\0{item_id}") >> 1


def _word(text: str) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
