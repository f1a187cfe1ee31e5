"""Generator of countdown problems: reach the target from three or four numbers with + - * /."""

import hashlib
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from randopt.errors import UserError
from randopt.tasks.row import Row

_TRIES = 200  # per item, before the parameters are said to leave too few problems


class _Dice:
    """Whole numbers from SHA-256 of "seed:split:item:draw": the same on every machine and in every Python."""

    def __init__(self, key: str) -> None:
        self.key, self.draws = key, 0

    def below(self, limit: int) -> int:
        """From 0 to limit - 1; the bias of the remainder of 64 bits is below 1e-16 here."""
        self.draws += 1
        digest = hashlib.sha256(f"{self.key}:{self.draws}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % limit


def rows(source: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, list[Row]]:
    """Split -> rows {numbers, target}; the target, a text as in the public data, can be reached.

    Each split has its own stream, so the size of one changes no item of another (but for a problem
    that both would draw, which stays with the earlier split). The same numbers in another order are the same
    problem. Raises UserError when the parameters leave too few problems.
    """
    seen: set[tuple] = set()
    made: dict[str, list[Row]] = {}
    for split, size in sizes.items():
        made[split] = []
        for attempt in range(_TRIES * size):
            if len(made[split]) == size:
                break
            row = _draw(source, _Dice(f"{source['seed']}:{split}:{attempt}"))
            if row is None:
                continue
            key = (*row.problem["numbers"], row.problem["target"])
            if key not in seen:
                seen.add(key)
                made[split].append(row)
        if len(made[split]) < size:
            raise UserError(
                f"countdown: the split {split} needs {size} items, but only {len(made[split])} were found in "
                f"{_TRIES * size} tries; widen the source's low..high or target_low..target_high."
            )
    return made


def _draw(source: Mapping[str, Any], dice: _Dice) -> Row | None:
    """A problem, made backwards from an expression; None when its value is no allowed target."""
    count = source["counts"][dice.below(len(source["counts"]))]
    numbers = [source["low"] + dice.below(source["high"] - source["low"] + 1) for _ in range(count)]
    terms = [(Fraction(number), str(number)) for number in numbers]
    while len(terms) > 1:
        left, left_text = terms.pop(dice.below(len(terms)))
        right, right_text = terms.pop(dice.below(len(terms)))
        sign = "+-*/"[dice.below(4)]
        if sign == "/" and not right:
            return None
        value = {"+": left + right, "-": left - right, "*": left * right, "/": left / (right or 1)}[sign]
        terms.append((value, f"({left_text} {sign} {right_text})"))
    target, solution = terms[0]
    if target.denominator != 1 or not source["target_low"] <= target <= source["target_high"]:
        return None
    return Row(
        problem={"numbers": sorted(numbers), "target": str(target)},
        fields={"numbers": numbers, "target": str(target)},
        reference={"numbers": numbers, "target": str(target)},
        meta={"solution": solution[1:-1]},
    )
