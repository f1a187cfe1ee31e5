"""A scorer with a paper twin, which then turns out to be wrong: rescored, compared and adopted without a GPU.

The tests of this module share one checkout and stand in the order of a working day.
"""

import shutil
from collections import Counter
from pathlib import Path

import polars as pl
import pytest

from randopt import tables
from tests.conftest import Checkout
from tests.workflow.tools import copy_of, jobs, refused, said

# The tiny model hardly ever knows a product. By this scorer its answers differ, and by its twin they differ otherwise.
SCORER = '''"""Large numbers are right; for the twin odd ones are, and at the vote those above 3."""

from randopt.tasks.scorers.number import score as by_number
from randopt.tasks.scorers.verdict import Verdict


def score(response, reference):
    key = by_number(response, reference).vote_key
    value = 0 if key is None else int(key)
    return Verdict(value / 25, value > BOUND, value > BOUND, key)


def paper(response, reference):
    key = by_number(response, reference).vote_key
    value = 0 if key is None else int(key)
    return Verdict(float(value % 2), value % 2 == 1, value > 3, key)


BOUND = 12
'''
SCORERS = "workflow/randopt/tasks/scorers"
STAGES = ("search", "controls-t0.7", "random", "n00016/members")


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def judged(tmp_path_factory, tiny_model, undisturbed) -> Checkout:
    """A finished run, given a scorer with a twin instead of its own: only its experts are generated anew."""
    checkout = copy_of(undisturbed, tmp_path_factory.mktemp("rescore"), tiny_model)
    shutil.rmtree(checkout.run / "n00016")
    folder = checkout.folder / SCORERS
    (folder / "large.py").write_text(SCORER)
    change(folder / "__init__.py", "    countdown,\n", "    countdown,\n    large,\n")
    twins = 'Scorer("large", 1, large.score),\n        Scorer("large_paper", 1, large.paper),\n        '
    change(folder / "__init__.py", 'Scorer("number",', twins + 'Scorer("number",')
    checkout.config["tasks"][0]["scorer"] = "large"
    counts = jobs(said(checkout.snakemake()))
    assert counts["score_large"] == 4 and "score" not in counts, "one job for both scorers"
    assert counts["generate"] == 1
    return checkout


def scores(checkout: Checkout, stage: str, scorer: str) -> pl.DataFrame:
    files = sorted((checkout.run / stage / "scores" / scorer).glob("*.parquet"))
    return tables.read_all(files, tables.SCORES)


def metric(checkout: Checkout, method: str, k: int, split: str, name: str) -> float:
    frame = tables.read(checkout.run / "n00016/metrics.parquet", tables.METRICS)
    return frame.filter(method=method, top_k=k, split=split, metric=name)["value"].item()


def test_both_verdicts_are_stored_and_reported(judged) -> None:
    for stage in STAGES:
        own, twin = scores(judged, stage, "large-v1"), scores(judged, stage, "large_paper-v1")
        assert own.select("request_id", "item_id").equals(twin.select("request_id", "item_id"))
        assert twin["scorer"].unique().to_list() == ["large_paper"]
        assert not own["reward"].equals(twin["reward"])
    test = pl.col("item_id").str.starts_with("test")
    members = scores(judged, "n00016/members", "large_paper-v1").filter(test)
    assert members.height == 3 * 8
    assert metric(judged, "member_mean", 3, "test", "paper") == pytest.approx(members["strict"].mean())
    right = []
    for _, item in members.group_by("item_id", maintain_order=True):
        counts = Counter(key for key in item["vote_key"] if key is not None)  # in rank order, so ties go to the best
        right.append(bool(counts) and int(counts.most_common(1)[0][0]) > 3)
    assert metric(judged, "randopt", 3, "test", "paper") == pytest.approx(sum(right) / 8)
    assert "paper %" in (judged.folder / "results/experiments/tiny/report.md").read_text()
    assert "paper %" in judged.randopt("show", "tiny").stdout
    assert jobs(said(judged.snakemake("-n"))) == {}


def test_what_a_corrected_scorer_changes_is_told_before_it_is_adopted(judged) -> None:
    same = judged.randopt("rescore", "tiny", "--check")
    assert same.returncode == 0 and "Nothing differs." in same.stdout, said(same)
    change(judged.folder / SCORERS / "large.py", "BOUND = 12", "BOUND = 6")
    unraised = judged.randopt("rescore", "tiny", "--check")
    assert unraised.returncode == 1 and "its version did not" in " ".join(unraised.stdout.split()), said(unraised)

    change(judged.folder / SCORERS / "__init__.py", 'Scorer("large", 1', 'Scorer("large", 2')
    before = judged.tables()
    done = judged.randopt("rescore", "tiny", "--examples", "2")
    assert done.returncode == 0, said(done)
    text = " ".join(done.stdout.split())
    assert "large-v1 → large-v2" in text and "3 of 3 stay selected" in text, "its rewards are what they were"
    assert "the first 2 that differ" in text and "lenient wrong → right" in text and "to adopt it: snakemake" in text
    after = judged.tables()
    assert {path: after[path] for path in before} == before
    assert judged.randopt("rescore", "tiny", "--check").returncode == 1
    refused(judged.randopt("rescore", "tiny", "--old", "large-v7"), "stored are: large-v1, large_paper-v1")


def test_it_is_adopted_without_a_gpu_and_as_foretold(judged) -> None:
    folder = (
        judged.folder
        / "results/experiments/tiny/rescore/large-v1--large-v2"
        / judged.run.relative_to(judged.folder / "results")
    )
    foretold = {stage: pl.read_parquet(folder / stage / "*.parquet") for stage in STAGES}
    base = metric(judged, "base", 1, "test", "lenient")
    told = judged.randopt("rescore", "tiny").stdout
    counts = jobs(said(judged.snakemake()))
    assert "generate" not in counts and counts["score_large"] == 4
    for stage in STAGES:
        old, new = scores(judged, stage, "large-v1"), scores(judged, stage, "large-v2")
        differ = old["lenient"] != new["lenient"]
        assert 0 < differ.sum() < old.height
        assert foretold[stage]["item_id"].to_list() == old.filter(differ)["item_id"].to_list()
        assert foretold[stage]["new_lenient"].to_list() == new.filter(differ)["lenient"].to_list()
    adopted = metric(judged, "base", 1, "test", "lenient")
    assert adopted != base
    assert f"lenient {100 * base:.1f} → {100 * adopted:.1f} % (net {8 * (adopted - base):+.0f} of 8)" in told


def test_a_twin_that_fails_costs_its_own_column(judged) -> None:
    change(
        judged.folder / SCORERS / "large.py", "return Verdict(float(value % 2)", "1 / 0\n    return Verdict(float(0)"
    )
    change(judged.folder / SCORERS / "__init__.py", 'Scorer("large_paper", 1', 'Scorer("large_paper", 2')
    refused(judged.randopt("rescore", "tiny", "--scorer", "paper"), "ZeroDivisionError", "large_paper failed on item")
    own = scores(judged, "search", "large-v2")
    counts = jobs(said(judged.snakemake()))
    assert counts["score_large"] == 4 and "generate" not in counts, "another version of the twin is scored"
    assert scores(judged, "search", "large-v2").equals(own)
    assert scores(judged, "search", "large_paper-v2").is_empty()
    metrics = tables.read(judged.run / "n00016/metrics.parquet", tables.METRICS)
    assert set(metrics["metric"].str.split("_minus").list.first()) == {"strict", "lenient"}
    told = " ".join(judged.randopt("show", "tiny").stdout.split())
    assert "no paper verdicts: large_paper failed" in told
    (log,) = judged.folder.glob("logs/metrics/tiny/times_table/*/n00016.log")
    assert "ZeroDivisionError" in log.read_text()
