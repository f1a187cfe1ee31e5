"""A search on a real SLURM with fake GPUs, to its end: what the driver costs, and whether GPUs wait for it.

    python benchmarks/slurm.py --candidates 5000 --shard 25

Starts a cluster of three nodes with four fake GPUs each (tests/slurm/cluster.py: as root, on Debian or Ubuntu), runs
`snakemake --profile slurm` of the tiny model up to the gathered candidates, and looks at the queue and at the driver
once a second. The nodes are this machine: the jobs' own speed says nothing, the shares do.

Keys: candidates, shards, gpus; wall_seconds of the driver; seconds_before_first_job; driver_rss_mb, the peak of the
driver's process; free_gpu_share, the GPU-seconds that were free while shards waited, over all GPU-seconds between the
first job's start and the last one's end; driver_cpu_share, its own CPU seconds over wall seconds; controller_cpu_share,
the same of slurmctld.
"""

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.conftest import build_tiny_model
from tests.slurm.cluster import GPUS, NODES, Cluster, kept, run, unavailable
from tests.slurm.conftest import Site

LOOK_SECONDS = 1.0
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Look:
    """One look at the cluster: seconds since the start, GPUs in use, shards not yet begun."""

    at: float
    busy: int
    waiting: int


def bench(candidates: int, shard: int, folder: Path) -> dict[str, float]:
    """Figures of one search in `folder`, which is on the login node of a cluster that is up."""
    site = Site(folder / "site", build_tiny_model(folder / "model"))
    site.config["search"].update(candidates=candidates, shard_size=shard)
    site.config["tasks"][0].update(splits={"select": 6, "confirm": 5, "test": 8}, max_tokens=4)
    site.write_config()
    shards = -(-candidates // shard)
    gathered = f"n{candidates:05d}/candidates.parquet"
    run_id = site.randopt("cost", "tiny.yaml").stdout.split("tiny/times_table/")[1].split()[0]
    target = f"results/tiny/times_table/{run_id}/{gathered}"

    looks: list[Look] = []
    peak, cpu = 0.0, 0.0
    controller_before = cpu_seconds(controller())
    started = time.monotonic()
    # without the last option, so that the profile's 30 s before the first look count, as for users
    with site.driver(site.slurm(target)[:-2]) as driver:
        while driver.poll() is None:
            with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
                peak, cpu = max(peak, peak_mb(driver.pid)), cpu_seconds(driver.pid)
                looks.append(look(time.monotonic() - started, site, shards))
            time.sleep(LOOK_SECONDS)
        wall = time.monotonic() - started
        if driver.returncode or not (site.folder / target).is_file():
            raise RuntimeError(site.said()[-5000:])
    working = [seen for seen in looks if seen.busy or seen.waiting < shards]
    first, last = working[0].at, max(seen.at for seen in working if seen.busy)
    free = total = 0.0
    for before, after in itertools.pairwise(looks):
        if first <= before.at <= last:
            seconds = after.at - before.at
            total += NODES * GPUS * seconds
            free += min(before.waiting, NODES * GPUS - before.busy) * seconds
    return {
        "candidates": candidates,
        "shards": shards,
        "gpus": NODES * GPUS,
        "wall_seconds": round(wall),
        "seconds_before_first_job": round(first, 1),
        "driver_rss_mb": round(peak),
        "free_gpu_share": round(free / total, 4),
        "driver_cpu_share": round(cpu / wall, 4),
        "controller_cpu_share": round((cpu_seconds(controller()) - controller_before) / wall, 4),
    }


def look(at: float, site: Site, shards: int) -> Look:
    """What the queue says now; a job that is being cleaned away still has its GPU."""
    jobs = run("squeue", "--noheader", "--states=all", "--format=%T|%Z").splitlines()
    states = [state for state, _, folder in (job.partition("|") for job in jobs) if folder == str(site.folder)]
    busy = sum(state in ("RUNNING", "COMPLETING", "CONFIGURING") for state in states)
    done = len(list(site.folder.glob("results/tiny/times_table/*/search/completions/*.parquet")))
    return Look(at, busy, max(0, shards - done - busy))


def controller() -> int:
    """The process of slurmctld."""
    return int(run("pgrep", "-o", "slurmctld"))


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def peak_mb(pid: int) -> float:
    """Peak resident memory of a process in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError(f"no peak of process {pid}")


def main() -> None:
    """Print the figures as JSON, or why there are none."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--candidates", type=int, default=5000)
    parser.add_argument("--shard", type=int, default=25)
    arguments = parser.parse_args()
    why = unavailable()
    if why:
        print(json.dumps({"not run": why}))
        return
    with tempfile.TemporaryDirectory(prefix="randopt-bench-") as folder, kept() as cluster:
        assert isinstance(cluster, Cluster)
        print(json.dumps(bench(arguments.candidates, arguments.shard, Path(folder))))


if __name__ == "__main__":
    main()
