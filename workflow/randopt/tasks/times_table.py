"""Generator of products of two small numbers: "What is 7 times 8?"."""

import hashlib
from collections.abc import Mapping
from typing import Any

from randopt.errors import UserError
from randopt.tasks.row import Row


def rows(source: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, list[Row]]:
    """Split -> rows of a × b, both factors from `low` to `high`, the smaller at most `smaller_high`, inclusive.

    a×b and b×a are one problem, asked in two ways: both orders are in the same split. Problems are
    dealt in the order of SHA-256 of "seed:a×b", which is the same on every machine and in every Python.
    Raises UserError when the splits together need more rows than there are.
    """
    pairs = problems(source, sizes)
    pairs.sort(key=lambda pair: _digest(source["seed"], *pair))
    return {split: _deal(pairs, size, source["seed"]) for split, size in sizes.items()}


def problems(source: Mapping[str, Any], sizes: Mapping[str, int]) -> list[tuple[int, int]]:
    """The unordered products; UserError when the splits together need more items than they give.

    Cheap: the configuration is checked with it before anything runs.
    """
    low, high = source["low"], source["high"]
    smaller_high = min(source.get("smaller_high", high), high)
    pairs = [(a, b) for a in range(low, smaller_high + 1) for b in range(a, high + 1)]
    available, needed = sum(1 if a == b else 2 for a, b in pairs), sum(sizes.values())
    if needed > available:
        raise UserError(
            f"times_table: the splits need {needed} items, but numbers from {low} to {high} give only "
            f"{available}; raise source.high (or smaller_high) or lower the sizes in splits."
        )
    return pairs


def _deal(pairs: list[tuple[int, int]], size: int, seed: int) -> list[Row]:
    """Take the next `size` rows off `pairs`, problem by problem.

    When one place is left, a square fills it; without a square, one order of a pair, whose other
    order is then in no split.
    """
    dealt: list[Row] = []
    while len(dealt) < size and pairs:
        one_left = len(dealt) == size - 1
        index = next((i for i, (a, b) in enumerate(pairs) if a == b), 0) if one_left else 0
        a, b = pairs.pop(index)
        orders = [(a, b)] if a == b else [(a, b), (b, a)]
        if _digest(seed, b, a, "order")[0] & 1:
            orders.reverse()
        dealt.extend(_row(*order) for order in orders[: size - len(dealt)])
    if len(dealt) < size:
        raise UserError(
            f"times_table: a split of {size} items finds only {len(dealt)} left, because both orders of a "
            "product stay in one split; make the sizes in splits even, or lower one by 1."
        )
    return dealt


def _row(a: int, b: int) -> Row:
    return Row(
        problem=sorted((a, b)),
        fields={"a": a, "b": b},
        reference=a * b,
        variant=f"{a}x{b}",
        meta={"a": a, "b": b},
    )


def _digest(seed: int, a: int, b: int, purpose: str = "") -> bytes:
    return hashlib.sha256(f"{seed}:{a}×{b}:{purpose}".encode()).digest()
