"""A large search is gathered in blocks: what is gathered of a thousand shards is kept, whatever happens to the others.

A block's file is named after its rows, so another N shares all blocks but its last.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from randopt import layout, tables
from randopt.errors import UserError
from randopt.gather import cover, shard_range

_MEND = "Remove it and run again: only it and what follows is redone."


def footer(run_id: str, scorer: str, rows: layout.Shard, race: str | None = None) -> dict[str, str | int | None]:
    """What a block's file says of itself; `scorer` is the folder of its scores, as in scores/number-v1."""
    return {"run_id": run_id, "scores": scorer, "start": rows[0], "stop": rows[1], "race": race}


def join(
    requests: Path, paths: Sequence[Path], run_id: str, first: int, scorer: str, race: str | None = None
) -> pl.DataFrame:
    """CANDIDATES for rows 0 .. first-1, from the files of their blocks, as one gather would give them, bit for bit.

    Raises UserError that names the file when a block is missing, torn, foreign, there twice, of another N or not
    of these requests.
    """
    ids = tables.read(requests, tables.REQUESTS, ["request_id"], run_id=run_id)["request_id"]
    if not 1 <= first <= len(ids):
        raise UserError(f"{requests} holds {len(ids)} candidates; {first} were asked for.")
    frames = []
    for path in cover(requests, paths, "blocks", np.arange(len(ids)) < first):
        start, stop = shard_range(path)
        if stop > first:
            raise UserError(f"{path} reaches past the first {first} candidates: it is a block of another N.")
        frame = tables.read(path, tables.BLOCK, None, **footer(run_id, scorer, (start, stop), race))
        if not frame["request_id"].equals(ids.slice(start, stop - start)):
            raise UserError(f"{path} does not hold the rows {start}-{stop - 1} of {requests}, in their order. {_MEND}")
        frames.append(frame)
    return pl.concat(frames)
