"""What `snakemake -n` promises: the true bill, the same everywhere, for a laptop and for a cluster."""

import re
import subprocess
import sys

import pytest

from tests.conftest import Checkout
from tests.workflow.tools import jobs


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, tiny_model) -> Checkout:
    """A checkout in which nothing ever runs: every test here is a dry run."""
    return Checkout(tmp_path_factory.mktemp("dry"), tiny_model)


def dry_run(checkout: Checkout, *arguments: str, python: tuple[str, ...] = ()) -> str:
    """Output of `snakemake ARGUMENTS -n --configfile tiny.yaml`, without --cores, as a user types it."""
    checkout.write_config()
    done = subprocess.run(
        [sys.executable, *python, "-m", "snakemake", *arguments, "-n", "--configfile", "tiny.yaml"],
        cwd=checkout.folder,
        env=checkout.environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert "Traceback" not in text
    return text


def job_list(text: str, checkout: Checkout) -> list[str]:
    """What is said of each job and of the run, without dates and the checkout's place.

    Sorted, as are reasons and resources: Snakemake keeps all of these in sets.
    """
    body = text.partition("Building DAG of jobs...")[2].replace(str(checkout.folder), "HERE")
    lines = [line for line in body.splitlines() if not re.match(r"\[\w{3} \w{3} ", line)]
    unordered = re.compile(" +(reason|resources): ")
    lines = [" ".join(sorted(re.split("[ ,;]+", line))) if unordered.match(line) else line for line in lines]
    return sorted(re.split(r"\n(?=\S)", "\n".join(lines)))


def blocks(text: str, rule: str) -> list[str]:
    """What is printed of each job of a rule."""
    return re.findall(rf"^(?:local)?rule {rule}:\n((?: +.*\n)+)", text, flags=re.M)


def test_the_plan_is_the_same_again_and_in_another_clone(untouched, tmp_path, tiny_model) -> None:
    first = job_list(dry_run(untouched, "--cores", "2"), untouched)
    assert sum(line.startswith("rule generate:") for line in first) == 7
    assert sum(line.startswith("rule score:") or line.startswith("localrule score:") for line in first) == 7
    assert job_list(dry_run(untouched, "--cores", "2"), untouched) == first
    clone = Checkout(tmp_path, tiny_model)
    assert job_list(dry_run(clone, "--cores", "2"), clone) == first
    assert not (untouched.folder / "results").exists(), "a dry run writes nothing"


@pytest.mark.parametrize("profile", [("--profile", "slurm"), ("--workflow-profile", "profiles/slurm")])
def test_the_cluster_profile_asks_for_one_gpu_memory_and_time(untouched, profile) -> None:
    text = dry_run(untouched, *profile)
    generate = blocks(text, "generate")
    assert len(generate) == 7
    for block in generate:
        (resources,) = re.findall(r"resources: (.*)", block)
        asked = dict(pair.split("=", 1) for pair in resources.split(", "))
        assert asked["gpu"] == "1"
        assert int(asked["mem_mb"]) >= 6000
        assert int(asked["runtime"]) >= 15
    assert not any("gpu" in block for block in blocks(text, "score")), "only generate needs an accelerator"
    assert re.search(r"^generate +7$", text, flags=re.M)


def test_several_workers_in_a_job_ask_for_as_much_memory_each(untouched) -> None:
    def asked(*arguments: str) -> list[dict[str, str]]:
        text = dry_run(untouched, "--profile", "slurm", *arguments)
        found = [re.findall(r"resources: (.*)", block)[0] for block in blocks(text, "generate")]
        return [dict(pair.split("=", 1) for pair in resources.split(", ")) for resources in found]

    one, four = asked(), asked("--set-resources", "generate:workers_per_job=4", "generate:gpu=4", "generate:nodes=1")
    assert {(each["gpu"], each["workers_per_job"]) for each in one} == {("1", "1")}
    assert {(each["gpu"], each["workers_per_job"]) for each in four} == {("4", "4")}
    assert [int(each["mem_mb"]) for each in four] == [4 * int(each["mem_mb"]) for each in one]


def test_five_thousand_candidates_are_planned_whole(tmp_path, tiny_model) -> None:
    checkout = Checkout(tmp_path, tiny_model)
    checkout.config["search"].update(candidates=5000, shard_size=64)
    checkout.config["ensemble"] = {"top_k": [1, 10, 50]}
    text = dry_run(checkout, "--cores", "2", "--quiet", "host")
    # A shard has 64 × 6 generations. Search: 5000 / 64; 52 controls on 19 items, 20 a shard;
    # 50 random candidates and 50 members on 11 items, 34 a shard.
    jobs = 79 + 3 + 2 + 2
    assert re.search(rf"^generate +{jobs}$", text, flags=re.M)
    assert re.search(rf"^score +{jobs}$", text, flags=re.M)
    last = "search/completions/04992-04999.parquet"
    assert sum(last in block.partition("log:")[0] for block in blocks(text, "generate")) == 1


@pytest.mark.parametrize(("candidates", "gathers"), [(64_000, 0), (100_000, 2)])
def test_more_than_a_thousand_shards_are_gathered_in_blocks(tmp_path, tiny_model, candidates, gathers) -> None:
    checkout = Checkout(tmp_path, tiny_model)
    checkout.config["search"].update(candidates=candidates, shard_size=64)
    text = dry_run(checkout, "--cores", "2", "--quiet", "host", "reason")
    counts = jobs(text)
    assert (counts["gather"], counts.get("gather_block", 0)) == (1, gathers)


def test_parsing_the_snakefile_imports_nothing_heavy(untouched) -> None:
    """Every cluster job parses it again."""
    text = dry_run(untouched, "--cores", "2", python=("-X", "importtime"))
    imported = set(re.findall(r"^import time: +\d+ \| +\d+ \| +(\S+)$", text, flags=re.M))
    assert {"randopt.config", "randopt.experiment"} <= imported
    heavy = {"torch", "polars", "transformers", "numba", "datasets", "safetensors", "matplotlib"}
    assert not {name for name in imported if name.partition(".")[0] in heavy}


def test_lint_has_no_complaint(untouched) -> None:
    done = untouched.snakemake("--lint", check=False)
    assert done.returncode == 0 and "Congratulations" in done.stdout + done.stderr
