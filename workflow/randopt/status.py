"""How an experiment stands, read from shards, parts and progress files: no process is asked.

It works while the experiment runs, from any machine that sees the results folder.
"""

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from randopt import layout, parts, tables
from randopt.errors import UserError
from randopt.experiment import Experiment, Run
from randopt.items import read_items, references
from randopt.requests import Request
from randopt.score import judge_all
from randopt.tasks.scorers import get

STALE_SECONDS = 600.0  # a shard on another host that has said nothing for so long counts as lost


@dataclass(frozen=True)
class ShardState:
    """One shard of one stage. `state` is done, running, failed or pending."""

    run: Run
    stage: str
    shard: layout.Shard
    state: str
    progress: parts.Progress | None

    @property
    def items(self) -> int:
        """Items that each request answers."""
        return sum(self.run.task.splits[split]["size"] for split in layout.stage_splits(self.stage))

    @property
    def done(self) -> int:
        """Requests finished."""
        if self.state == "done":
            return self.shard[1] - self.shard[0]
        return self.progress.done if self.progress else 0

    @property
    def log(self) -> Path:
        """The shard's log."""
        return Path("logs/generate") / self.run.name / self.stage / f"{layout.shard_name(self.shard)}.log"


def shard_states(run: Run) -> Iterator[ShardState]:
    """The state of every shard of a run, stage by stage."""
    for stage in run.stages():
        for shard in run.shards(stage):
            completions = layout.shard_file(run.folder, stage, "completions", shard)
            progress = parts.read_progress(layout.parts_folder(completions) / parts.PROGRESS)
            yield ShardState(run, stage, shard, _state(completions, progress), progress)


def _state(completions: Path, progress: parts.Progress | None) -> str:
    if completions.exists():
        return "done"
    if progress is None:
        return "pending"
    if progress.state in ("failed", "interrupted"):
        return "failed"
    return "running" if _alive(progress) else "failed"


def _alive(progress: parts.Progress) -> bool:
    if progress.host == socket.gethostname():
        try:
            os.kill(progress.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True
    return time.time() - progress.updated < STALE_SECONDS


class BestSoFar:
    """The best candidate scored so far; parts are scored once each, as they appear."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._seen: dict[Path, tuple[float, str]] = {}  # part -> (mean reward, request id)

    def find(self) -> tuple[float, Request] | None:
        """(mean reward, request) of the best candidate, or None before the first is finished."""
        run = self.run
        found: list[tuple[float, str]] = []
        try:
            requests = {r.request_id: r for r in _plan_requests(run)}
        except UserError:
            return None
        for shard in run.shards("search"):
            path = layout.shard_file(run.folder, "search", "completions", shard)
            scores = layout.shard_file(run.folder, "search", run.scores, shard)
            try:
                if scores.exists():
                    found += _best_of(scores, tables.SCORES)
                elif path.exists():
                    found.append(self._score(path))
                else:
                    found += [self._score(part) for part in sorted(layout.parts_folder(path).glob("*.parquet"))]
            except UserError:
                continue  # being renamed or merged at this moment; the next look sees it
        found = [pair for pair in found if pair[1] in requests]
        if not found:
            return None
        # the order of the selection: score descending, then seed ascending
        reward, request_id = min(found, key=lambda pair: (-pair[0], requests[pair[1]].perturbation[0][0]))
        return reward, requests[request_id]

    def _score(self, path: Path) -> tuple[float, str]:
        if path not in self._seen:
            texts = tables.read(path, tables.COMPLETIONS, ["request_id", "item_id", "text"])
            items = read_items(self.run.task_id, layout.stage_splits("search"))
            verdicts = judge_all(get(self.run.task.scorer), texts, references(items))
            scored = texts.with_columns(reward=pl.Series([v.reward for v in verdicts], dtype=pl.Float64))
            best = scored.group_by("request_id").agg(pl.col("reward").mean()).sort("reward", "request_id").row(-1)
            self._seen[path] = (best[1], best[0])
        return self._seen[path]


def _plan_requests(run: Run) -> list[Request]:
    from randopt import plan

    return plan.read_requests(layout.requests_file(run.folder, "search"), run.run_id)


def _best_of(path: Path, table: tables.Table) -> list[tuple[float, str]]:
    scores = tables.read(path, table, ["request_id", "reward"])
    means = scores.group_by("request_id").agg(pl.col("reward").cast(pl.Float64).mean())
    return [(reward, request_id) for request_id, reward in means.iter_rows()]


def seconds_per_generation(states: list[ShardState]) -> float | None:
    """Wall seconds of a generate job per completion, over everything measured so far."""
    seconds, generations = 0.0, 0
    for state in states:
        if state.state == "done":
            ledger = layout.shard_file(state.run.folder, state.stage, "ledger", state.shard)
            if ledger.exists():
                row = tables.read(ledger, tables.LEDGER).row(0, named=True)
                if row["seconds_total"] > 0:
                    seconds += row["seconds_total"]
                    generations += state.done * state.items
        elif state.progress and state.done:
            seconds += state.progress.seconds_generating + state.progress.seconds_perturbing
            generations += state.done * state.items
    return seconds / generations if generations else None


def render(experiment: Experiment, best: dict[str, BestSoFar]) -> tuple[RenderableType, bool]:
    """The status as a rich renderable, and whether everything is generated."""
    parts_of_view: list[RenderableType] = []
    finished = True
    for run in experiment.runs:
        states = list(shard_states(run))
        finished = finished and all(state.state == "done" for state in states)
        parts_of_view += [_stage_table(run, states), Text(_summary(run, states, best[run.name])), *_failures(states)]
    return Group(*parts_of_view), finished


def _stage_table(run: Run, states: list[ShardState]) -> Table:
    table = Table(title=run.name, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("stage", "requests", "done", "runs", "failed", "waits", "progress"):
        table.add_column(column, justify="left" if column in ("stage", "progress") else "right", no_wrap=True)
    for stage in run.stages():
        chosen = [state for state in states if state.stage == stage]
        counts = [sum(state.state == name for state in chosen) for name in ("done", "running", "failed", "pending")]
        done, total = sum(state.done for state in chosen), run.rows(stage)
        filled = round(10 * done / total)
        bar = "█" * filled + "░" * (10 - filled)
        table.add_row(stage, f"{done}/{total}", *map(str, counts), f"{bar} {100 * done / total:3.0f} %")
    return table


def _summary(run: Run, states: list[ShardState], best: BestSoFar) -> str:
    pieces = []
    cost = seconds_per_generation(states)
    running = [state for state in states if state.state == "running"]
    if cost:
        select = run.task.splits["select"]["size"]
        left = sum((s.shard[1] - s.shard[0] - s.done) * s.items for s in states)
        pieces.append(f"{max(1, len(running)) / (cost * select):.2f} candidates/s")
        if left:
            pieces.append(f"about {_duration(left * cost / max(1, len(running)))} of generation left")
    found = best.find()
    if found:
        (seed, sigma), *_ = found[1].perturbation
        pieces.append(f"best so far: seed {seed}, σ {sigma:g}, mean reward {found[0]:.3f} on select")
    for state in running:
        assert state.progress is not None
        job = f", job {state.progress.scheduler_job_id}" if state.progress.scheduler_job_id else ""
        name = f"{state.stage} {layout.shard_name(state.shard)}"
        pieces.append(f"running: {name} on {state.progress.host}{job}, log {state.log}")
    return "\n".join(pieces)


def _failures(states: list[ShardState]) -> list[RenderableType]:
    """Failed shards with their last words and their log."""
    lines: list[RenderableType] = []
    for state in states:
        if state.state == "failed" and state.progress:
            words = state.progress.error or "the process ended without a word (killed?)"
            lines.append(
                Text(
                    f"failed: {state.stage} {layout.shard_name(state.shard)} on {state.progress.host} after "
                    f"{state.progress.done} requests: {words.splitlines()[0]}\n  log {state.log}",
                    style="red",
                )
            )
    return lines


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
