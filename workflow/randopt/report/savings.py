"""What a race saved, in sentences: items exactly, tokens and seconds as estimates from its pilot."""

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from randopt import layout, tables
from randopt.cost import duration
from randopt.experiment import Experiment, Run
from randopt.items import read_items
from randopt.race import PRUNED, read_pilot


def notes(experiment: Experiment) -> list[str]:
    """A sentence for each raced run, at its largest N."""
    return [_note(run) for run in experiment.runs if "race" in run.description]


def _note(run: Run) -> str:
    race, n = run.description["race"], run.candidates
    candidates = tables.read(layout.candidates_file(run.folder, n), tables.CANDIDATES, run_id=run.run_id)
    shards = [shard for shard in run.shards("search") if layout.race_round(run.description, "search", shard)]
    items = run.task.splits["select"]["size"]
    answered, whole = int(candidates["items"].sum()), n * items
    percent = 100 * answered / whole
    pruned = candidates.filter(pl.col("status") == PRUNED).height
    until = f"δ = {race['delta']:g}, " if race["mode"] == "confident" else ""
    pieces = [
        f"Race of {run.name} ({race['mode']}, {until}pilot {race['pilot']:,}, keep {race['keep']:,}): {pruned:,} of "
        f"{n:,} candidates pruned; the search answered {answered:,} of {whole:,} items ({percent:.0f} %)."
    ]
    if shards:
        tokens = int(candidates["tokens"].sum())
        spared = _tokens(run, shards)
        seconds, expected = _seconds(run, shards)
        pieces.append(
            f"It generated {tokens:,} tokens and spared about {spared:,.0f}, estimated by the pilot's mean tokens of "
            "the items left out; tokens of answers that were stopped half-way are in neither number. Generating took "
            f"{duration(seconds)} after the pilot, at the pilot's pace {duration(expected)} (an estimate)."
        )
    return " ".join(pieces)


def _tokens(run: Run, shards: Sequence[layout.Shard]) -> float:
    """Σ over items of (times left out) · (the pilot's mean tokens)."""
    item_ids = read_items(run.task_id, layout.stage_splits("search"))["item_id"].to_list()
    pilot = read_pilot(layout.race_file(run.folder), run.description, item_ids)
    files = [layout.shard_file(run.folder, "search", "completions", shard) for shard in shards]
    left_out = pl.scan_parquet(files, glob=False).filter(pl.col("finish_reason") == PRUNED)
    counts = dict(left_out.group_by("item_id").len().collect().iter_rows())
    return float(np.dot([counts.get(item_id, 0) for item_id in item_ids], pilot.tokens))


def _seconds(run: Run, shards: Sequence[layout.Shard]) -> tuple[float, float]:
    """Seconds of generation in the raced shards, and what they would be at the pilot's mean for each candidate."""
    pilot = [shard for shard in run.shards("search") if shard not in shards]
    spent, before = sum(_generating(run, shards)), sum(_generating(run, pilot))
    rows, pilot_rows = (sum(stop - start for start, stop in some) for some in (shards, pilot))
    return spent, before / pilot_rows * rows


def _generating(run: Run, shards: Sequence[layout.Shard]) -> Iterator[float]:
    for shard in shards:
        ledger = layout.shard_file(run.folder, "search", "ledger", shard)
        yield tables.read(ledger, tables.LEDGER, run_id=run.run_id)["seconds_generating"].item()
