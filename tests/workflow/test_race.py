"""A raced search beside the same search without a race: the same experts to the byte, fewer answers.

The tests of this module share one checkout and stand in the order of a working day.
"""

import shutil
import sys
from pathlib import Path

import polars as pl
import pytest
import yaml

from randopt import layout, tables
from randopt.experiment import load_run
from tests.conftest import Checkout
from tests.workflow.tools import jobs, large_scorer, leftovers, refused, said, started, wait_until

PILOT, TOTAL = 32, 128
LAST, RACED = 64, "00064-00127"  # the last round: its bound is that of the first 64
PREFIX = "n00128"


@pytest.fixture(scope="module")
def raced(tmp_path_factory, tiny_model) -> Checkout:
    """Finished twice: without a race, then with a lossless one."""
    checkout = Checkout(tmp_path_factory.mktemp("race"), tiny_model)
    large_scorer(checkout)
    checkout.config["search"].update(candidates=TOTAL, shard_size=TOTAL)
    checkout.config["tasks"][0].update(scorer="large", splits={"select": 12, "confirm": 4, "test": 4})
    checkout.snakemake("--until", "vote")
    plain = checkout.run
    checkout.config["search"]["race"] = {"mode": "lossless", "pilot": PILOT}
    counts = jobs(said(checkout.snakemake("--until", "select")))
    assert counts["race"] == 1 and counts["generate"] == 3, "the pilot and two rounds"
    assert counts["gather"] == 3, "each round's bound, and the candidates"
    _, race = runs(checkout)
    # a race does not touch the other stages; they are taken over to save the test's time
    for stage in ("controls-t0.7", "random", f"{PREFIX}/members"):
        for path in (path for path in (plain / stage).rglob("*") if path.is_file()):
            copy = race / stage / path.relative_to(plain / stage)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists():  # the experts that the race has selected
                shutil.copy2(path, copy)
    checkout.snakemake()
    return checkout


def folder(checkout: Checkout, name: str) -> Path:
    """The only run whose folder's name ends so."""
    (found,) = (path for path in checkout.folder.glob("results/tiny/times_table/*") if path.match(f"*{name}"))
    return found


def runs(checkout: Checkout) -> tuple[Path, Path]:
    """The folders without and with the lossless race."""
    return folder(checkout, "[0-9a-f]" * 10), folder(checkout, "-lossless-" + "[0-9a-f]" * 6)


def test_the_experts_are_those_of_the_exhaustive_search_to_the_byte(raced) -> None:
    plain, race = runs(raced)
    assert race.name.startswith(plain.name)
    for name in ("selection.parquet", "votes.parquet", "members/requests.parquet"):
        assert (race / PREFIX / name).read_bytes() == (plain / PREFIX / name).read_bytes()
    candidates = tables.read(race / PREFIX / "candidates.parquet", tables.CANDIDATES)
    assert candidates.filter(pl.col("status") == "pruned").height > 20, "the test must prune"


def test_what_was_left_out_is_marked_and_not_counted(raced) -> None:
    plain, race = (path / PREFIX / "candidates.parquet" for path in runs(raced))
    whole, some = tables.read(plain, tables.CANDIDATES), tables.read(race, tables.CANDIDATES)
    complete = some.filter(pl.col("status") == "complete")
    assert complete.equals(whole.filter(pl.col("request_id").is_in(complete["request_id"].to_list())))
    assert some.head(PILOT)["status"].unique().to_list() == ["complete"]

    folder = runs(raced)[1] / "search"
    answers = tables.read(folder / f"completions/{RACED}.parquet", tables.COMPLETIONS)
    scores = tables.read(folder / f"scores/large-v1/{RACED}.parquet", tables.SCORES)
    joined = answers.join(scores, on=["request_id", "item_id"])
    left_out = joined.filter(pl.col("finish_reason") == "pruned")
    assert set(left_out["text"]) == {""} and left_out["completion_tokens"].sum() == 0
    assert left_out["reward"].sum() == 0 and left_out["vote_key"].null_count() == left_out.height
    finished = joined.filter(pl.col("finish_reason") != "pruned").group_by("request_id", maintain_order=True)
    by_hand = finished.agg(pl.len(), pl.col("reward").cast(pl.Float64).mean(), error=pl.col("reward").std())
    found = some.tail(TOTAL - LAST)
    assert found["items"].to_list() == by_hand["len"].to_list()
    assert found["reward"].to_list() == pytest.approx(by_hand["reward"].to_list())
    errors = (by_hand["error"] / by_hand["len"].sqrt()).to_list()
    assert found["standard_error"].to_list() == pytest.approx(errors, rel=1e-4)


def test_people_are_told(raced) -> None:
    show, status = raced.randopt("show", "tiny").stdout, raced.randopt("status", "tiny", "--once").stdout
    report = (raced.folder / "results/experiments/tiny/report.md").read_text()
    assert "candidates pruned; the search answered" in report and "(lossless, pilot 32, keep 3)" in " ".join(
        show.split()
    )
    assert "-lossless-" in status and f"{TOTAL}/{TOTAL}" in status


def take_away_last_shard(raced: Checkout) -> tuple[Path, bytes, list[str]]:
    """Its file, what was in it, and the command that makes it again."""
    _, race = runs(raced)
    output = race / f"search/completions/{RACED}.parquet"
    before = output.read_bytes()
    for path in (output, layout.kept_file(output)):
        path.unlink()
    return output, before, ["generate", str(race.relative_to(raced.folder)), "search", RACED, "--threads", "1"]


def test_killed_in_the_middle_it_ends_in_the_same_bytes(raced) -> None:
    output, before, command = take_away_last_shard(raced)
    parts = layout.parts_folder(output)
    with started(raced, [sys.executable, "-m", "randopt.cli", *command]) as process:
        wait_until(lambda: len(list(parts.glob("[!.]*.parquet"))) >= 20, process)
        process.kill()
    kept = sorted(parts.glob("[!.]*.parquet"), key=lambda path: path.stat().st_mtime_ns)
    assert not output.exists()
    kept[3].unlink()  # lost in the middle
    again = raced.randopt(*command)
    assert again.returncode == 0, again.stderr
    assert f"{TOTAL - LAST - len(kept) + 1} of {TOTAL - LAST} requests are to be generated" in again.stderr
    assert output.read_bytes() == before
    assert leftovers(raced) == []


def test_several_workers_race_to_the_same_bytes(raced) -> None:
    output, before, command = take_away_last_shard(raced)
    done = raced.randopt(*command[:-1], "2", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == before


def test_files_of_another_race_are_refused(raced) -> None:
    _, race = runs(raced)
    other = race.with_name("other")
    shutil.copytree(race, other)
    description = load_run(other)
    description["race"]["keep"] += 1
    (other / "run.yaml").write_text(yaml.safe_dump(description))
    for name, *rest in (["race"], ["score", "search", RACED, "--scorer", "large"]):
        done = raced.randopt(name, str(other.relative_to(raced.folder)), *rest)
        refused(done, "does not belong here: its race is")
    shutil.rmtree(other)
