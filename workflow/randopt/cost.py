"""What an experiment will take before it is submitted: jobs, GPU-hours, finishing time."""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from randopt import layout, speed, tables
from randopt.errors import UserError
from randopt.experiment import Experiment, Run, load_run
from randopt.race import pruned_items
from randopt.speed import Speed

GPUS = (1, 4, 16, 64)  # finishing times are given for so many GPUs
_rows_seen: dict[Path, Mapping[str, Any]] = {}  # a live status looks again and again; a ledger is written once
SAMPLE = 200  # ledgers read at most; more would not make the mean better


@dataclass(frozen=True)
class StageCost:
    """What is left of one stage of a run; `seconds` are those of each of its jobs."""

    run: Run
    stage: str
    shards: int
    completions: int
    seconds: tuple[float, ...]


def stage_costs(run: Run, known: Speed) -> list[StageCost]:
    """Every stage of a run, in the order data flows. Shards whose completions are there cost nothing any more.

    An upper bound: requests that another stage has answered, parts of a begun shard, and what a race will leave out
    are counted as work.
    """
    found = []
    for stage in run.stages():
        shards = run.shards(stage)
        left = [s for s in shards if not layout.shard_file(run.folder, stage, "completions", s).exists()]
        items = sum(run.task.splits[split]["size"] for split in layout.stage_splits(stage))
        each = [(stop - start) * items for start, stop in left]
        found.append(StageCost(run, stage, len(shards), sum(each), tuple(map(known.seconds, each))))
    return found


def finishing_seconds(stages: Iterable[StageCost], gpus: int) -> float:
    """Wall seconds on `gpus` GPUs that are always free for us: members wait for all else of their run."""
    stages = list(stages)
    free = [0.0] * gpus
    done: dict[str, float] = {}  # run -> end of what has been placed

    def place(stage: StageCost) -> None:
        ready, last = done.get(stage.run.name, 0.0) if _members(stage) else 0.0, 0.0
        for seconds in stage.seconds:
            end = max(heapq.heappop(free), ready) + seconds
            heapq.heappush(free, end)
            last = max(last, end)
        done[stage.run.name] = max(done.get(stage.run.name, 0.0), last)

    for stage in sorted(stages, key=_members):  # stable: a smaller prefix's members stay before a larger one's
        place(stage)
    return max(done.values(), default=0.0)


def _members(stage: StageCost) -> bool:
    return layout.stage_kind(stage.stage) == "members"


def known_speed(run: Run) -> Speed:
    """The best that is known: this run's ledgers, its probe, another run of this model and task, a guess."""
    own = from_ledgers(_ledgers(run.folder, run.stages()), "of this run")
    if own is not None or run.speed.measured:
        return own or run.speed
    for other in sorted(run.folder.parent.glob("*/run.yaml")):
        try:
            description = load_run(other.parent)
        except UserError:
            continue
        if all(description.get(key) == run.description[key] for key in ("model_id", "task_id")):
            found = from_ledgers(_ledgers(other.parent, ["search"]), f"of run {other.parent.name}")
            if found is not None:
                return found
    return run.speed


def from_ledgers(ledgers: Sequence[Path], whose: str) -> Speed | None:
    """The mean over finished shards; None when none has generated anything."""
    rows = [row for path in ledgers[:: max(1, len(ledgers) // SAMPLE)] if (row := ledger_row(path))]
    rows = [row for row in rows if row["seconds_generating"] > 0 and row["completions"]]
    if not rows:
        return None
    working = sum(row["seconds_perturbing"] + row["seconds_generating"] for row in rows)
    loads = sum(row["attempts"] * row["workers"] for row in rows)
    devices = ", ".join(sorted({row["device"] for row in rows}))
    return Speed(
        seconds_loading=sum(row["seconds_loading"] for row in rows) / loads,
        seconds_per_completion=working / sum(row["completions"] for row in rows),
        source=f"measured on {len(rows)} shard(s) {whose} ({devices})",
    )


def ledger_row(path: Path) -> Mapping[str, Any] | None:
    """A shard's ledger with `completions`, those it generated itself; None when there is no whole one (yet)."""
    path = path.absolute()
    if path not in _rows_seen:
        try:
            row = tables.read(path, tables.LEDGER).row(0, named=True)
            share = 1 - _pruned_share(path) if row["stage"] == "search" else 1.0
        except (UserError, pl.exceptions.PolarsError):
            return None
        # a shard of one attempt may have taken requests over from others; of several attempts only the last is told
        requests = row["requests_here"] if row["attempts"] == 1 else row["stop"] - row["start"]
        _rows_seen[path] = {**row, "completions": round(share * requests * _items(path.parents[2], row["stage"]))}
    return _rows_seen[path]


def _pruned_share(ledger: Path) -> float:
    """The share of a search shard's items that a race left out; 0 without a race."""
    if layout.race_round(_description(ledger.parents[2]), "search", layout.parse_shard(ledger.stem)) is None:
        return 0.0
    completions = ledger.parents[1] / "completions" / ledger.name
    rows = tables.read(completions, tables.COMPLETIONS, ["finish_reason"])
    return pruned_items(rows) / rows.height


def write_probe(run_folder: Path) -> None:
    """probe.json from the ledger of the probe's shard. UserError when it measured nothing."""
    found = from_ledgers(_ledgers(run_folder, [layout.PROBE]), "of a probe")
    if found is None:
        raise UserError(
            f"the probe in {run_folder / layout.PROBE} measured nothing, its answers were there already; "
            "what is known without it: randopt cost."
        )
    speed.write_probe(run_folder, found)


def in_short(experiment: Experiment) -> str:
    """One line for the start of a run."""
    stages, speeds = _costs(experiment)
    jobs = sum(len(stage.seconds) for stage in stages)
    if not jobs:
        return "every shard is generated"
    hours = sum(sum(stage.seconds) for stage in stages) / 3600
    sources = "; ".join(sorted({known.source for known in speeds.values()}))
    return f"to generate: {jobs} jobs, about {_hours(hours)} GPU-hours ({sources})"


def render(experiment: Experiment, gpus: Sequence[int] = GPUS) -> RenderableType:
    """The costs of what is left as a rich renderable."""
    stages, speeds = _costs(experiment)
    table = Table(title=f"{experiment.config['experiment']}: what is left to generate", box=box.SIMPLE_HEAD)
    for column in ("run", "stage", "jobs left", "completions", "GPU-hours", "a job takes"):
        table.add_column(column, justify="left" if column in ("run", "stage") else "right", no_wrap=True)
    for stage in stages:
        table.add_row(
            stage.run.name,
            stage.stage,
            f"{len(stage.seconds)} of {stage.shards}",
            f"{stage.completions:,}",
            _hours(sum(stage.seconds) / 3600),
            duration(max(stage.seconds)) if stage.seconds else "",
        )
    table.add_section()
    total = sum(sum(stage.seconds) for stage in stages) / 3600
    jobs, completions = sum(len(stage.seconds) for stage in stages), sum(stage.completions for stage in stages)
    table.add_row("total", "", f"{jobs}", f"{completions:,}", _hours(total), "")
    times = [f"{duration(finishing_seconds(stages, n))} on {n} GPU{'s' * (n > 1)}" for n in gpus]
    lines = [f"Finished, waiting in the queue aside, after {', '.join(times)}."]
    for name, known in speeds.items():
        each = f"{known.seconds_per_completion:.3g} s for each completion, {known.seconds_loading:.0f} s to load"
        lines.append(f"Speed of {name}: {each}: {known.source}.")
    if not all(known.measured for known in speeds.values()):
        lines.append("`randopt cost NAME --probe` answers a few candidates first; the search takes its answers over.")
    return Group(table, Text("\n".join(lines)))


def _costs(experiment: Experiment) -> tuple[list[StageCost], dict[str, Speed]]:
    speeds = {run.name: known_speed(run) for run in experiment.runs}
    return [stage for run in experiment.runs for stage in stage_costs(run, speeds[run.name])], speeds


def _ledgers(run_folder: Path, stages: Iterable[str]) -> list[Path]:
    return [path for stage in stages for path in sorted((run_folder / stage / "ledger").glob("*.parquet"))]


def _items(run_folder: Path, stage: str) -> int:
    """Items that each request of a stage answers; `run_folder` may be that of n00048 for members."""
    folder = run_folder if (run_folder / "run.yaml").is_file() else run_folder.parent
    splits = _description(folder)["task"]["splits"]
    return sum(splits[split]["size"] for split in layout.stage_splits(stage))


@lru_cache(maxsize=256)
def _description(run_folder: Path) -> Mapping[str, Any]:
    return load_run(run_folder)


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"


def duration(seconds: float) -> str:
    """As people say it: 5 s, 3 min 20 s, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
