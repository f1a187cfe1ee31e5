"""What keeps drivers from waiting for ever and from doubling each other, without a cluster."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from randopt.cluster import driver, lock
from randopt.cluster.plugin import PATIENCE, Corrections
from randopt.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from randopt.cluster import lock
lock.hold([Path(sys.argv[1])])
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other_driver(tmp_path):
    """A process that drives the run in tmp_path / "run"."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_driver_is_told_who_the_first_is(tmp_path, other_driver) -> None:
    with pytest.raises(UserError, match=f"another driver is at work.*process {other_driver.pid} on .*randopt cancel"):
        lock.hold([tmp_path / "run"])
    assert lock.holder(tmp_path / "run").pid == other_driver.pid


def test_the_lock_dies_with_its_holder(tmp_path, other_driver) -> None:
    other_driver.kill()
    other_driver.wait()
    assert lock.holder(tmp_path / "run") is None
    after = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert after.stdout.readline() == "held\n", "nothing has to be removed by hand"
    assert json.loads((tmp_path / "run" / lock.NAME).read_text())["pid"] == after.pid
    after.kill()
    after.wait()


def test_nobody_holds_what_was_never_started(tmp_path) -> None:
    assert lock.holder(tmp_path / "none") is None


def test_what_slurm_says_is_believed(tmp_path) -> None:
    corrections = Corrections()
    for states in ({"1": "PENDING"}, {"1": "RUNNING", "2": "PENDING"}, {"1": "COMPLETED", "2": "RUNNING"}):
        assert corrections.apply(states) == states
    for _ in range(2 * PATIENCE):
        assert corrections.apply({"2": "RUNNING"}) == {"2": "RUNNING"}, "1 has ended and was known to have"


def test_a_preempted_job_counts_as_failed_when_it_stays_so() -> None:
    corrections = Corrections()
    looks = [corrections.apply({"1": "PREEMPTED"})["1"] for _ in range(PATIENCE)]
    assert looks == ["PREEMPTED"] * (PATIENCE - 1) + ["CANCELLED"]
    corrections = Corrections()
    for _ in range(3):  # on its way to being requeued
        assert corrections.apply({"1": "PREEMPTED"}) == {"1": "PREEMPTED"}
        assert corrections.apply({"1": "PENDING"}) == {"1": "PENDING"}


def test_a_job_that_is_no_longer_listed_counts_as_failed() -> None:
    corrections = Corrections()
    corrections.apply({"1": "RUNNING"})
    looks = [corrections.apply({}) for _ in range(PATIENCE)]
    assert looks == [{}] * (PATIENCE - 1) + [{"1": "FAILED"}]
    corrections.apply({"2": "RUNNING"})
    assert corrections.apply({}) == {"1": "FAILED"}
    assert corrections.apply({"1": "RUNNING", "2": "RUNNING"})["1"] == "RUNNING", "a controller that was away"


def test_the_driver_takes_the_profile_and_config_unless_others_are_given() -> None:
    config = Path("config/mine.yaml")
    assert driver.snakemake_command(config, [])[1:] == [
        *("-m", "snakemake", "--profile", "slurm"),
        *("--configfile", "config/mine.yaml"),
    ]
    given = ["--executor", "slurm", "--configfile", "b.yaml"]
    assert driver.snakemake_command(config, given)[3:] == given
    assert "--profile" not in driver.snakemake_command(config, ["--cores", "2"])
