"""A large search is gathered in blocks: what is gathered of a thousand shards is kept, whatever happens to the others.

A block's file is named after its rows, so another N shares all blocks but its last.
"""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from randopt import layout, tables
from randopt.errors import UserError

_MEND = "Remove it and run again: only it and what follows is redone."


def footer(run_id: str, scorer: str, rows: layout.Shard) -> dict[str, str | int]:
    """What a block's file says of itself; `scorer` is the folder of its scores, as in scores/number-v1."""
    return {"run_id": run_id, "scores": scorer, "start": rows[0], "stop": rows[1]}


def join(requests: Path, files: Sequence[tuple[layout.Shard, Path]], run_id: str, scorer: str) -> pl.DataFrame:
    """CANDIDATES of all rows of the blocks, as one gather would give them, bit for bit.

    `files`: the rows [start, stop) and the file of every block, contiguous and in order.
    Raises UserError that names the file when one is missing, torn, foreign or not of these requests.
    """
    ids = tables.read(requests, tables.REQUESTS, ["request_id"], run_id=run_id)["request_id"]
    frames = []
    for (start, stop), path in files:
        frame = tables.read(path, tables.CANDIDATES, None, **footer(run_id, scorer, (start, stop)))
        if not frame["request_id"].equals(ids.slice(start, stop - start)):
            raise UserError(
                f"{path} does not hold the requests {start}-{stop - 1} of {requests}, in their order. {_MEND}"
            )
        frames.append(frame)
    return pl.concat(frames, rechunk=True)
