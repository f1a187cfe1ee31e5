"""The workflow with engine vllm: a run of its own with the same texts in float32; raced, by several workers."""

import importlib.util
import json
import resource
import shutil
import sys
from pathlib import Path

import polars as pl
import pytest

from randopt import tables
from tests.conftest import Checkout, build_tiny_model
from tests.workflow.tools import WAIT, large_scorer, output_of, started, wait_until

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here: run make vllm"
)

PILOT, TOTAL = 16, 32


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Checkout:
    model = build_tiny_model(tmp_path_factory.mktemp("model") / "tiny", head_dim=32)
    checkout = Checkout(tmp_path_factory.mktemp("vllm"), model)
    large_scorer(checkout)
    checkout.config["models"][0]["dtype"] = "float32"
    checkout.config["search"].update(candidates=TOTAL, shard_size=TOTAL)
    checkout.config["tasks"][0].update(scorer="large", splits={"select": 12, "confirm": 4, "test": 4})
    return checkout


def searched(checkout: Checkout, *options: str) -> Path:
    """The folder of the run that the configuration as it is makes."""
    before = set(checkout.folder.glob("results/tiny/times_table/*"))
    checkout.snakemake("--until", "select", *options)
    (run,) = set(checkout.folder.glob("results/tiny/times_table/*")) - before
    return run


@pytest.fixture(scope="module")
def plain(checkout) -> Path:
    """The search with vLLM, every answer generated, by one worker."""
    checkout.config["engine"] = {"name": "vllm"}
    return searched(checkout)


def completions(run: Path) -> pl.DataFrame:
    return pl.read_parquet(run / "search" / "completions" / "*.parquet")


def ledger(run: Path) -> pl.DataFrame:
    return pl.read_parquet(run / "search" / "ledger" / "*.parquet").sort("start")


def test_a_search_with_vllm_is_a_run_of_its_own_with_the_same_texts(checkout, plain) -> None:
    checkout.config["engine"] = {"name": "transformers"}
    other = searched(checkout)
    assert completions(plain).equals(completions(other))
    for run, used in ((plain, True), (other, False)):
        row = ledger(run).row(0, named=True)
        assert row["device"] == "cpu"
        assert ("vllm" in "".join(json.loads(row["versions"]))) == used


def test_two_workers_race_to_the_same_experts(checkout, plain) -> None:
    checkout.config["engine"] = {"name": "vllm"}
    checkout.config["search"]["race"] = {"mode": "lossless", "pilot": PILOT}
    race = searched(checkout, "--set-resources", "generate:workers_per_job=2")
    experts = f"n{TOTAL:05}/members/requests.parquet"
    assert (race / experts).read_bytes() == (plain / experts).read_bytes()
    assert ledger(race)["workers"].to_list() == [2, 2], "the pilot and the round after it"
    candidates = tables.read(race / f"n{TOTAL:05}/candidates.parquet", tables.CANDIDATES)
    assert candidates.filter(pl.col("status") == "pruned").height > 2, "the test must prune"


def test_memory_that_runs_out_ends_the_shard_and_loses_nothing(checkout, plain) -> None:
    """A job whose limit leaves no room for vLLM's cache, between one that was killed and one with enough."""
    completions = plain / f"search/completions/00000-{TOTAL - 1:05}.parquet"
    whole = completions.read_bytes()
    for name in ("completions", "ledger"):
        shutil.rmtree(plain / "search" / name)
    folder, shard = str(plain.relative_to(checkout.folder)), completions.stem
    command = [sys.executable, "-m", "randopt.cli", "generate", folder, "search", shard, "--threads", "2"]

    def parts() -> set[str]:
        return {path.name for path in completions.with_suffix(".parts").glob("[!.]*.parquet")}

    with started(checkout, command) as process:
        wait_until(lambda: len(parts()) >= 4, process)
        status = Path(f"/proc/{process.pid}/status").read_text()
    kept = parts()
    (peak,) = (int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmPeak:"))

    with started(checkout, command) as process:
        resource.prlimit(process.pid, resource.RLIMIT_AS, (peak - (512 << 20), peak))
        assert process.wait(timeout=WAIT) == 2
    said = output_of(checkout)
    assert "error: vLLM failed while loading the model" in said and "memory" in said
    assert parts() == kept

    again = checkout.randopt(*command[3:])
    assert f"{TOTAL - len(kept)} of {TOTAL} requests are to be generated" in again.stderr
    assert again.returncode == 0, again.stderr
    assert completions.read_bytes() == whole
