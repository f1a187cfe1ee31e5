"""Reading the items of a run, and the hash that ties completions to them."""

import json
from collections.abc import Iterable
from pathlib import Path

import polars as pl

from randopt import layout, tables
from randopt.canonical import short_hash


def read_items(task_id: str, splits: Iterable[str]) -> pl.DataFrame:
    """The items of the splits, in order."""
    folder = layout.RESULTS / "tasks" / task_id
    return tables.read_all([folder / f"{split}.parquet" for split in splits], tables.ITEMS)


def items_hash(items: pl.DataFrame) -> str:
    """Hash of ids and prompts: completions of other items are never taken for these."""
    return short_hash(items.select("item_id", "messages").to_dicts(), 16)


def references(items: pl.DataFrame) -> dict[str, object]:
    """item_id -> what the scorer compares with."""
    return {item_id: json.loads(text) for item_id, text in items.select("item_id", "reference").iter_rows()}


def write_items(splits: dict[str, pl.DataFrame], folder: Path) -> None:
    """The three items tables of a task."""
    for split, frame in splits.items():
        tables.write(frame, tables.ITEMS, Path(folder) / f"{split}.parquet")
