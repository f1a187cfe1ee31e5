"""Shards become one table: every file is held against the requests it claims to answer.

A file is named after the rows of its requests table (`00000-00063.parquet`, both ends included).
Its footer, its request ids and its items are checked before a number is taken from it, so a
missing, duplicated or foreign shard fails here, by name, and not as a slightly wrong mean.
"""

import os
import re
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl

from randopt import tables
from randopt.errors import UserError
from randopt.race import PRUNED
from randopt.score import check_scored

SEARCH = "search"
_NAME = re.compile(r"(\d{5,})-(\d{5,})\.parquet")
_KEY = ["request_id", "item_id"]
_SCORER = ["scorer", "scorer_version"]


def shard_range(path: Path) -> tuple[int, int]:
    """(start, stop) of the rows in a shard's file name; stop is exclusive. UserError for another name."""
    match = _NAME.fullmatch(Path(path).name)
    if match is None or int(match[1]) > int(match[2]):
        raise UserError(f"{path} is not a shard's name; expected FIRST-LAST.parquet, as 00000-00063.parquet.")
    return int(match[1]), int(match[2]) + 1


def gather(
    requests: Path,
    scores: Sequence[Path],
    completions: Sequence[Path],
    run_id: str,
    first: int,
    *,
    begin: int = 0,
    scorer: tuple[str, int] | None = None,
    items: Collection[str] | None = None,
    threads: int | None = None,
    race: str | None = None,
) -> pl.DataFrame:
    """CANDIDATES for rows begin .. first-1 of the search's requests, in plan order.

    `scorer`: name and version that all scores must be by; without it they must be by one.
    `items`: ids of the select items; without them the first shard's items are the measure.
    `race`: mark of the race that the files must be of; then a candidate's numbers are over the items it answered.
    Files wholly outside these rows are not read; one that reaches past them is checked whole, then cut.

    Each mean is taken in float64 over the rewards in item order, within one file, so neither the
    order of rows in a file nor the number of threads changes a bit of the result. Memory: about
    250 bytes per candidate plus one shard per thread (benchmarks/gather.py).

    standard_error = sqrt(Σ(rᵢ - r̄)² / (n - 1)) / sqrt(n), r over n items; 0 when n = 1.
    Raises UserError that names the file, or the rows that no file covers.
    """
    plan = tables.read(requests, tables.REQUESTS, run_id=run_id)
    if not 0 <= begin < first <= plan.height:
        asked = f"rows {begin}-{first - 1}" if begin else str(first)
        raise UserError(f"{requests} holds {plan.height} candidates; {asked} were asked for.")
    _check_candidates(requests, plan)
    ids = plan["request_id"]
    row = np.arange(plan.height)
    wanted = (row >= begin) & (row < first)
    score_files = cover(requests, scores, "scores", wanted)
    completion_files = cover(requests, completions, "completions", wanted)
    shards = _Shards.of(requests, ids, run_id, SEARCH, score_files[0], items, race)

    mean, strict, lenient, error = (np.empty(first - begin) for _ in range(4))
    tokens = np.empty(first - begin, np.uint64)
    answered = np.full(first - begin, len(shards.items), np.uint32)

    def places(path: Path) -> tuple[slice, slice]:
        """Where a file's wanted rows lie in the file and in the result."""
        start, stop = shard_range(path)
        low, high = max(start, begin), min(stop, first)
        return slice(low - start, high - start), slice(low - begin, high - begin)

    def read_scores(path: Path) -> tuple:
        frame = shards.read(path, tables.SCORES, [*_KEY, "reward", "strict", "lenient", *_SCORER])
        found = _scorer(path, frame)
        keep, part = places(path)
        reward = shards.matrix(frame["reward"])[keep].astype(np.float64)
        mean[part] = reward.mean(axis=1)
        error[part] = _standard_error(reward, mean[part])
        strict[part] = shards.matrix(frame["strict"])[keep].mean(axis=1)
        lenient[part] = shards.matrix(frame["lenient"])[keep].mean(axis=1)
        return found

    def read_tokens(path: Path) -> None:
        columns = ["completion_tokens", *(["finish_reason"] if race else [])]
        frame = shards.read(path, tables.COMPLETIONS, [*_KEY, *columns])
        keep, part = places(path)
        counts = shards.matrix(frame["completion_tokens"])[keep]
        tokens[part] = counts.sum(axis=1, dtype=np.uint64)
        if race:
            answered[part] = shards.matrix(frame["finish_reason"] != PRUNED)[keep].sum(axis=1)

    # Polars leaves the interpreter free while it reads; beyond two threads per core nothing was gained.
    with ThreadPoolExecutor(threads or min(16, 2 * (os.cpu_count() or 1))) as pool:
        _check_one_scorer(score_files, list(pool.map(read_scores, score_files)), scorer)
        list(pool.map(read_tokens, completion_files))

    _over_answered(len(shards.items), answered, (mean, strict, lenient), error)
    term = pl.col("perturbation").list.first()
    return plan.slice(begin, first - begin).select(
        "request_id",
        seed=term.struct.field("seed"),
        sigma=term.struct.field("coefficient"),
        reward=pl.Series(mean),
        strict=pl.Series(strict),
        lenient=pl.Series(lenient),
        standard_error=pl.Series(error),
        items=pl.Series(answered),
        status=pl.when(pl.lit(pl.Series(answered < len(shards.items))))
        .then(pl.lit(PRUNED))
        .otherwise(pl.lit("complete")),
        tokens=pl.Series(tokens),
    )


def answers(
    requests: Path,
    scores: Sequence[Path],
    completions: Sequence[Path],
    run_id: str,
    stage: str,
    *,
    only: Collection[str] | None = None,
    items: Collection[str] | None = None,
    race: str | None = None,
) -> pl.DataFrame:
    """Scores and token counts of one stage, row by row, in the order of requests, then items.

    `only`: request ids; then just the files that hold them are read (a search's files are many).
    Columns: position (u32, 0-based row of the requests table: rank - 1 of a member, sample of a
    control), request_id, item_id, split, reward, strict, lenient, vote_key, completion_tokens.
    Raises UserError that names the file, or the rows that no file covers.
    """
    ids = tables.read(requests, tables.REQUESTS, ["request_id"], run_id=run_id)["request_id"]
    wanted = np.ones(len(ids), bool)
    if only is not None:
        if not only:
            raise ValueError("`only` names no request")
        wanted = ids.is_in(list(only)).to_numpy()
        absent = sorted(set(only) - set(ids.filter(pl.Series(wanted))))
        if absent:
            raise UserError(f"{requests} lacks the request {absent[0]} ({len(absent)} lacking in all).")
    score_files = cover(requests, scores, "scores", wanted)
    completion_files = cover(requests, completions, "completions", wanted)
    shards = _Shards.of(requests, ids, run_id, stage, score_files[0], items, race)

    def collect(paths: Sequence[Path], table: tables.Table, columns: Sequence[str]) -> pl.DataFrame:
        parts = []
        for path in paths:
            start, stop = shard_range(path)
            position = pl.Series("position", np.repeat(np.arange(start, stop), len(shards.items)), pl.UInt32)
            frame = shards.read(path, table, columns).with_columns(position)
            parts.append(frame.filter(pl.Series(np.repeat(wanted[start:stop], len(shards.items)))))
        return pl.concat(parts)

    scored = collect(score_files, tables.SCORES, [*_KEY, "reward", "strict", "lenient", "vote_key", *_SCORER])
    _scorer(score_files[0], scored)
    counted = collect(completion_files, tables.COMPLETIONS, [*_KEY, "completion_tokens"])
    return scored.with_columns(
        counted["completion_tokens"], split=pl.col("item_id").str.split("-").list.first()
    ).select(
        "position", *_KEY, "split", "reward", "strict", "lenient", "vote_key", "completion_tokens"
    )  # fmt: skip


def with_select(stage: pl.DataFrame, search: pl.DataFrame) -> pl.DataFrame:
    """A stage's answers plus what the search already knows of the same requests (its select items).

    Both are frames of `answers`; the result keeps the stage's positions. UserError when the search
    lacks one of the requests.
    """
    places = stage.select("position", "request_id").unique(maintain_order=True)
    seen = places.join(search.drop("position"), on="request_id", how="left", maintain_order="left")
    if seen["item_id"].null_count():
        absent = seen.filter(pl.col("item_id").is_null())["request_id"][0]
        raise UserError(f"the search has no scores of request {absent}: it is no candidate of this plan.")
    return pl.concat([seen.select(stage.columns), stage]).sort("position", "item_id")


@dataclass(frozen=True)
class _Shards:
    """What each file of one stage is held against."""

    requests: Path
    ids: pl.Series
    run_id: str
    stage: str
    items: pl.Series  # sorted
    origin: str  # where `items` comes from, for messages
    race: str | None

    @classmethod
    def of(
        cls,
        requests: Path,
        ids: pl.Series,
        run_id: str,
        stage: str,
        measure: Path,
        items: Collection[str] | None,
        race: str | None,
    ) -> "_Shards":
        if items is None:
            start, stop = shard_range(measure)
            expected: dict[str, str | int | None] = {"run_id": run_id, "stage": stage, "start": start, "stop": stop}
            expected["race"] = race
            found = tables.read(measure, tables.SCORES, ["item_id"], **expected)["item_id"]
            origin = str(measure)
        else:
            found, origin = pl.Series(list(items), dtype=pl.String), "the items table"
        return cls(requests, ids, run_id, stage, found.unique().sort().rename("item_id"), origin, race)

    def read(self, path: Path, table: tables.Table, columns: Sequence[str]) -> pl.DataFrame:
        """`columns` of a shard in the order of its requests, then items: exactly one row for each pair.

        Raises UserError naming `path` when a pair is missing, there twice, or foreign.
        """
        start, stop = shard_range(path)
        expected: dict[str, str | int | None] = {
            "run_id": self.run_id,
            "stage": self.stage,
            "start": start,
            "stop": stop,
            "race": self.race,
        }
        frame = tables.read(path, table, columns, **expected)
        if table is tables.SCORES:
            check_scored(path, frame)
        ids = self.ids.slice(start, stop - start)
        by_request, by_item = _places(len(ids), len(self.items))
        pairs = pl.DataFrame({"request_id": ids[by_request], "item_id": self.items[by_item]})
        if not all(frame[name].equals(pairs[name]) for name in _KEY):
            # another order of rows, which is no fault, or a wrong pair, which is
            frame = self._sorted(path, frame, ids, pairs)
        if "reward" in columns and not np.isfinite(frame["reward"].to_numpy()).all():
            bad = frame.filter(~pl.col("reward").is_finite()).row(0, named=True)
            raise UserError(
                f"{path} holds a reward of {bad['reward']} (request {bad['request_id']}, "
                f"item {bad['item_id']}); rewards must be finite. "
                "Mend the scorer, raise its version and score again."
            )
        return frame

    def matrix(self, column: pl.Series) -> np.ndarray:
        """(requests, items) view of a column of `read`."""
        return column.to_numpy().reshape(-1, len(self.items))

    def _sorted(self, path: Path, frame: pl.DataFrame, ids: pl.Series, pairs: pl.DataFrame) -> pl.DataFrame:
        start, stop = shard_range(path)
        mend = "Remove it and run again: only it and what follows is redone."
        foreign = frame.filter(~pl.col("request_id").is_in(ids.to_list()))
        if foreign.height:
            raise UserError(
                f"{path} holds request {foreign['request_id'][0]}, which is none of the rows "
                f"{start}-{stop - 1} of {self.requests}. {mend}"
            )
        strange = frame.filter(~pl.col("item_id").is_in(self.items.to_list()))
        if strange.height:
            raise UserError(f"{path} holds item {strange['item_id'][0]}, not one of {self.origin}. {mend}")
        repeated = frame.filter(pl.struct(_KEY).is_duplicated())
        if repeated.height:
            request, item = repeated.select(_KEY).row(0)
            raise UserError(f"{path} holds request {request}, item {item} more than once. {mend}")
        absent = pairs.join(frame, on=_KEY, how="anti", maintain_order="left")
        if absent.height:
            request, item = absent.row(0)
            raise UserError(
                f"{path} lacks request {request}, item {item} ({absent.height} of {pairs.height} rows are "
                f"missing, by the items of {self.origin}). {mend}"
            )
        return pairs.join(frame, on=_KEY, how="left", maintain_order="left")


@lru_cache(maxsize=8)  # all shards but the last have one shape
def _places(requests: int, items: int) -> tuple[pl.Series, pl.Series]:
    """Row numbers that repeat each request for all its items, and the items for each request."""
    by_request = np.repeat(np.arange(requests, dtype=np.uint32), items)
    by_item = np.tile(np.arange(items, dtype=np.uint32), requests)
    return pl.Series(by_request), pl.Series(by_item)


def _check_candidates(requests: Path, plan: pl.DataFrame) -> None:
    odd = plan.with_row_index("row").filter((pl.col("perturbation").list.len() != 1) | (pl.col("temperature") != 0))
    if odd.height:
        raise UserError(
            f"{requests}: row {odd['row'][0]} is no candidate (one seed and σ, greedy). "
            "Remove the file and run again to plan the search anew."
        )


def cover(requests: Path, paths: Sequence[Path], kind: str, wanted: np.ndarray) -> list[Path]:
    """The files of `paths` that hold a wanted row, in order of their rows; every wanted row is in exactly one.

    `wanted`: a bool for each row of the requests; `kind` is for messages. UserError that names two files which hold
    one row, a file that reaches past the requests, or the wanted rows that no file covers.
    """
    ranges = sorted((*shard_range(path), Path(path)) for path in paths)
    for (_, stop, path), (start, _, other) in pairwise(ranges):
        if start < stop:
            raise UserError(
                f"{path} and {other} both hold row {start} of {requests}. Keep the one that the run's shard size makes."
            )
    if ranges and ranges[-1][1] > len(wanted):
        raise UserError(
            f"{ranges[-1][2]} reaches past the {len(wanted)} rows of {requests}: it belongs to another plan."
        )
    covered = np.zeros(len(wanted), bool)
    for start, stop, _ in ranges:
        covered[start:stop] = True
    missing = np.flatnonzero(wanted & ~covered)
    if len(missing):
        runs = np.split(missing, np.flatnonzero(np.diff(missing) > 1) + 1)
        named = ", ".join(f"{run[0]:05d}-{run[-1]:05d}" for run in runs[:5])
        more = f" and {len(runs) - 5} more ranges" if len(runs) > 5 else ""
        raise UserError(f"no file of {kind} covers rows {named}{more} of {requests}; run the workflow again.")
    return [path for start, stop, path in ranges if wanted[start:stop].any()]


def _scorer(path: Path, frame: pl.DataFrame) -> tuple:
    """(scorer, version) of all rows: rewards of two scorers must not be ranked against each other."""
    found = tuple(frame[name][0] for name in _SCORER)
    if not all((frame[name] == value).all() for name, value in zip(_SCORER, found, strict=True)):
        mixed = frame.select(_SCORER).unique().sort(_SCORER).rows()
        raise UserError(f"{path} mixes the scorers {mixed}; remove the scores of this run and score again.")
    return found


def _check_one_scorer(paths: Sequence[Path], scorers: Sequence[tuple], expected: tuple | None) -> None:
    for path, scorer in zip(paths, scorers, strict=True):
        if expected is not None and scorer != expected:
            raise UserError(
                f"{path} was scored by {scorer}, but it stands for {expected}. "
                "Remove it and run again; completions are kept."
            )
        if scorer != scorers[0]:
            raise UserError(
                f"{path} was scored by {scorer}, but {paths[0]} by {scorers[0]}. "
                "Remove the older scores and run again; completions are kept."
            )


def _over_answered(items: int, answered: np.ndarray, means: Sequence[np.ndarray], error: np.ndarray) -> None:
    """From numbers over all items, in which those without an answer are 0, to numbers over the answered ones; in place.

    The first of `means` is that of the rewards, of which `error` is the standard error.
    Σ(r - r̄)² over all n items is (n - 1)·n·error²; without the zeros it is Σr² - (Σr)²/m over the m answered ones.
    """
    pruned = np.flatnonzero(answered < items)
    m = answered[pruned].astype(np.float64)
    known = np.maximum(m, 1)
    total = means[0][pruned] * items
    squares = np.square(error[pruned]) * items * (items - 1) + np.square(total) / items
    error[pruned] = np.sqrt(np.maximum(squares - np.square(total) / known, 0) / np.maximum(m - 1, 1) / known)
    for mean in means:
        mean[pruned] *= items / known


def _standard_error(values: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Standard error of each row's mean; `values` is (rows, n), ddof 1, 0 when n = 1."""
    n = values.shape[1]
    if n == 1:
        return np.zeros(len(values))
    return np.sqrt(np.square(values - mean[:, None]).sum(axis=1) / (n - 1)) / np.sqrt(n)
