"""From a task to its items: prompts filled in, splits checked to be disjoint."""

import json
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from randopt.canonical import canonical_json
from randopt.errors import UserError
from randopt.tables import ITEMS
from randopt.tasks import countdown, reasoning_gym_source, tabular, times_table
from randopt.tasks.row import Row
from randopt.tasks.spec import FORMATS, SPLITS, TaskSpec

_GENERATORS = {"times_table": times_table.rows, "countdown": countdown.rows}
_PIECE = re.compile(rf"\{{\{{|\}}\}}|\{{([A-Za-z_]\w*)(?::({'|'.join(FORMATS)}))?\}}")


def make_items(spec: TaskSpec, root: Path | None = None) -> dict[str, pl.DataFrame]:
    """The items of each split (keys select, confirm, test), in the ITEMS schema.

    A pure function of `identity(spec)`. `root`, the project's root, is where a relative
    source.path starts; those that `load_task` found are absolute.
    Raises UserError when the source fails, or when a problem is in two splits or twice in one.
    """
    made = rows(spec, Path(root or ""))
    check_disjoint(spec.name, made)
    return {split: _frame(spec, split, made[split]) for split in SPLITS}


def rows(spec: TaskSpec, root: Path) -> dict[str, list[Row]]:
    """The rows of each split, as the source makes them; UserError when it fails."""
    sizes = {split: spec.splits[split]["size"] for split in SPLITS}
    if "generator" in spec.source:
        return _GENERATORS[spec.source["generator"]](spec.source, sizes)
    if "reasoning_gym" in spec.source:
        return reasoning_gym_source.rows(spec.source, sizes)
    return tabular.rows(spec, root)


def check_disjoint(name: str, made: Mapping[str, list[Row]]) -> None:
    """Raise UserError that names the items when a problem is in two splits or twice in one.

    Within a split the same problem may be asked in several ways (`Row.variant`).
    """
    first: dict[str, tuple[str, int]] = {}
    asked: dict[tuple[str, str], int] = {}
    clashes = []
    for split, rows in made.items():
        for index, row in enumerate(rows):
            key = row.content_hash
            other_split, other = first.setdefault(key, (split, index))
            if other_split == split:
                other = asked.setdefault((key, row.variant), index)
            if (other_split, other) != (split, index):
                clashes.append(f"{item_id(other_split, other)} = {item_id(split, index)}")
    if clashes:
        more = f" and {len(clashes) - 5} more" if len(clashes) > 5 else ""
        raise UserError(
            f"task {name}: the same problem stands twice: {', '.join(clashes[:5])}{more}. What selects must "
            "not be what tests: choose other rows (part, start, size in splits) or remove the copies."
        )


def item_id(split: str, index: int) -> str:
    """select-00007: the split and the position in it."""
    return f"{split}-{index:05d}"


def render(template: str, fields: Mapping[str, Any]) -> str:
    """The template with {column} replaced; {{ and }} are plain braces, and so is any other brace.

    A column that holds a list is JSON, or with {column:letters} and {column:numbers} a line for each of its elements.
    Not str.format: it would evaluate {a.__class__}, and choke on LaTeX.
    """

    def piece(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        value = fields[match[1]]
        if match[2]:
            return _lines(value, match[2])
        return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else str(value)

    return _PIECE.sub(piece, template)


def _lines(values: Any, form: str) -> str:
    """A line for each element of a list: "A. ..." (at most 26) or "1. ..."; UserError for anything else."""
    marks = string.ascii_uppercase if form == "letters" else range(1, 10**6)
    if not isinstance(values, list) or len(values) > len(marks):
        raise UserError(
            f"prompt: {str(values)[:80]!r} stands in a column that is shown as {form}, expected a list of at most "
            f"{len(marks)} elements; choose another column, or name it without `:{form}`."
        )
    return "\n".join(f"{mark}. {value}" for mark, value in zip(marks, values, strict=False))


def messages(spec: TaskSpec, row: Row) -> list[dict[str, str]]:
    """The task's prompt for one row."""
    return [{"role": m["role"], "content": render(m["content"], row.fields)} for m in spec.prompt]


def _frame(spec: TaskSpec, split: str, rows: list[Row]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "item_id": [item_id(split, index) for index in range(len(rows))],
            "messages": [messages(spec, row) for row in rows],
            "reference": [canonical_json(row.reference) for row in rows],
            "content_hash": [row.content_hash for row in rows],
            "meta": [canonical_json(row.meta) for row in rows],
        },
        schema=ITEMS.schema,
    )
