"""Which candidates become experts: a total order, so that every machine picks the same ones."""

import polars as pl

from randopt.errors import UserError
from randopt.requests import Request, candidate


def rank(candidates: pl.DataFrame) -> pl.DataFrame:
    """The candidates, best first: mean reward descending, then seed, then σ ascending.

    Pruned candidates come last whatever their mean: it is over fewer items.
    """
    return candidates.sort(
        pl.col("status") != "complete", "reward", "seed", "sigma", descending=[False, True, False, False]
    )


def select_members(candidates: pl.DataFrame, k: int) -> list[Request]:
    """Requests of the best k candidates, rank 1 first.

    Raises UserError when fewer than k were scored in full, or a row's id is not that of its (seed, σ).
    """
    complete = candidates.filter(pl.col("status") == "complete").height
    if not 1 <= k <= complete:
        raise UserError(
            f"{k} members were asked for, but {complete} candidates were scored in full; lower top_k or raise N."
        )
    members = []
    for row in rank(candidates).head(k).iter_rows(named=True):
        member = candidate(row["seed"], row["sigma"])
        if member.request_id != row["request_id"]:
            raise UserError(
                f"candidate {row['request_id']} was altered: seed {row['seed']} with σ {row['sigma']} "
                f"hashes to {member.request_id}. Remove the candidates table and run again."
            )
        members.append(member)
    return members


def selection(candidates: pl.DataFrame, k: int, members: pl.DataFrame) -> pl.DataFrame:
    """SELECTION: the best k candidates with the score that chose them and the one that did not.

    `members`: rows of `gather.answers` of the members; confirm_score is their mean reward on the
    confirm items. UserError when a member has none.
    """
    confirm = (
        members.filter(pl.col("split") == "confirm")
        .group_by("request_id")
        # exact for rewards of 0 and 1; sorted so that no other reward depends on row order either
        .agg(pl.col("reward").sort_by("item_id").cast(pl.Float64).mean().alias("confirm_score"))
    )
    chosen = pl.DataFrame({"request_id": [member.request_id for member in select_members(candidates, k)]})
    frame = (
        chosen.with_row_index("rank", offset=1)
        .join(candidates, on="request_id", how="left", maintain_order="left")
        .join(confirm, on="request_id", how="left", maintain_order="left")
    )
    if frame["confirm_score"].null_count():
        absent = frame.filter(pl.col("confirm_score").is_null())["request_id"][0]
        raise UserError(f"member {absent} has no scores on the confirm items; run the workflow again.")
    return frame.select("rank", "request_id", "seed", "sigma", pl.col("reward").alias("select_score"), "confirm_score")
