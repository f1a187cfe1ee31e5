"""`snakemake --profile slurm` as a user types it after editing two lines, on a cluster with accounts."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, kept, run, unavailable
from tests.slurm.conftest import Site


@pytest.fixture(scope="module")
def accounts() -> Iterator[Cluster]:
    """A cluster on which nobody runs anything without an account."""
    why = unavailable(accounting=True)
    if why:
        pytest.skip(why)
    with kept(accounting=True) as cluster:
        yield cluster


def test_two_lines_are_edited_and_everything_runs(accounts, tmp_path, tiny_model) -> None:
    site = Site(tmp_path / "site", tiny_model)
    site.config["search"].update(candidates=8, shard_size=4)
    site.write_config()
    profile = site.folder / "profiles/slurm/config.yaml"
    text = profile.read_text()
    for line, edited in (("slurm_account: my_account", "labacct"), ("slurm_partition: gpu", "gpu")):
        assert text.count(f"# {line}\n") == 1
        text = text.replace(f"# {line}\n", f"{line.partition(':')[0]}: {edited}\n")
    profile.write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--profile", "slurm", "--configfile", "tiny.yaml"],
        cwd=site.folder,
        env=site.environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "self-consistency" in said, "the table is shown at the end"
    assert (site.folder / "results/experiments/tiny/report.md").is_file()
    jobs = run(
        "sacct", "--noheader", "--allocations", "--parsable2", "--format=JobName,Account,Partition,State,AllocTRES"
    )
    rows = [line.split("|") for line in jobs.splitlines()]
    assert len(rows) == 7, "two shards of the search, three of controls, one each of random and members"
    for name, account, partition, state, resources in rows:
        assert name.startswith("randopt") and (account, partition, state) == ("labacct", "gpu", "COMPLETED")
        assert "gres/gpu=1" in resources
