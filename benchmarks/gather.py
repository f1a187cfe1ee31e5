"""How long, and in how much memory, a large search's shards become a ranked candidates table.

    PYTHONPATH=workflow python benchmarks/gather.py --candidates 20000 --items 200 --shard 64

Writes synthetic scores and completions into a temporary folder, then runs gather and select in a
fresh process, whose wall seconds and peak resident memory are reported. The files were just
written, so they come from the page cache: on a cold network file system, opening them comes on top.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import polars as pl

from randopt import tables
from randopt.errors import UserError
from randopt.gather import gather
from randopt.requests import candidate
from randopt.select import select_members

RUN_ID = "0123456789"
SIGMAS = (5e-4, 1e-3, 2e-3)
MEMBERS = 50
GIB = 2**30


def bench(
    candidates: int = 1_000_000, items: int = 200, shard: int = 64, folder: Path | None = None
) -> dict[str, float]:
    """Figures of one run; `folder` is where the temporary files go. UserError when the disk is too small.

    Keys: candidates, items, rows, files, disk_gib, write_seconds, gather_seconds, select_seconds,
    process_seconds (the fresh process, imports included), peak_rss_gib.
    """
    with tempfile.TemporaryDirectory(prefix="randopt-gather-", dir=folder) as temporary:
        root = Path(temporary)
        shape = [str(candidates), str(items), str(shard)]
        # Both steps are processes of their own: a child inherits its parent's peak in getrusage.
        started = time.perf_counter()
        _child("write", root, shape)
        write_seconds = time.perf_counter() - started
        used = sum(path.stat().st_size for path in root.rglob("*.parquet"))
        started = time.perf_counter()
        measured = json.loads(_child("measure", root, shape))
        return {
            "candidates": candidates,
            "items": items,
            "rows": candidates * items,
            "files": 2 * -(-candidates // shard),
            "disk_gib": round(used / GIB, 3),
            "write_seconds": round(write_seconds, 1),
            "process_seconds": round(time.perf_counter() - started, 2),
            **measured,
        }


def write(root: Path, candidates: int, items: int, shard: int) -> None:
    """The search folder of a run: requests, and one file of scores and of completions per shard."""
    seeds = np.arange(candidates, dtype=np.uint64)
    sigmas = np.array(SIGMAS)[np.arange(candidates) % len(SIGMAS)]
    plan = pl.DataFrame(
        {
            "request_id": [candidate(s, c).request_id for s, c in zip(seeds.tolist(), sigmas, strict=True)],
            "seed": seeds,
            "coefficient": sigmas,
        }
    ).select(
        "request_id",
        perturbation=pl.struct("seed", "coefficient").implode().over("request_id", mapping_strategy="join"),
        temperature=pl.lit(0.0),
        sample_seed=pl.lit(0, pl.UInt64),
    )
    tables.write(plan, tables.REQUESTS, root / "requests.parquet", run_id=RUN_ID)
    for kind in ("scores", "completions"):
        (root / kind).mkdir()
    ranges = [(start, min(start + shard, candidates)) for start in range(0, candidates, shard)]
    size = _write_shard(root, plan["request_id"].head(ranges[0][1]).to_list(), items, 0)
    needed, free = size * len(ranges), shutil.disk_usage(root).free
    if needed > 0.9 * free:
        raise UserError(
            f"{needed / GIB:.1f} GiB are needed under {root}, {free / GIB:.1f} are free; "
            "ask for fewer candidates or name another --folder."
        )
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        jobs = [
            pool.submit(_write_shard, root, plan["request_id"].slice(start, stop - start).to_list(), items, start)
            for start, stop in ranges[1:]
        ]
        for job in jobs:
            job.result()


def _write_shard(root: Path, ids: list[str], items: int, start: int) -> int:
    """Bytes written. Plain Polars, not tables.write: 31,250 fsyncs would measure the disk."""
    generator = np.random.default_rng(start)
    rows, stop = len(ids) * items, start + len(ids)
    correct = generator.random(rows) < 0.5
    key = {
        "request_id": pl.Series(ids).gather(np.repeat(np.arange(len(ids)), items)),
        "item_id": pl.Series([f"select-{i:05d}" for i in range(items)]).gather(np.tile(np.arange(items), len(ids))),
    }
    answer = pl.Series(generator.integers(0, 1000, rows)).cast(pl.String)
    scores = pl.DataFrame(
        {
            **key,
            "reward": pl.Series(correct).cast(pl.Float32),
            "strict": correct & (generator.random(rows) < 0.9),
            "lenient": correct,
            "vote_key": answer,
        }
    ).with_columns(scorer=pl.lit("number"), scorer_version=pl.lit(1, pl.UInt32))
    completions = pl.DataFrame({**key, "text": "So the answer is " + answer}).with_columns(
        finish_reason=pl.lit("stop"),
        prompt_tokens=pl.lit(90, pl.UInt32),
        completion_tokens=pl.Series(generator.integers(5, 300, rows), dtype=pl.UInt32),
    )
    size = 0
    for table, frame in ((tables.SCORES, scores), (tables.COMPLETIONS, completions)):
        path = root / table.name / f"{start:05d}-{stop - 1:05d}.parquet"
        footer = {"table": table.name, "run_id": RUN_ID, "stage": "search", "start": start, "stop": stop}
        frame.select(list(table.schema)).write_parquet(
            path, statistics=False, metadata={tables.FOOTER_KEY: json.dumps(footer)}
        )
        size += path.stat().st_size
    return size


def measure(root: Path, candidates: int, items: int) -> dict[str, float]:
    """Gather, then select, in this process."""
    files = {kind: list((root / kind).iterdir()) for kind in ("scores", "completions")}
    started = time.perf_counter()
    frame = gather(root / "requests.parquet", files["scores"], files["completions"], RUN_ID, candidates)
    gathered = time.perf_counter()
    members = select_members(frame, min(MEMBERS, candidates))
    selected = time.perf_counter()
    assert frame.height == candidates and frame["items"].unique().to_list() == [items] and members
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return {
        "gather_seconds": round(gathered - started, 2),
        "select_seconds": round(selected - gathered, 2),
        "peak_rss_gib": round(peak / GIB, 3),
    }


def _child(step: str, root: Path, shape: list[str]) -> str:
    command = [sys.executable, __file__, "--step", step, "--root", str(root)]
    for name, value in zip(("--candidates", "--items", "--shard"), shape, strict=True):
        command += [name, value]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"the benchmark's step {step} failed with exit code {done.returncode}; see above.")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--shard", type=int, default=64, help="candidates per file")
    parser.add_argument("--folder", type=Path, help="where the temporary files go (default: the system's)")
    parser.add_argument("--step", choices=("write", "measure"), help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.step == "write":
            write(options.root, options.candidates, options.items, options.shard)
        elif options.step == "measure":
            print(json.dumps(measure(options.root, options.candidates, options.items)))
        else:
            print(json.dumps(bench(options.candidates, options.items, options.shard, options.folder), indent=2))
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
