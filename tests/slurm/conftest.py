"""A cluster for each module, and an undisturbed run to compare with."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import Checkout
from tests.slurm.cluster import Cluster, kept, run, unavailable, wait_for
from tests.workflow.tools import leftovers

SHARDS, SHARD = 4, 240  # a shard lasts some seconds after its first request: time for a fault to hit it
PATIENCE = 300  # seconds within which anything on the cluster must have happened


class Site(Checkout):
    """A checkout on the login node of the cluster, with a search of four shards that last some seconds each."""

    def __init__(self, folder: Path, model: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder, model)
        self.config["search"].update(candidates=SHARDS * SHARD, shard_size=SHARD)
        self.config["tasks"][0].update(splits={"select": 12, "confirm": 6, "test": 6}, max_tokens=12)
        self.config["tasks"][0]["source"] = {"low": 1, "high": 10, "smaller_high": 10}
        self.write_config()
        self.environment_extra: dict[str, str] = {}

    def slurm(self, *arguments: str, partition: str = "gpu", runtime: int = 30) -> list[str]:
        """The command of a user, with what is small about this machine: one core and little memory for each job."""
        return [
            *(sys.executable, "-m", "snakemake", *arguments, "--profile", "slurm", "--configfile", "tiny.yaml"),
            *("--set-resources", "generate:mem_mb=1000", f"generate:slurm_partition={partition}"),
            *(f"generate:runtime={runtime}", "generate:disk_wait=120", "--set-threads", "generate=1"),
            # the profile's 30 s is right for shards that last half an hour
            *("--slurm-init-seconds-before-status-checks", "2"),
        ]

    @contextmanager
    def driver(self, command: list[str], log: str = "driver.log") -> Iterator[subprocess.Popen]:
        """A driver in the background, in a session of its own; killed at the end if it is still there."""
        with open(self.folder / log, "w") as stream:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=60)

    def said(self, log: str = "driver.log") -> str:
        """What a driver has said so far."""
        return (self.folder / log).read_text()

    def completions(self, shard: int) -> Path:
        """The search completions of the shard with this number."""
        first = shard * SHARD
        (folder,) = self.folder.glob("results/tiny/times_table/*")
        return folder / f"search/completions/{first:05d}-{first + SHARD - 1:05d}.parquet"

    def parts(self, shard: int) -> dict[str, tuple[int, int]]:
        """Finished requests of an unfinished shard: name -> inode and time of the part."""
        with suppress(ValueError):
            folder = self.completions(shard).with_suffix(".parts")
            return {
                path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
                for path in folder.glob("[!.]*.parquet")
                if path.exists()
            }
        return {}

    def job(self, shard: int, states: str = "RUNNING") -> str:
        """Id of the job of a search shard in one of these states, or an empty string."""
        name = f"_search_{shard * SHARD:05d}-"
        for line in run("squeue", "--noheader", f"--states={states}", "--format=%i|%k|%Z").splitlines():
            job, comment, folder = line.split("|")
            if name in comment and Path(folder) == self.folder:
                return job
        return ""

    def generated(self, shard: int) -> list[int]:
        """How many requests each job of a shard set out to generate, from SLURM's log of it (of its last start)."""
        logs = self.folder.glob(f"logs/slurm/rule_generate/*_search_{shard * SHARD:05d}-*/*.log")
        return [
            int(line.split(": ")[1].split(" of ")[0])
            for log in sorted(logs, key=lambda path: int(path.stem))
            for line in log.read_text().splitlines()
            if line.endswith("requests are to be generated")
        ]

    def search_tables(self) -> dict[str, bytes]:
        """Every table of the search but the ledgers."""
        return {name: content for name, content in self.tables().items() if "/search/" in name}

    def wait(self, what: str, condition: Callable[[], object], process: subprocess.Popen | None = None) -> None:
        """Until `condition()`; what the driver said is shown when it ends before or nothing happens."""

        def holds() -> object:
            if condition():
                return True
            assert process is None or process.poll() is None, f"{what}: the driver ended before\n{self.said()}"
            return False

        try:
            wait_for(what, holds, PATIENCE)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{run('squeue', '--states=all')}\n{self.said()}") from None

    def finish(self, process: subprocess.Popen, undisturbed: "Site", log: str = "driver.log") -> str:
        """The driver ends well, in the tables of an undisturbed run, and leaves nothing behind."""
        assert process.wait(timeout=PATIENCE) == 0, self.said(log)
        assert self.search_tables() == undisturbed.search_tables()
        assert leftovers(self) == []
        return self.said(log)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A SLURM of three nodes with four GPUs each."""
    why = unavailable()
    if why:
        pytest.skip(why)
    with kept() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def undisturbed_site(tmp_path_factory, tiny_model) -> Site:
    """The same search on one machine, undisturbed."""
    site = Site(tmp_path_factory.mktemp("undisturbed-site"), tiny_model)
    site.snakemake("--set-threads", "generate=1", "--", "scores")
    return site


@pytest.fixture
def site(tmp_path, tiny_model) -> Site:
    """A fresh checkout on the login node."""
    return Site(tmp_path / "site", tiny_model)
