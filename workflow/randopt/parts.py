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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from randopt import layout, tables
from randopt.errors import UserError
from randopt.files import write_text_atomic
from randopt.requests import Request

log = logging.getLogger(__name__)

PROGRESS = "progress.json"


@dataclass
class Progress:
    """State of a shard for `randopt status` and the ledger; seconds add up over attempts."""

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
    device: str = ""
    error: str = ""
    updated: float = 0.0  # Unix time
    attempt_started: float = 0.0  # Unix time
    done_at_attempt: int = 0
    seconds_loading: float = 0.0
    seconds_perturbing: float = 0.0
    seconds_generating: float = 0.0
    seconds_total: float = 0.0


@dataclass(frozen=True)
class Parts:
    """The parts folder of one shard."""

    completions: Path  # the shard's final output
    footer: Mapping[str, str | int]  # run_id and items hash that every part must carry
    item_ids: Sequence[str]

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
            rows = tables.read(path, tables.COMPLETIONS, **self.footer)
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

    def reuse(self, requests: Sequence[Request], siblings: Sequence[Path]) -> None:
        """Copy requests that another finished shard of this run already answered into parts.

        A raised N lengthens the last shard, and a larger N often selects the same experts again:
        nothing is generated twice.
        """
        missing = {request.request_id: request for request in requests if not self.path(request).exists()}
        for sibling in siblings:
            if not missing:
                return
            try:
                tables.check_footer(sibling, tables.COMPLETIONS, **self.footer)
                found = tables.read(sibling, tables.COMPLETIONS).filter(pl.col("request_id").is_in(list(missing)))
            except UserError as error:
                log.debug("not reused: %s", error)
                continue
            for (request_id,), rows in found.partition_by("request_id", as_dict=True).items():
                request = missing.pop(str(request_id))
                self.write(request, self.checked(request, rows))
                log.info("request %s taken from %s", request_id, sibling)

    def merge(self, requests: Sequence[Request]) -> pl.DataFrame:
        """All completions of the shard in request order, item order within."""
        return pl.concat([part for request in requests if (part := self.read(request)) is not None])

    def remove(self) -> None:
        """Remove the parts once the final output is in place."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def load_progress(self) -> Progress | None:
        """The progress of an earlier attempt, if it left one."""
        return read_progress(self.folder / PROGRESS)

    def save_progress(self, progress: Progress) -> None:
        """Tell `randopt status` how the shard stands."""
        progress.updated = time.time()
        write_text_atomic(self.folder / PROGRESS, json.dumps(asdict(progress)))


def read_progress(path: Path) -> Progress | None:
    """The progress in `path`; None when there is none or it is torn."""
    try:
        return Progress(**json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def begin_attempt(earlier: Progress | None, run_id: str, stage: str, shard: layout.Shard) -> Progress:
    """Progress of a new attempt, on top of what earlier attempts spent."""
    progress = earlier or Progress(run_id, stage, *shard)
    progress.attempts += 1
    progress.state = "loading"
    progress.error = ""
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
    """Finished shards that may hold the same requests on the same items."""
    patterns = {
        "search": ["search/completions/*.parquet"],
        "controls": ["controls-*/completions/*.parquet"],
    }.get(layout.stage_kind(stage), ["random/completions/*.parquet", "n*/members/completions/*.parquet"])
    for pattern in patterns:
        yield from (path for path in sorted(Path(run).glob(pattern)) if path != own)
