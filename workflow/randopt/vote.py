"""Majority vote of an ensemble, for every size K in one pass over its members."""

from collections.abc import Sequence

import numpy as np
import polars as pl

from randopt.errors import UserError


def votes(answers: pl.DataFrame, top_k: Sequence[int], method: str) -> pl.DataFrame:
    """VOTES of the first K members, for each K, on every item.

    `answers`: one row per member and item with position (best first), item_id, split, vote_key,
    strict, lenient; every member has answered the same items.

    The commonest vote key wins; of equally common keys the one whose first supporter has the best
    position. Null abstains. Where all abstain there is no answer, which is wrong. The ensemble
    answers with the completion of the winner's first supporter: its verdicts are the vote's.

    Raises UserError when K exceeds the members, or a member misses an item or has one twice.
    """
    frame = (
        answers.select("position", "item_id", "split", "vote_key", "strict", "lenient")
        .with_columns(member=pl.col("position").rank("dense").cast(pl.Int32) - 1)
        .sort("item_id", "member")
        .with_columns(
            # A key is known by its first supporter: the smaller number has the better rank.
            first=pl.when(pl.col("vote_key").is_not_null())
            .then(pl.col("member").min().over("item_id", "vote_key"))
            .otherwise(-1)
        )
    )
    members = frame["member"].n_unique()
    items = frame.group_by("item_id", maintain_order=True).agg(pl.col("split").first(), n=pl.len())
    _check(frame, items, members, top_k)

    shape = (items.height, members)
    first = frame["first"].to_numpy().reshape(shape)
    verdicts = {name: frame[name].to_numpy().reshape(shape) for name in ("strict", "lenient")}
    rows = np.arange(items.height)
    tally = np.zeros(shape, np.int32)  # votes of the key whose first supporter is that column
    parts = {}
    for size in range(1, max(top_k) + 1):
        key = first[:, size - 1]
        valid = key >= 0
        tally[rows[valid], key[valid]] += 1
        if size not in top_k:
            continue
        winner = tally.argmax(axis=1)  # the first of equal counts: the best-ranked first supporter
        won = tally[rows, winner]
        others = tally.copy()
        others[rows, winner] = 0
        answered = won > 0
        parts[size] = items.select(
            pl.lit(method).alias("method"),
            pl.lit(size, pl.UInt32).alias("top_k"),
            "split",
            "item_id",
            frame["vote_key"][rows * members + winner],  # null when all abstain: then column 0 "wins"
            pl.Series("votes", won, pl.UInt32),
            pl.Series("valid_votes", tally.sum(axis=1), pl.UInt32),
            pl.Series("margin", won - others.max(axis=1), pl.Int64),
            *(pl.Series(name, answered & verdict[rows, winner]) for name, verdict in verdicts.items()),
        )
    return pl.concat(parts[size] for size in sorted(parts))


def _check(frame: pl.DataFrame, items: pl.DataFrame, members: int, top_k: Sequence[int]) -> None:
    if not top_k or min(top_k) < 1 or max(top_k) > members:
        raise UserError(f"top_k {list(top_k)} must lie between 1 and the {members} members.")
    doubled = frame.filter(pl.struct("item_id", "member").is_duplicated())
    if doubled.height:
        raise UserError(f"the member at position {doubled['position'][0]} has {doubled['item_id'][0]} twice.")
    short = items.filter(pl.col("n") != members)
    if short.height:
        raise UserError(f"{short['n'][0]} of the {members} members answered {short['item_id'][0]}; all must.")
