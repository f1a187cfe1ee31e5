"""Every fault that a night on a cluster brings, for real; each ends in the tables of an undisturbed run, byte for byte.

What was generated before a fault must not be generated again: finished parts keep inode and time, and each attempt's
log says how many requests it set out to generate.
"""

import os
import signal
import subprocess

import pytest

from randopt import layout
from tests.slurm.cluster import Cluster, run
from tests.slurm.conftest import SHARD, SHARDS, Site


def occupy(*nodes: str, gpus: int = 4) -> list[str]:
    """Jobs of somebody else that hold GPUs."""
    wanted = ["sbatch", "--parsable", f"--gpus-per-node={gpus}", "--mem=100", "--chdir=/tmp", "--output=/dev/null"]
    return [run(*wanted, f"--nodelist={node}", "--wrap=sleep 600").strip() for node in nodes]


def worker(job: str) -> int:
    """The process of `randopt generate` in a SLURM job."""
    for process in os.listdir("/proc"):
        try:
            with open(f"/proc/{process}/cmdline", "rb") as stream:
                command = stream.read().split(b"\0")
            with open(f"/proc/{process}/environ", "rb") as stream:
                environment = stream.read().split(b"\0")
        except (OSError, ValueError):
            continue
        if b"generate" in command and f"SLURM_JOB_ID={job}".encode() in environment:
            return int(process)
    return 0


def untouched(site: Site, shard: int, before: dict) -> bool:
    """Whether every part that was there is still the same file, or merged.

    A shard may have finished just before its fault; then Snakemake, itself about to end, removes the output, and what
    remains is under its second name.
    """
    after = site.parts(shard)
    completions = site.completions(shard)
    merged = completions.exists() or layout.kept_file(completions).exists()
    return merged or {name: after.get(name) for name in before} == before


@pytest.fixture(autouse=True)
def empty_queue(cluster: Cluster):
    """No job is left to the next test."""
    yield
    run("scancel", "--user=root")


def test_scancel_kill_time_limit_and_a_broken_node(cluster, site, undisturbed_site) -> None:
    others = occupy("gpu2", "gpu3")
    cluster.break_node("gpu1")
    with site.driver(site.slurm("scores")) as driver:
        try:
            site.wait("failures on the broken node", lambda: all(site.job(s, "FAILED") for s in range(SHARDS)), driver)
            site.wait("retries", lambda: all(site.job(s, "PENDING") for s in range(SHARDS)), driver)
            for shard in range(SHARDS):
                assert "ExcNodeList=gpu1\n" in run("scontrol", "show", "job", site.job(shard, "PENDING"))
        finally:
            cluster.mend_node("gpu1")
        run("scancel", *others)

        before = {}
        for shard in (1, 2, 3):
            site.wait(f"parts of shard {shard}", lambda shard=shard: len(site.parts(shard)) > 5, driver)
            before[shard] = site.parts(shard)
            if shard == 1:
                run("scancel", site.job(1))
            elif shard == 2:
                os.kill(worker(site.job(2)), signal.SIGKILL)
            else:  # the limit is over: SLURM ends the job at its next look
                run("scontrol", "update", f"JobId={site.job(3)}", "TimeLimit=1")
        for shard in (1, 2):
            site.wait(f"the end of shard {shard}", lambda shard=shard: not site.job(shard), driver)
            assert untouched(site, shard, before[shard])
        site.finish(driver, undisturbed_site)
    assert site.generated(0) == [SHARD]
    for shard in (1, 2):
        first, second = site.generated(shard)
        assert first == SHARD and second <= SHARD - len(before[shard])


def test_scancel_of_a_pending_shard(cluster, site, undisturbed_site) -> None:
    others = occupy(*cluster.nodes())
    with site.driver(site.slurm("scores")) as driver:
        site.wait("a pending shard", lambda: site.job(1, "PENDING"), driver)
        first = site.job(1, "PENDING")
        run("scancel", first)
        site.wait("another job for it", lambda: site.job(1, "PENDING") not in ("", first), driver)
        run("scancel", *others)
        site.finish(driver, undisturbed_site)
    assert site.generated(1) == [SHARD]


def test_preemption_by_requeueing(cluster, site, undisturbed_site) -> None:
    with site.driver(site.slurm("scores", partition="scavenge")) as driver:
        site.wait("parts", lambda: len(site.parts(0)) > 5, driver)
        before, job = site.parts(0), site.job(0)
        push_out(node_of(job))
        site.wait("the pre-emption", lambda: site.job(0, "PENDING,REQUEUED") == job, driver)
        assert untouched(site, 0, before)
        site.finish(driver, undisturbed_site)
    assert site.generated(0)[-1] <= SHARD - len(before)


def test_preemption_by_cancelling(cluster, site, undisturbed_site) -> None:
    """The plugin takes such a job for a running one; our correction of it must end the wait."""
    with site.driver(site.slurm("scores", partition="cancelled")) as driver:
        site.wait("parts", lambda: len(site.parts(0)) > 5, driver)
        before, job = site.parts(0), site.job(0)
        push_out(node_of(job))
        site.wait("the pre-emption", lambda: site.job(0, "PREEMPTED,CANCELLED") == job, driver)
        assert untouched(site, 0, before)
        said = site.finish(driver, undisturbed_site)
    assert f"SLURM job {job} (PREEMPTED) counts as failed" in said


def test_a_node_crash_and_a_controller_restart(cluster, site, undisturbed_site) -> None:
    with site.driver(site.slurm("scores")) as driver:
        site.wait("parts", lambda: len(site.parts(0)) > 5, driver)
        before, job = site.parts(0), site.job(0)
        node = node_of(job)
        cluster.kill_controller()
        cluster.crash_node(node)
        kept = untouched(site, 0, before)
        cluster.start_controller()
        try:
            assert kept
            site.wait("the requeued job elsewhere", lambda: site.job(0) == job and node_of(job) != node, driver)
            site.finish(driver, undisturbed_site)
        finally:
            cluster.start_node(node)
    assert site.generated(0)[-1] <= SHARD - len(before)


def test_a_killed_driver_and_two_at_once(cluster, site, undisturbed_site) -> None:
    others = occupy("gpu2", "gpu3") + occupy("gpu1", gpus=2)  # two GPUs are left for four shards
    with site.driver(site.slurm("scores")) as driver:
        site.wait("two running shards", lambda: len([s for s in range(SHARDS) if site.parts(s)]) == 2, driver)
        site.wait("two waiting", lambda: len([s for s in range(SHARDS) if site.job(s, "PENDING")]) == 2, driver)
        os.killpg(driver.pid, signal.SIGKILL)
    running = {shard: site.job(shard) for shard in range(SHARDS) if site.job(shard)}
    waiting = {shard: site.job(shard, "PENDING") for shard in set(range(SHARDS)) - set(running)}
    assert len(running) == 2

    with site.driver(site.slurm("scores"), "second.log") as driver:
        for shard, job in running.items():
            site.wait("a dependent job", lambda shard=shard: site.job(shard, "PENDING"))
            assert f"afterany:{job}" in run("scontrol", "show", "job", site.job(shard, "PENDING"))
        for shard, job in waiting.items():
            assert site.job(shard, "CANCELLED") == job

        third = subprocess.run(
            site.slurm("scores"), cwd=site.folder, env=site.environment, capture_output=True, text=True, timeout=120
        )
        said = third.stdout + third.stderr
        assert third.returncode != 0 and "another driver is at work" in said and f"process {driver.pid}" in said
        assert "submitted with SLURM jobid" not in said

        run("scancel", *others)
        site.finish(driver, undisturbed_site, "second.log")
    for shard in running:
        assert site.generated(shard) == [SHARD, 0], "the adopted job made all of it, the new one none"
    for shard in waiting:
        assert site.generated(shard) == [SHARD]


def test_a_full_and_a_read_only_results_folder_for_a_while(cluster, site, undisturbed_site) -> None:
    disk = site.folder / "results"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True, timeout=60)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        with site.driver(site.slurm("scores")) as driver:
            site.wait("parts", lambda: len(site.parts(0)) > 5, driver)
            filler = disk / "filler"
            with open(filler, "wb", buffering=0) as stream:
                try:
                    while True:
                        stream.write(bytes(4096))
                except OSError:
                    pass
            log = lambda: "".join(path.read_text() for path in site.folder.glob("logs/generate/**/*.log"))  # noqa: E731
            site.wait("a shard that waits", lambda: "waiting, at most" in log(), driver)
            # a second mount over the first: the driver's lock, open for writing, would forbid to change the first
            run("mount", "--bind", str(disk), str(disk))
            read_only = ["mount", "-o", "remount,bind,ro", str(disk)]  # refused while a file is being written
            site.wait("a read-only folder", lambda: run(*read_only) is not None, driver)
            site.wait("a shard that waits again", lambda: "Read-only file system" in log(), driver)
            run("umount", "-l", str(disk))
            filler.unlink()
            site.finish(driver, undisturbed_site)
            assert [site.generated(shard) for shard in range(SHARDS)] == [[SHARD]] * SHARDS
    finally:
        run("scancel", "--user=root")
        while disk.is_mount():
            run("umount", "-l", str(disk))


def push_out(node: str) -> None:
    """A job of higher priority takes a node for some seconds."""
    wanted = ["sbatch", "--partition=high", "--gpus-per-node=4", "--mem=100", "--chdir=/tmp", "--output=/dev/null"]
    run(*wanted, f"--nodelist={node}", "--wrap=sleep 5")


def node_of(job: str) -> str:
    """The node on which a job runs."""
    return run("squeue", "--noheader", f"--jobs={job}", "--format=%N").strip()
