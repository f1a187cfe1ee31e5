"""How an experiment stands, read from shards, parts and progress files, and from SLURM's queue where there is one.

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
from randopt.cluster import lock, slurm
from randopt.cluster import record as driver_record
from randopt.cluster.leftovers import shard_comment
from randopt.cost import duration, ledger_row
from randopt.errors import UserError
from randopt.experiment import Experiment, Run
from randopt.files import last_words
from randopt.items import read_items, references
from randopt.requests import Request
from randopt.score import check_scored, judge_all

STALE_SECONDS = 600.0  # a shard on another host that has said nothing for so long counts as lost
SHOWN = 12  # running and failed shards that are listed one by one; --shards lists all


@dataclass(frozen=True)
class ShardState:
    """One shard of one stage. `state` is done, running, queued, failed or pending (not submitted)."""

    run: Run
    stage: str
    shard: layout.Shard
    state: str
    progress: parts.Progress | None
    job: slurm.Job | None  # the job that tells most about it: running, waiting, or the last that ended

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
    def workers(self) -> int:
        """Engines at work side by side."""
        return self.progress.workers if self.progress else 1

    @property
    def name(self) -> str:
        """Stage and rows."""
        return f"{self.stage} {layout.shard_name(self.shard)}"

    @property
    def log(self) -> Path:
        """The shard's log."""
        return Path("logs/generate") / self.run.name / self.stage / f"{layout.shard_name(self.shard)}.log"

    @property
    def place(self) -> str:
        """Where it runs, ran or waits, in words."""
        devices = f", {self.workers} workers: {self.progress.device}" if self.progress and self.workers > 1 else ""
        if self.job is None:
            job = f", job {self.progress.scheduler_job_id}" if self.progress and self.progress.scheduler_job_id else ""
            return f"on {self.progress.host}{job}{devices}" if self.progress else ""
        where = f"on {self.job.node}" if self.job.node else f"({self.job.reason})"
        return f"{where}, job {self.job.id} {self.job.state}{devices}"


class Queue:
    """What SLURM knows of the jobs submitted from this folder; empty where there is no SLURM."""

    def __init__(self) -> None:
        self.silent = ""  # why SLURM did not answer
        self._jobs: dict[str, list[slurm.Job]] = {}
        if slurm.available():
            try:
                for job in slurm.queue(Path.cwd(), ended=True):
                    self._jobs.setdefault(job.comment, []).append(job)
            except UserError as error:
                self.silent = str(error)

    def job(self, run: Run, stage: str, shard: layout.Shard) -> slurm.Job | None:
        """The job that tells most about a shard: one that runs, else one that waits, else the youngest."""
        found = self._jobs.get(shard_comment(run, stage, shard), [])
        return max(found, key=lambda job: (job.running, job.waiting, int(job.id)), default=None)

    def ids(self) -> set[str]:
        """Ids of the jobs that run."""
        return {job.id for jobs in self._jobs.values() for job in jobs if job.running}


def shard_states(run: Run, queue: Queue) -> Iterator[ShardState]:
    """The state of every shard of a run, stage by stage."""
    running = queue.ids()
    for stage in run.stages():
        for shard in run.shards(stage):
            completions = layout.shard_file(run.folder, stage, "completions", shard)
            if completions.exists():
                yield ShardState(run, stage, shard, "done", None, None)
                continue
            progress = parts.read_progress(layout.parts_folder(completions) / parts.PROGRESS)
            job = queue.job(run, stage, shard)
            yield ShardState(run, stage, shard, _state(progress, job, running), progress, job)


def _state(progress: parts.Progress | None, job: slurm.Job | None, running: set[str]) -> str:
    if job is not None and job.running:
        return "running"
    if job is not None and job.waiting:
        return "queued"
    if progress is not None and progress.state not in ("failed", "interrupted") and _alive(progress, running):
        return "running"
    return "failed" if progress is not None or (job is not None and job.state != "COMPLETED") else "pending"


def _alive(progress: parts.Progress, running: set[str]) -> bool:
    if progress.scheduler_job_id and slurm.available():
        return progress.scheduler_job_id in running
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
    """The best candidate scored so far; parts are scored once each, as they appear.

    What a pruned candidate did not answer counts as 0: below the race's bound, so it is never the best.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._seen: dict[Path, tuple[float, str]] = {}  # part -> (mean reward, request id)
        self._means: dict[Path, tuple[float, str]] = {}  # scores -> the same of their best request

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
                if scores in self._means:
                    found.append(self._means[scores])
                elif scores.exists():
                    self._means[scores] = _best_of(scores)
                    found.append(self._means[scores])
                elif self.run.scorer.runs_programs:
                    continue  # models' programs run in jobs, not where somebody looks on
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
            texts = tables.read(path, tables.COMPLETIONS, ["request_id", "item_id", "text", "finish_reason"])
            items = read_items(self.run.task_id, layout.stage_splits("search"))
            verdicts = judge_all(self.run.scorer, texts, references(items))
            scored = texts.with_columns(reward=pl.Series([v.reward for v in verdicts], dtype=pl.Float64))
            best = scored.group_by("request_id").agg(pl.col("reward").mean()).sort("reward", "request_id").row(-1)
            self._seen[path] = (best[1], best[0])
        return self._seen[path]


def _plan_requests(run: Run) -> list[Request]:
    from randopt import plan

    return plan.read_requests(layout.requests_file(run.folder, "search"), run.run_id)


def _best_of(path: Path) -> tuple[float, str]:
    scores = tables.read(path, tables.SCORES, ["request_id", "reward"])
    check_scored(path, scores)
    means = scores.group_by("request_id", maintain_order=True).agg(pl.col("reward").cast(pl.Float64).mean())
    # requests lie in the plan's order, seeds ascending: of equals the first is the one that selection takes
    reward, request_id = means.select("reward", "request_id").row(means["reward"].arg_max() or 0)
    return reward, request_id


def seconds_per_generation(states: list[ShardState]) -> float | None:
    """Seconds of an engine per completion, over everything measured so far."""
    seconds, generations = 0.0, 0
    for state in states:
        if state.state == "done":
            row = ledger_row(layout.shard_file(state.run.folder, state.stage, "ledger", state.shard))
            if row and row["seconds_total"] > 0 and row["completions"]:
                seconds += row["seconds_total"]
                generations += row["completions"]
        elif state.progress and state.done:
            seconds += state.progress.seconds_generating + state.progress.seconds_perturbing
            generations += state.done * state.items - state.progress.pruned
    return seconds / generations if generations else None


def render(experiment: Experiment, best: dict[str, BestSoFar], shards: bool = False) -> tuple[RenderableType, bool]:
    """The status as a rich renderable, and whether everything is generated. With `shards` a line for each."""
    parts_of_view: list[RenderableType] = []
    finished = True
    queue = Queue()
    for run in experiment.runs:
        states = list(shard_states(run, queue))
        finished = finished and all(state.state == "done" for state in states)
        parts_of_view += [_stage_table(run, states), Text(_summary(run, states, best[run.name]))]
        if shards:
            parts_of_view.append(_shard_table(states))
        parts_of_view += _failures(states)
    if not finished:
        parts_of_view.append(Text(_driver(experiment)))
    if queue.silent:
        parts_of_view.append(Text(queue.silent, style="yellow"))
    return Group(*parts_of_view), finished


def _driver(experiment: Experiment) -> str:
    """Who drives the experiment, or what to do when nobody does."""
    holders = {str(holder) for run in experiment.runs if (holder := lock.holder(run.folder))}
    if holders:
        return f"driver: {'; '.join(sorted(holders))}"
    record = driver_record.read(experiment.folder)
    if record and slurm.available():
        try:
            state = slurm.state(record.job)
        except UserError:
            state = "unknown"
        if state and state not in slurm.ENDED:
            return f"driver: SLURM job {record.job}, {state}; log {record.log}"
    return "no driver is at work; the same snakemake command (or randopt submit) goes on from here"


def _shard_table(states: list[ShardState]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("shard", "state", "requests", "where", "log"):
        table.add_column(column, no_wrap=True)
    for state in states:
        size = state.shard[1] - state.shard[0]
        table.add_row(state.name, state.state, f"{state.done}/{size}", state.place, str(state.log))
    return table


def _stage_table(run: Run, states: list[ShardState]) -> Table:
    table = Table(title=run.name, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("stage", "requests", "done", "runs", "queued", "failed", "waits", "progress"):
        table.add_column(column, justify="left" if column in ("stage", "progress") else "right", no_wrap=True)
    for stage in run.stages():
        chosen = [state for state in states if state.stage == stage]
        names = ("done", "running", "queued", "failed", "pending")
        counts = [sum(state.state == name for state in chosen) for name in names]
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
        engines = max(1, sum(state.workers for state in running))
        pieces.append(f"{engines / (cost * select):.2f} candidates/s")
        if left:
            pieces.append(f"about {duration(left * cost / engines)} of generation left")
    found = best.find()
    if found:
        (seed, sigma), *_ = found[1].perturbation
        pieces.append(f"best so far: seed {seed}, σ {sigma:g}, mean reward {found[0]:.3f} on select")
    pieces += [f"running: {state.name} {state.place}, log {state.log}" for state in running[:SHOWN]]
    if len(running) > SHOWN:
        pieces.append(f"... and {len(running) - SHOWN} more run (randopt status --shards lists all)")
    return "\n".join(pieces)


def _failures(states: list[ShardState]) -> list[RenderableType]:
    """Failed shards with their last words and their log."""
    failed = [state for state in states if state.state == "failed"]
    lines: list[RenderableType] = []
    for state in failed[:SHOWN]:
        after = f" after {state.progress.done} requests" if state.progress else ""
        error = state.progress.error.splitlines()[0] if state.progress and state.progress.error else ""
        words = error or last_words(state.log) or "it ended without a word (killed?)"
        lines.append(Text(f"failed: {state.name} {state.place}{after}: {words}\n  log {state.log}", style="red"))
    if len(failed) > SHOWN:
        lines.append(Text(f"... and {len(failed) - SHOWN} more failed", style="red"))
    return lines
