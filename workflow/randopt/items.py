"""Reading the items of a run, and the hash that ties completions to them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import polars as pl

from randopt import images, layout, tables
from randopt.canonical import short_hash
from randopt.engines import Item


def read_items(task_id: str, splits: Iterable[str]) -> pl.DataFrame:
    """The items of the splits, in order."""
    folder = layout.task_folder(task_id)
    paths = [folder / f"{split}.parquet" for split in splits]
    known = {table.name: table for table in (tables.ITEMS, tables.IMAGE_ITEMS)}
    return tables.read_all(paths, known.get(str(tables.footer(paths[0]).get("table")), tables.ITEMS))


def items_hash(items: pl.DataFrame) -> str:
    """Hash of ids and prompts, in which pictures are named by their content.

    Completions of other items are never taken for these.
    """
    return short_hash(items.select("item_id", "messages").to_dicts(), 16)


def references(items: pl.DataFrame) -> dict[str, object]:
    """item_id -> what the scorer compares with."""
    return {item_id: json.loads(text) for item_id, text in items.select("item_id", "reference").iter_rows()}


def write_items(splits: Mapping[str, pl.DataFrame], folder: Path, pictures: Mapping[str, images.Image]) -> None:
    """The three items tables of a task, after the pictures that they name."""
    images.write(pictures, layout.images_folder(folder))
    for split, frame in splits.items():
        table = tables.ITEMS if frame.schema == tables.ITEMS.schema else tables.IMAGE_ITEMS
        tables.write(frame, table, Path(folder) / f"{split}.parquet")


def to_items(table: pl.DataFrame, folder: Path) -> list[Item]:
    """The rows of an items table as engines take them, with the pictures from the task's `folder`.

    Raises UserError when a picture is missing or damaged.
    """
    found: dict[str, images.Image] = {}

    def part(kind: str, value: str) -> str | images.Image:
        if kind == "text":
            return value
        if value not in found:
            found[value] = images.load(layout.images_folder(folder), value)
        return found[value]

    def content(given: str | list[dict[str, str]]) -> str | tuple[str | images.Image, ...]:
        return given if isinstance(given, str) else tuple(part(p["type"], p["value"]) for p in given)

    return [
        Item(item_id, tuple((message["role"], content(message["content"])) for message in messages))
        for item_id, messages in table.select("item_id", "messages").iter_rows()
    ]
