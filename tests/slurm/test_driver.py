"""The driver as a job, from `randopt submit` to `randopt cancel`, and how a run ends that fails."""

import subprocess

import pytest

from tests.slurm.cluster import run
from tests.slurm.conftest import SHARD, SHARDS, Site
from tests.slurm.test_faults import node_of, occupy
from tests.workflow.test_dry_run import job_list


@pytest.fixture(autouse=True)
def empty_queue(cluster):
    """No job is left to the next test."""
    yield
    run("scancel", "--user=root")


def submit(site: Site, *options: str) -> subprocess.CompletedProcess[str]:
    """`randopt submit` with what is small about this machine."""
    return site.randopt("submit", "tiny.yaml", *options, "--memory-gb", "1", "--", *site.slurm("scores")[3:])


def state_of(job: str) -> str:
    """SLURM's state of a job."""
    return run("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}").strip()


def test_a_submitted_driver_survives_its_time_limit_and_its_node(cluster, site, undisturbed_site) -> None:
    others = occupy("gpu3") + occupy("gpu1", "gpu2", gpus=3)  # two shards at a time: time to hurt the driver
    done = submit(site, "--hours", "1", "--drain-minutes", "1")
    assert done.returncode == 0, done.stderr
    driver = done.stdout.split("as job ")[1].split(";")[0]
    site.wait("parts", lambda: sum(map(len, map(site.parts, range(SHARDS)))) > 5)

    again = submit(site)
    assert again.returncode == 2 and f"in the queue already, as job {driver}" in again.stderr
    status = site.randopt("status", "tiny", "--once", "--shards")
    assert f"SLURM job {driver}" in status.stdout and "logs/generate/tiny" in status.stdout
    shard = next(number for number in range(SHARDS) if site.job(number))
    assert f"job {site.job(shard)} RUNNING" in status.stdout and "queued" in status.stdout

    # held shards keep it from ending before; its drain cancels them, and its next start submits them anew
    for number in range(SHARDS):
        if site.job(number, "PENDING"):
            run("scontrol", "hold", site.job(number, "PENDING"))
    # a minute before the limit SLURM warns the driver; running shards are left to its next start
    run("scontrol", "update", f"JobId={driver}", "TimeLimit=2")
    site.wait("the drain", lambda: "the time limit is near" in driver_log(site))
    site.wait("the next start", lambda: driver_log(site).count("+ ") > 1 and state_of(driver) == "RUNNING")
    site.wait("its lock", lambda: f"SLURM job {driver}" in site.randopt("status", "tiny", "--once").stdout)

    run("scancel", *others)
    node = node_of(driver)
    cluster.crash_node(node)
    try:
        site.wait("the driver's third start", lambda: state_of(driver) == "RUNNING" and node_of(driver) != node)
        site.wait("its end", lambda: state_of(driver) == "COMPLETED")
    finally:
        cluster.start_node(node)
    assert site.search_tables() == undisturbed_site.search_tables()


def driver_log(site: Site) -> str:
    """All that the driver job has said; SLURM begins the log anew when it requeues the job."""
    return "".join(path.read_text() for path in site.folder.glob("results/experiments/tiny/driver/*_log.out"))


def test_cancel_ends_driver_and_jobs_and_loses_nothing(cluster, site, undisturbed_site) -> None:
    assert submit(site).returncode == 0
    site.wait("parts", lambda: all(len(site.parts(shard)) > 2 for shard in range(SHARDS)))
    done = site.randopt("cancel", "tiny")
    assert done.returncode == 0 and "cancelled the driver job" in done.stdout, done.stdout + done.stderr
    site.wait("an empty queue", lambda: not run("squeue", "--noheader"))
    parts = [len(site.parts(shard)) for shard in range(SHARDS)]
    assert "no driver is at work" in site.randopt("status", "tiny", "--once").stdout

    with site.driver(site.slurm("scores")) as driver:
        site.finish(driver, undisturbed_site)
    for shard in range(SHARDS):
        assert site.generated(shard)[-1] == SHARD - parts[shard]


def test_a_failed_run_ends_with_the_status(cluster, site) -> None:
    for node in cluster.nodes():
        cluster.break_node(node)
    try:
        done = subprocess.run(
            site.slurm("scores", "--retries", "0"),
            cwd=site.folder,
            env=site.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        for node in cluster.nodes():
            cluster.mend_node(node)
    said = done.stderr
    assert done.returncode != 0 and "Traceback" not in said
    end = said[said.rindex("Logs: this run") :]
    assert end.count("failed: search") == SHARDS and "FAILED" in end and "on gpu" in end
    assert "run the same command again" in end and len(end.splitlines()) < 40


def test_the_plan_is_the_same_inside_a_job_and_in_another_clone(cluster, site, tmp_path, tiny_model) -> None:
    command = [*site.slurm("scores"), "--dry-run"]

    def plan(place: Site) -> list[str]:
        done = subprocess.run(
            command, cwd=place.folder, env=place.environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return job_list(done.stdout + done.stderr, place)

    login = plan(site)
    assert sum(line.startswith("rule generate:") for line in login) == SHARDS
    assert plan(Site(tmp_path / "clone", tiny_model)) == login

    script = site.folder / "plan.sh"
    script.write_text("#!/bin/sh\nexec " + " ".join(command) + "\n")
    subprocess.run(
        ["sbatch", "--wait", "--mem=1000", "--output=plan.out", "--error=plan.err", str(script)],
        cwd=site.folder,
        env=site.environment,
        check=True,
        capture_output=True,
        timeout=300,
    )
    said = [(site.folder / name).read_text() for name in ("plan.out", "plan.err")]
    assert job_list("".join(said), site) == login
