"""Every table of the workflow: one schema each, one way to write it, one way to read it.

A table is a Parquet file written through Polars under a temporary name, flushed and renamed, so it
is whole or absent. Its footer names the table and the run it belongs to; readers refuse a file of
another table, another run or another schema by name. No time stamp goes into a table (the ledger
excepted), so equal content is equal bytes.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import polars as pl

from randopt.errors import UserError
from randopt.files import write_atomic

FOOTER_KEY = "randopt"  # key of our JSON in the Parquet footer

# What Polars raises on a damaged file; some damage makes it panic, and a panic is no Exception.
_DAMAGE = (Exception, pl.exceptions.PanicException)


@dataclass(frozen=True)
class Table:
    """Name, grain, key and columns of a table; `units` explains columns whose name does not."""

    name: str
    grain: str
    key: tuple[str, ...]
    schema: pl.Schema
    nullable: frozenset[str] = frozenset()
    units: Mapping[str, str] = field(default_factory=dict)


PERTURBATION = pl.List(pl.Struct({"seed": pl.UInt64, "coefficient": pl.Float64}))
DIGESTS = pl.List(pl.Struct({"request_id": pl.String, "digest": pl.String}))
MESSAGES = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))

REQUESTS = Table(
    "requests",
    "request",
    ("request_id",),
    pl.Schema(
        [
            ("request_id", pl.String),
            ("perturbation", PERTURBATION),
            ("temperature", pl.Float64),
            ("sample_seed", pl.UInt64),
        ]
    ),
    units={
        "request_id": "16 hex digits of SHA-256 over perturbation and decoding",
        "temperature": "0 is greedy",
        "sample_seed": "seed of the sampling; 0 when greedy",
    },
)

ITEMS = Table(
    "items",
    "item",
    ("item_id",),
    pl.Schema(
        [
            ("item_id", pl.String),
            ("messages", MESSAGES),
            ("reference", pl.String),
            ("content_hash", pl.String),
            ("meta", pl.String),
        ]
    ),
    units={
        "item_id": "split and position, as in select-00007",
        "reference": "JSON, what the scorer compares with",
        "content_hash": "16 hex digits of SHA-256 of what makes two items the same problem",
        "meta": "JSON, what the source said beyond the problem",
    },
)

COMPLETIONS = Table(
    "completions",
    "request × item",
    ("request_id", "item_id"),
    pl.Schema(
        {
            "request_id": pl.String,
            "item_id": pl.String,
            "text": pl.String,
            "finish_reason": pl.String,
            "prompt_tokens": pl.UInt32,
            "completion_tokens": pl.UInt32,
        }
    ),
    units={
        "finish_reason": "stop (end of turn), length (token limit), nan (broken weights: no token could be chosen), or "
        "pruned (never answered, the candidate was lost)",
        "completion_tokens": "generated tokens, the end-of-turn token included",
    },
)

SCORES = Table(
    "scores",
    "request × item",
    ("request_id", "item_id"),
    pl.Schema(
        {
            "request_id": pl.String,
            "item_id": pl.String,
            "reward": pl.Float32,
            "strict": pl.Boolean,
            "lenient": pl.Boolean,
            "vote_key": pl.String,
            "scorer": pl.String,
            "scorer_version": pl.UInt32,
        }
    ),
    nullable=frozenset({"vote_key"}),
    units={"vote_key": "the normalised answer that is counted; null abstains"},
)

DIFFERENCES = Table(
    "differences",
    "request × item that two scorers judge differently",
    ("request_id", "item_id"),
    pl.Schema(
        {
            "stage": pl.String,
            "request_id": pl.String,
            "item_id": pl.String,
            "text": pl.String,
            "old_reward": pl.Float32,
            "new_reward": pl.Float32,
            "old_strict": pl.Boolean,
            "new_strict": pl.Boolean,
            "old_lenient": pl.Boolean,
            "new_lenient": pl.Boolean,
            "old_vote_key": pl.String,
            "new_vote_key": pl.String,
        }
    ),
    nullable=frozenset({"old_vote_key", "new_vote_key"}),
    units={"text": "the completion that both judged; the footer names both scorers"},
)

CANDIDATES = Table(
    "candidates",
    "candidate",
    ("request_id",),
    pl.Schema(
        {
            "request_id": pl.String,
            "seed": pl.UInt64,
            "sigma": pl.Float64,
            "reward": pl.Float64,
            "strict": pl.Float64,
            "lenient": pl.Float64,
            "standard_error": pl.Float64,
            "items": pl.UInt32,
            "status": pl.String,
            "tokens": pl.UInt64,
        }
    ),
    units={
        "reward": "mean over the select items that were scored",
        "strict": "share of items correct under the exact format",
        "lenient": "share of items correct under the forgiving format",
        "standard_error": "of the mean reward, over items",
        "items": "items scored",
        "status": "complete or pruned",
        "tokens": "completion tokens generated",
    },
)

# Candidates of some rows of a large search. A table of its own, so that no block passes for the whole.
BLOCK = replace(CANDIDATES, name="block")

RACE = Table(
    "race",
    "item",
    ("item_id",),
    pl.Schema([("item_id", pl.String), ("rewards", pl.List(pl.Float32)), ("tokens", pl.Float64)]),
    units={
        "rewards": "of the pilot's candidates, in the plan's order",
        "tokens": "mean completion tokens of the pilot's candidates",
    },
)

SELECTION = Table(
    "selection",
    "rank",
    ("rank",),
    pl.Schema(
        {
            "rank": pl.UInt32,
            "request_id": pl.String,
            "seed": pl.UInt64,
            "sigma": pl.Float64,
            "select_score": pl.Float64,
            "confirm_score": pl.Float64,
        }
    ),
    units={
        "rank": "1 is best",
        "select_score": "mean reward on the select items, the one that was maximised",
        "confirm_score": "mean reward on the confirm items, never seen by the search",
    },
)

VOTES = Table(
    "votes",
    "method × K × item",
    ("method", "top_k", "item_id"),
    pl.Schema(
        {
            "method": pl.String,
            "top_k": pl.UInt32,
            "split": pl.String,
            "item_id": pl.String,
            "vote_key": pl.String,
            "votes": pl.UInt32,
            "valid_votes": pl.UInt32,
            "margin": pl.Int64,
            "strict": pl.Boolean,
            "lenient": pl.Boolean,
        }
    ),
    nullable=frozenset({"vote_key"}),
    units={
        "vote_key": "the answer that won; null when every member abstained",
        "votes": "votes for the winner",
        "valid_votes": "members that did not abstain",
        "margin": "votes for the winner minus votes for the runner-up",
    },
)

METRICS = Table(
    "metrics",
    "method × K × split × metric",
    ("model", "task", "run_id", "candidates", "method", "top_k", "split", "metric"),
    pl.Schema(
        {
            "model": pl.String,
            "task": pl.String,
            "run_id": pl.String,
            "candidates": pl.UInt32,
            "method": pl.String,
            "top_k": pl.UInt32,
            "split": pl.String,
            "metric": pl.String,
            "value": pl.Float64,
            "ci_low": pl.Float64,
            "ci_high": pl.Float64,
            "n": pl.UInt32,
            "generations": pl.UInt64,
            "tokens": pl.UInt64,
        }
    ),
    units={
        "candidates": "N, the prefix of the plan that was searched",
        "top_k": "K; 1 for a single model",
        "n": "items",
        "generations": "completions spent to get this answer, the search included",
        "tokens": "completion tokens spent, the search included",
    },
)

LEDGER = Table(
    "ledger",
    "shard",
    ("run_id", "stage", "start", "stop"),
    pl.Schema(
        [
            ("run_id", pl.String),
            ("stage", pl.String),
            ("start", pl.UInt64),
            ("stop", pl.UInt64),
            ("host", pl.String),
            ("device", pl.String),
            ("workers", pl.UInt32),
            ("scheduler_job_id", pl.String),
            ("attempts", pl.UInt32),
            ("requests_here", pl.UInt32),
            ("seconds_loading", pl.Float64),
            ("seconds_perturbing", pl.Float64),
            ("seconds_generating", pl.Float64),
            ("seconds_total", pl.Float64),
            ("prompt_tokens", pl.UInt64),
            ("completion_tokens", pl.UInt64),
            ("weights_digest", pl.String),
            ("digests", DIGESTS),
            ("versions", pl.String),
        ]
    ),
    nullable=frozenset({"scheduler_job_id"}),
    units={
        "attempts": "times this shard was started",
        "requests_here": "requests finished by the last attempt; the rest were kept from earlier ones",
        "workers": "engines side by side, last attempt",
        "seconds_loading": "engine and model load (all seconds: wall clock, added up over workers and attempts)",
        "weights_digest": "of the base, equal at the start and at the end",
        "digests": "of perturbed weights: every member's, and the last that was generated here of a search shard",
        "versions": "JSON",
    },
)


def write(frame: pl.DataFrame, table: Table, path: Path, **footer: str | int | None) -> None:
    """Cast `frame` to the table's schema, check it, and write it to `path` atomically.

    `footer` holds what a reader can later demand of the file, run_id for example; None is as if it were not given.
    Raises ValueError when a column is missing, a cast loses a value, a null stands where none may,
    or the key is not unique: a fault of ours, never of the data's. UserError when the file cannot be written.
    """
    missing = [name for name in table.schema if name not in frame.columns]
    if missing:
        raise ValueError(f"{table.name}: columns {missing} are missing")
    frame = frame.select(pl.col(name).cast(dtype, strict=True) for name, dtype in table.schema.items())
    frame = frame.rechunk()  # Polars cuts a large table into row groups by its chunks
    for name in table.schema:
        if name not in table.nullable and frame[name].null_count():
            raise ValueError(f"{table.name}: column {name} holds nulls")
    if frame.select(pl.struct(table.key).is_duplicated().any()).item():
        raise ValueError(f"{table.name}: the key {table.key} is not unique")
    said = {key: value for key, value in footer.items() if value is not None}
    text = json.dumps({"table": table.name, **said}, sort_keys=True)
    # Through memory: what Polars says of a full disk while it writes a file is an OSError only sometimes.
    content = io.BytesIO()
    frame.write_parquet(content, compression="zstd", metadata={FOOTER_KEY: text}, statistics=False)
    write_atomic(path, lambda temporary: temporary.write_bytes(content.getbuffer()))


def footer(path: Path) -> dict[str, str | int]:
    """The JSON object that `write` put into the file's footer.

    Raises UserError when the file is missing, torn, or not a table of this project.
    """
    try:
        text = pl.read_parquet_metadata(path).get(FOOTER_KEY)
        found = None if text is None else json.loads(text)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; run the workflow again to make it.") from error
    except _DAMAGE as error:
        raise _unreadable(path, error) from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is a Parquet file but no table of this workflow; remove it and run again.")
    return found


def check_footer(path: Path, table: Table, **expected: str | int | None) -> None:
    """Raise UserError unless the file is a `table` whose footer holds every `expected` value; None: no value."""
    found = footer(path)
    for key, value in {"table": table.name, **expected}.items():
        if found.get(key) != value:
            raise UserError(
                f"{path} does not belong here: its {key} is {found.get(key)!r}, expected {value!r}. "
                "It was copied or moved from another place; remove it and run again."
            )


def read(path: Path, table: Table, columns: Sequence[str] | None = None, **expected: str | int | None) -> pl.DataFrame:
    """The table in `path`, or some of its columns, after its footer and schema were checked.

    Raises UserError that names the file when it is missing, torn, foreign or of another schema.
    """
    check_footer(path, table, **expected)
    try:
        frame = pl.read_parquet(path, columns=list(columns) if columns else None, glob=False)
    except _DAMAGE as error:
        raise _unreadable(path, error) from error
    wanted = {name: table.schema[name] for name in (columns or table.schema)}
    if dict(frame.schema) != wanted:
        raise UserError(
            f"{path} has columns {dict(frame.schema)}, expected {wanted}. "
            "It was written by another version; remove it and run again."
        )
    return frame


def read_all(
    paths: Sequence[Path], table: Table, columns: Sequence[str] | None = None, **expected: str | int | None
) -> pl.DataFrame:
    """The rows of an explicit list of files, in the order given."""
    return pl.concat([read(path, table, columns, **expected) for path in paths])


def _unreadable(path: Path, error: BaseException) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(
        f"{path} cannot be read as Parquet ({reason}). "
        "It is torn or damaged; remove it and run again: only it and what follows is redone."
    )
