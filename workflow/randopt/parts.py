"""Part files: every finished request of a shard, safe on disk before the next one is needed.

Parts lie beside the shard's final output. A shard that is killed, pre-empted or retried goes on
with the first request that has no whole part; a torn part is worth nothing and is redone.
"""

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
from tqdm import tqdm

from randopt import layout, tables
from randopt.errors import UserError
from randopt.files import CannotWriteNow, write_text_atomic
from randopt.requests import Request

log = logging.getLogger(__name__)

PROGRESS = "progress.json"
SUMS = ("done", "pruned", "seconds_loading", "seconds_perturbing", "seconds_generating", "seconds_total")  # of workers


@dataclass
class Progress:
    """State of a shard for `randopt status` and the ledger; seconds add up over attempts, and over workers."""

    run_id: str
    stage: str
    start: int
    stop: int
    done: int = 0
    attempts: int = 0
    state: str = "loading"  # loading, running, failed, interrupted
    host: str = ""
    pid: int = 0
    scheduler_job_id: str | None = None
    device: str = ""  # of several workers: all of theirs
    workers: int = 1  # engines at work side by side
    error: str = ""
    updated: float = 0.0  # Unix time
    attempt_started: float = 0.0  # Unix time
    done_at_attempt: int = 0
    pruned: int = 0  # items that the finished requests did not answer, because a race stopped them
    seconds_loading: float = 0.0
    seconds_perturbing: float = 0.0
    seconds_generating: float = 0.0
    seconds_total: float = 0.0
    digests: dict[str, str] = field(default_factory=dict)  # request id -> digest of its weights, where it was taken

    def bar(self, note: str = "") -> tqdm:
        """A progress bar of the shard's requests, from what is done on."""
        return tqdm(
            total=self.stop - self.start,
            initial=self.done,
            desc=f"{self.stage} {layout.shard_name((self.start, self.stop))}{note}",
            unit="request",
            mininterval=1.0,
            dynamic_ncols=True,
        )


@dataclass(frozen=True)
class Parts:
    """The parts folder of one shard."""

    completions: Path  # the shard's final output
    footer: Mapping[str, str | int | None]  # run_id, items hash and race that every part must carry
    item_ids: Sequence[str]
    progress_file: str = PROGRESS  # in the folder

    @property
    def folder(self) -> Path:
        """Where the parts lie."""
        return layout.parts_folder(self.completions)

    def path(self, request: Request) -> Path:
        """The part of a request."""
        return self.folder / f"{request.request_id}.parquet"

    def write(self, request: Request, rows: pl.DataFrame) -> None:
        """Keep the completions of one request."""
        tables.write(rows, tables.COMPLETIONS, self.path(request), **self.footer)

    def read(self, request: Request) -> pl.DataFrame | None:
        """The completions of a request, or None when there is no whole part of this run."""
        path = self.path(request)
        if not path.exists():
            return None
        try:
            rows = tables.read(path, tables.COMPLETIONS, None, **self.footer)
            return self.checked(request, rows)
        except UserError as error:
            log.warning("part ignored and redone: %s", error)
            path.unlink(missing_ok=True)
            return None

    def checked(self, request: Request, rows: pl.DataFrame) -> pl.DataFrame:
        """`rows` if they answer every item of this request exactly once, in the items' order."""
        if rows["item_id"].to_list() != list(self.item_ids) or set(rows["request_id"]) != {request.request_id}:
            raise UserError(f"{self.path(request)} does not hold every item of request {request.request_id}")
        return rows

    def reuse(self, requests: Sequence[Request], siblings: Iterable[Path]) -> None:
        """Copy requests that another finished shard of this run already answered into parts.

        A raised N lengthens the last shard, and a larger N often selects the same experts again:
        nothing is generated twice.
        """
        missing = [request for request in requests if not self.path(request).exists()]
        for sibling in siblings:
            if not missing:
                return
            try:
                found = self._answers_in(sibling, missing)
            except UserError as error:
                log.debug("not reused: %s", error)
                continue
            for request in requests:
                if request.request_id in found:
                    self.write(request, found[request.request_id])
            missing = [request for request in missing if request.request_id not in found]
            if found:
                log.info("%d requests taken from %s", len(found), sibling)

    def merge(self, requests: Sequence[Request]) -> pl.DataFrame:
        """All completions of the shard in request order, item order within.

        A second copy of this job may have finished first and removed the parts; then its output has
        what is missing. Raises UserError when a request is nowhere.
        """
        found = {request.request_id: rows for request in requests if (rows := self.read(request)) is not None}
        missing = [request for request in requests if request.request_id not in found]
        if missing:
            found |= self._answers_in(self.completions, missing)
        lost = [request.request_id for request in missing if request.request_id not in found]
        if lost:
            raise UserError(
                f"{self.folder} has lost {len(lost)} finished request(s), {lost[0]} the first; was it changed by "
                "hand? Run the same command again: only these are generated."
            )
        return pl.concat([found[request.request_id] for request in requests])

    def _answers_in(self, path: Path, requests: Sequence[Request]) -> dict[str, pl.DataFrame]:
        """request_id -> rows of those requests that a finished shard of this run and these items holds.

        Raises UserError when it is missing, torn, of another run, or lacks items of a request.
        """
        tables.check_footer(path, tables.COMPLETIONS, **self.footer)
        wanted = {request.request_id: request for request in requests}
        found = tables.read(path, tables.COMPLETIONS).filter(pl.col("request_id").is_in(list(wanted)))
        groups = found.partition_by("request_id", as_dict=True)
        return {str(name): self.checked(wanted[str(name)], rows) for (name,), rows in groups.items()}

    def remove(self) -> None:
        """Remove the parts once the final output is in place."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def load_progress(self) -> Progress | None:
        """The progress of an earlier attempt, if it left one."""
        return read_progress(self.folder / self.progress_file)

    def save_progress(self, progress: Progress) -> None:
        """Tell `randopt status` how the shard stands. Not being able to for a while is no reason to stop."""
        progress.updated = time.time()
        try:
            write_text_atomic(self.folder / self.progress_file, json.dumps(asdict(progress)))
        except CannotWriteNow as error:
            log.warning("the state of the shard is not saved: %s", error)


def read_progress(path: Path) -> Progress | None:
    """The progress in `path`; None when there is none or it is torn."""
    try:
        return Progress(**json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def finished_progress(ledger: Path, run_id: str) -> Progress | None:
    """What a finished shard's ledger says it took; None without a whole ledger of this run.

    A shard that is taken over (its output was removed, its parts are gone) must not seem to have cost nothing.
    """
    try:
        row = tables.read(ledger, tables.LEDGER, run_id=run_id).row(0, named=True)
    except (UserError, pl.exceptions.PolarsError):
        return None
    shared = {name: row[name] for name in row if name in Progress.__dataclass_fields__}
    return Progress(**shared | {"digests": {each["request_id"]: each["digest"] for each in row["digests"]}})


def begin_attempt(earlier: Progress | None, run_id: str, stage: str, shard: layout.Shard) -> Progress:
    """Progress of a new attempt, on top of what earlier attempts spent."""
    progress = earlier or Progress(run_id, stage, *shard)
    progress.attempts += 1
    progress.state = "loading"
    progress.error = ""
    progress.workers = 1
    progress.host = socket.gethostname()
    progress.pid = os.getpid()
    progress.scheduler_job_id = os.environ.get("SLURM_JOB_ID")
    progress.attempt_started = time.time()
    return progress


def rows(request: Request, completions: Sequence[Any], item_ids: Sequence[str]) -> pl.DataFrame:
    """Completions of one request as table rows, in the items' order."""
    by_item = {completion.item_id: completion for completion in completions}
    columns: dict[str, list[Any]] = {name: [] for name in tables.COMPLETIONS.schema}
    for item_id in item_ids:
        completion = by_item[item_id]
        columns["request_id"].append(request.request_id)
        columns["item_id"].append(item_id)
        columns["text"].append(completion.text)
        columns["finish_reason"].append(completion.finish_reason)
        columns["prompt_tokens"].append(completion.prompt_tokens)
        columns["completion_tokens"].append(completion.completion_tokens)
    return pl.DataFrame(columns, schema=tables.COMPLETIONS.schema)


def siblings(run: Path, stage: str, own: Path) -> Iterator[Path]:
    """Finished shards that may hold the same requests on the same items.

    The shard's own output is one of them, also under its second name (.kept): a second copy of this job
    may have finished it. So are members that were set aside (.retired).
    """
    kind = layout.stage_kind(stage)
    if kind in ("search", "controls"):
        # A request keeps its row for ever: only shards of the same rows matter, not every finished one.
        start, stop = layout.parse_shard(own.stem)
        for path in _finished(run, f"{kind}*/completions"):
            try:
                first, end = layout.parse_shard(path.stem)
            except ValueError:
                continue  # a copy that somebody made by hand
            if first < stop and start < end:
                yield path
    else:
        yield from _finished(run, "random/completions")
        yield from _finished(run, "n*/members/completions")


def _finished(run: Path, folders: str) -> list[Path]:
    """Completions in the folders, those under their proper name first."""
    found = [path for suffix in (".parquet", ".kept", ".retired") for path in Path(run).glob(f"{folders}/*{suffix}")]
    return sorted(found, key=lambda path: (path.suffix != ".parquet", path))
