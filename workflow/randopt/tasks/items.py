"""From a task to its items: prompts filled in, splits checked to be disjoint."""

import itertools
import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from randopt.canonical import canonical_json
from randopt.errors import Mistake, Mistakes, UserError
from randopt.images import Image
from randopt.tables import IMAGE_ITEMS, ITEMS
from randopt.tasks import countdown, reasoning_gym_source, scorers, tabular, times_table
from randopt.tasks.row import Row
from randopt.tasks.spec import FORMATS, SPLITS, TaskSpec, image_columns, parts

_GENERATORS = {"times_table": times_table.rows, "countdown": countdown.rows}
_PIECE = re.compile(rf"\{{\{{|\}}\}}|\{{([A-Za-z_]\w*)(?::({'|'.join(FORMATS)}))?\}}")


def make_items(
    spec: TaskSpec, root: Path | None = None, images: dict[str, Image] | None = None
) -> dict[str, pl.DataFrame]:
    """The items of each split (keys select, confirm, test), in the schema of ITEMS or IMAGE_ITEMS.

    `images`, if given, receives the pictures that the items name, by name. A pure function of `identity(spec)`.
    `root`, the project's root, is where a relative source.path starts; those that `load_task` found are absolute.
    Raises UserError when the source fails, when a problem is in two splits or twice in one, or for a reference that
    the task's scorer cannot use: before a model answers, not after.
    """
    made = rows(spec, Path(root or ""))
    check_disjoint(spec.name, made)
    for mistake in reference_mistakes(scorers.get(spec.scorer), made):
        raise Mistakes(f"task {spec.name}", [mistake])
    if images is not None:
        found = [field for split in made.values() for row in split for field in row.fields.values()]
        images |= {field.name: field for field in found if isinstance(field, Image)}
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


def reference_mistakes(scorer: scorers.Scorer, made: Mapping[str, list[Row]]) -> Iterator[Mistake]:
    """References that the scorer cannot use, each tried with an empty answer; rows without fields are none."""
    for split, found in made.items():
        for index, row in enumerate(found):
            if row.fields:
                try:
                    scorer.score("", row.reference)
                except UserError as error:
                    yield Mistake(f"{item_id(split, index)}: {error}", ("scorer",))


def item_id(split: str, index: int) -> str:
    """select-00007: the split and the position in it."""
    return f"{split}-{index:05d}"


def render(template: str, fields: Mapping[str, Any]) -> str:
    """The template with {column} replaced; {{ and }} are plain braces, and so is any other brace.

    A column that holds a list is JSON, or with one of FORMATS, as in {column:lines}, a line for each of its elements.
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
    """A line for each element of a list, after "A. " (at most 26), "1. " or nothing; UserError for anything else."""
    most = len(string.ascii_uppercase) if form == "letters" else None
    if not isinstance(values, list) or (most and len(values) > most):
        raise UserError(
            f"prompt: {str(values)[:80]!r} stands in a column that is shown as {form}, expected a list"
            f"{f' of at most {most} elements' if most else ''}; choose another column, or name it without `:{form}`."
        )
    marks: Mapping[str, Iterable[str]] = {
        "lines": itertools.repeat(""),
        "letters": (f"{letter}. " for letter in string.ascii_uppercase),
        "numbers": (f"{number}. " for number in itertools.count(1)),
    }
    return "\n".join(f"{mark}{value}" for mark, value in zip(marks[form], values, strict=False))


def messages(spec: TaskSpec, row: Row) -> list[dict[str, Any]]:
    """The task's prompt for one row: contents are texts, where it shows pictures lists of {type, value}."""
    shown = image_columns(spec.prompt)

    def content(message: Mapping[str, Any]) -> Any:
        filled = [_part(part, row.fields) for part in parts(message)]
        return filled if shown else "".join(part["value"] for part in filled)

    return [{"role": message["role"], "content": content(message)} for message in spec.prompt]


def _part(part: Mapping[str, str], fields: Mapping[str, Any]) -> dict[str, str]:
    image = part["type"] == "image"
    return {"type": part["type"], "value": fields[part["column"]].name if image else render(part["text"], fields)}


def _frame(spec: TaskSpec, split: str, rows: list[Row]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "item_id": [item_id(split, index) for index in range(len(rows))],
            "messages": [messages(spec, row) for row in rows],
            "reference": [canonical_json(row.reference) for row in rows],
            "content_hash": [row.content_hash for row in rows],
            "meta": [canonical_json(row.meta) for row in rows],
        },
        schema=(IMAGE_ITEMS if image_columns(spec.prompt) else ITEMS).schema,
    )
