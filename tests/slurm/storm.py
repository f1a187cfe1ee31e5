"""A night of faults at random: workers, jobs, nodes and drivers die while a search of forty shards runs.

    python -m tests.slurm.storm --rounds 10 --seed 1

brings the test cluster up and prints a line for each round. Whoever started the search types the same command again
whenever the driver is gone, and does nothing else. A round holds when the tables are those of an undisturbed run, byte
for byte, and no finished request was generated again: a part, once seen, stays the same file until it is merged, and a
shard whose output was there generates nothing any more.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

from tests.conftest import build_tiny_model
from tests.slurm.cluster import Cluster, environment_of, kept, processes, run, unavailable
from tests.slurm.conftest import Site
from tests.workflow.tools import leftovers

SHARD = 12
ROUND_SECONDS = 1500.0  # a round that takes longer counts as a hang
CALM_SECONDS = (1.0, 6.0)  # between two faults


class Watch:
    """Every part and output that was ever seen, and what was generated again."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.parts: dict[Path, tuple[int, int]] = {}  # until their shard's output is there: it may be taken over later
        self.attempts: dict[Path, int] = {}  # output -> starts of its shard before it was first seen
        self.again: list[str] = []

    def look(self) -> None:
        """Compare what lies there now with what was seen before."""
        for folder in self.site.folder.glob("results/tiny/*/*/search/completions"):
            for output in folder.glob("[!.]*.parquet"):
                self.attempts.setdefault(output, len(self.starts(output)))
            for part in folder.glob("*.parts/[!.]*.parquet"):
                with suppress(FileNotFoundError):
                    status = part.stat()
                    stamp = status.st_ino, status.st_mtime_ns
                    there = part.parent.with_suffix(".parquet") in self.attempts
                    if not there and self.parts.setdefault(part, stamp) != stamp:
                        self.again.append(str(part.relative_to(self.site.folder)))

    def starts(self, output: Path) -> list[int]:
        """How many requests each start of a shard set out to generate."""
        run = output.parents[2].relative_to(self.site.folder / "results")
        log = self.site.folder / "logs/generate" / run / "search" / f"{output.stem}.log"
        lines = log.read_text().replace("\r", "\n").splitlines() if log.exists() else []
        ends = "requests are to be generated"
        return [int(line.split(": ")[-1].split(" of ")[0]) for line in lines if line.endswith(ends)]

    def finish(self) -> None:
        """What was done twice: after its output was there a shard generates nothing, and never more than before."""
        self.look()
        for output, before in self.attempts.items():
            starts = self.starts(output)
            if any(starts[before:]) or starts != sorted(starts, reverse=True):
                self.again.append(f"{output.name}: {starts}, there after {before}")


def workers(site: Site) -> list[int]:
    """The processes of `randopt generate` that work on this site."""
    found = []
    for process in processes():
        environment = environment_of(process.pid)
        if " generate results/" in process.name and "python" in process.name and environment.get("SLURM_JOB_ID"):
            with suppress(OSError):
                if Path(os.readlink(f"/proc/{process.pid}/cwd")) == site.folder:
                    found.append(process.pid)
    return found


def storm(cluster: Cluster, site: Site, undisturbed: Site, faults: int, chance: random.Random) -> Counter[str]:
    """One round; how often each fault struck. AssertionError when anything is lost, doubled or hangs."""
    watch, struck, starts = Watch(site), Counter(), 0
    end = time.monotonic() + ROUND_SECONDS
    down: dict[str, float] = {}  # node -> when it comes back

    def kill_worker() -> bool:
        found = workers(site)
        with suppress(ProcessLookupError):
            os.kill(chance.choice(found), signal.SIGKILL) if found else None
        return bool(found)

    def cancel_job() -> bool:
        found = run("squeue", "--noheader", "--format=%i").split()
        if found:
            run("scancel", chance.choice(found))
        return bool(found)

    def crash_node() -> bool:
        up = [node for node in cluster.nodes() if node not in down]
        if len(up) < 2:
            return False
        node = chance.choice(up)
        cluster.crash_node(node)
        # sometimes back before SLURM has noticed, sometimes long after
        down[node] = time.monotonic() + chance.uniform(1.0, 25.0)
        return True

    def restart_controller() -> bool:
        cluster.kill_controller()
        time.sleep(chance.uniform(0.0, 5.0))
        cluster.start_controller()
        return True

    def kill_driver() -> bool:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait(timeout=60)
        return True

    def resume_nodes() -> None:
        """What an administrator does: a controller that was killed may find jobs twice, and closes their nodes."""
        with suppress(subprocess.SubprocessError):  # no controller just now
            for line in set(run("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()):
                node, state = line.split()
                if state.startswith("drain"):
                    run("scontrol", "update", f"NodeName={node}", "State=RESUME")
                    struck["nodes resumed"] += 1

    kinds = [kill_worker, cancel_job, crash_node, restart_controller, kill_driver]
    next_fault = next_resume = 0.0
    left = faults
    while True:
        starts += 1
        log = f"driver-{starts}.log"
        with site.driver(site.slurm("scores"), log) as driver:
            while driver.poll() is None:
                assert time.monotonic() < end, (
                    f"hangs\n{run('squeue', '--states=all')}\n{site.said(f'driver-{starts}.log')}"
                )
                watch.look()
                for node, back in list(down.items()):
                    if time.monotonic() > back:
                        cluster.start_node(node)
                        del down[node]
                if time.monotonic() > next_resume:
                    resume_nodes()
                    next_resume = time.monotonic() + 10
                if time.monotonic() > next_fault and left and watch.parts:
                    fault = chance.choice(kinds)
                    if fault():
                        struck[fault.__name__] += 1
                        left -= 1
                    next_fault = time.monotonic() + chance.uniform(*CALM_SECONDS)
                time.sleep(0.1)
        assert "Traceback" not in site.said(log), site.said(log)
        if driver.returncode == 0:
            break
        time.sleep(1.0)
    for node in down:
        cluster.start_node(node)
    watch.finish()
    assert not watch.again, f"generated again: {watch.again[:10]}"
    assert site.search_tables() == undisturbed.search_tables(), "the tables are not those of an undisturbed run"
    assert leftovers(site) == []
    struck["starts"] = starts
    return struck


def make_site(folder: Path, model: Path, shards: int) -> Site:
    """A checkout with a search of small shards."""
    site = Site(folder, model)
    site.config["search"].update(candidates=shards * SHARD, shard_size=SHARD)
    site.write_config()
    return site


def main() -> None:
    """Rounds of faults, a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--faults", type=int, default=25, help="faults in each round")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    why = unavailable()
    if why:
        sys.exit(why)
    failed = 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="randopt-storm-")))
        cluster = stack.enter_context(kept())
        model = build_tiny_model(folder / "model")
        undisturbed = make_site(folder / "undisturbed", model, arguments.shards)
        undisturbed.snakemake("--set-threads", "generate=1", "--", "scores")
        for number in range(arguments.rounds):
            seed = arguments.seed + number
            print(f"round {number + 1}, seed {seed}: ", end="", flush=True)
            site, begun = make_site(folder / f"round-{number}", model, arguments.shards), time.monotonic()
            try:
                struck = storm(cluster, site, undisturbed, arguments.faults, random.Random(seed))
                print(f"- holds after {time.monotonic() - begun:.0f} s: {dict(struck)}", flush=True)
            except (AssertionError, subprocess.SubprocessError, TimeoutError) as error:
                failed += 1
                print(f"- FAILS after {time.monotonic() - begun:.0f} s: {error}", flush=True)
                run("scancel", "--user=root")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
