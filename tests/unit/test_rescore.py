"""Two scorers' verdicts on the same texts, and what of it is said."""

import io
from pathlib import Path

import polars as pl
import pytest
import yaml
from rich.console import Console

from randopt import layout, rescore, tables
from randopt.errors import UserError
from randopt.score import check_scored, verdicts
from randopt.tasks.scorers import SCORERS, Scorer, Verdict, judges
from tests.unit.test_race import configured

TEXTS = pl.DataFrame(
    {
        "request_id": ["a", "a", "a", "b", "b", "b"],
        "item_id": ["select-0", "select-1", "test-0"] * 2,
        "text": ["4", "5", "six", "4", "\x1b[2J", ""],
        "finish_reason": ["stop"] * 5 + ["pruned"],
    }
)
REFERENCES: dict[str, object] = {"select-0": "4", "select-1": "5", "test-0": "6"}


def exact(response: str, reference: object) -> Verdict:
    right = response == reference
    return Verdict(float(right), right, right, response or None)


def generous(response: str, reference: object) -> Verdict:
    """As `exact`, but six is 6; other answers have another key."""
    return exact("6" if response == "six" else response, reference)


OLD, NEW = Scorer("exact", 1, exact), Scorer("exact", 2, generous)


def test_only_what_differs_is_a_difference() -> None:
    stored = verdicts(OLD, TEXTS, REFERENCES)
    same = rescore.compare(OLD, TEXTS, REFERENCES, stored.reverse())
    assert not same["differs"].any(), "null vote keys are equal, and stored rows may lie in any order"
    both = rescore.compare(NEW, TEXTS, REFERENCES, stored)
    assert both["differs"].to_list() == [False, False, True, False, False, False]
    row = both.row(2, named=True)
    assert (row["old_reward"], row["new_reward"]) == (0.0, 1.0)
    assert (row["old_vote_key"], row["new_vote_key"]) == ("six", "6")
    key = stored.with_columns(vote_key=pl.lit("x"))
    assert rescore.compare(OLD, TEXTS, REFERENCES, key)["differs"].all(), "another vote key is a difference"


def test_counts_by_hand() -> None:
    stored = verdicts(OLD, TEXTS, REFERENCES).with_columns(lenient=pl.Series([True, False, False, False, True, False]))
    both = rescore.compare(NEW, TEXTS, REFERENCES, stored).with_columns(split=pl.col("item_id").str.head(4))
    counts = rescore._added(rescore._count(both, "split"), both, "split")
    select, test = counts.rows(named=True)
    assert (select["split"], select["answers"], select["differ"]) == ("sele", 8, 6)
    assert (select["gained_lenient"], select["lost_lenient"]) == (4, 2)
    assert (select["old_lenient"], select["new_lenient"]) == (4, 6)
    assert (test["differ"], test["changed_vote_key"], test["gained_strict"], test["lost_strict"]) == (2, 2, 2, 0)


@pytest.mark.parametrize("change", ["absent", "foreign", "twice"])
def test_scores_of_other_answers_are_refused(change: str) -> None:
    stored = verdicts(OLD, TEXTS, REFERENCES)
    other = {
        "absent": stored.head(5),
        "foreign": stored.with_columns(request_id=pl.Series(["a", "a", "a", "b", "b", "c"])),
        "twice": pl.concat([stored, stored.head(1)]),
    }[change]
    with pytest.raises(UserError, match="not of the 6 texts"):
        rescore.compare(NEW, TEXTS, REFERENCES, other)


def comparison(tiny_model: Path, **race) -> rescore.Comparison:
    (run,) = configured(tiny_model, **race).runs
    found = rescore.Comparison(run, "exact-v1", NEW, Path("differences"))
    both = rescore.compare(NEW, TEXTS, REFERENCES, verdicts(OLD, TEXTS, REFERENCES)).with_columns(
        stage=pl.lit("search"), split=pl.col("item_id").str.split("-").list.first()
    )
    found.counts = rescore._added(found.counts, both, "stage")
    found.base = rescore._added(found.base, both, "split")
    found.examples = [{**row, "reference": "[red]6"} for row in both.rows(named=True)]
    return found


def test_what_a_model_wrote_does_not_steer_the_terminal(tiny_model: Path) -> None:
    console = Console(file=io.StringIO(), width=140, force_terminal=True, color_system=None)
    console.print(rescore.render([comparison(tiny_model)], Path("config/mine.yaml")))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[2J" not in text and r"\x1b[2J" in text
    assert "[red]6" in text, "nor is it markup"
    assert "base on test: strict 0.0 → 50.0 % (net +1 of 2)" in text
    assert "vote key 'six' → '6'" in text


def test_the_experts_that_stay(tiny_model: Path) -> None:
    found = comparison(tiny_model)
    assert rescore.experts_kept(found) is None, "the search is not complete"
    ids = [request.request_id for request in rescore.plan.search(found.run.description, 64)]
    old, new = [float(row in (3, 5)) for row in range(64)], [float(row in (5, 60, 61)) for row in range(64)]
    found.candidates = pl.DataFrame({"request_id": ids, "old_reward": old, "new_reward": new})
    assert rescore.experts_kept(found) == 2, "3, 5, 0, 1 and 5, 60, 61, 0: ties go to the smaller seed"
    raced = comparison(tiny_model, mode="lossless", pilot=16)
    raced.candidates = found.candidates
    assert rescore.experts_kept(raced) is None


def test_the_old_version_is_found(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (run,) = configured(tiny_model).runs
    assert rescore._previous(run, SCORERS["number"]) == "number-v1", "named in the message that there are none"
    for name in ("number-v2", "number-v10", "number-v3", "numberless-v4", "exact-v1"):
        (run.folder / "search" / "scores" / name).mkdir(parents=True)
    installed = SCORERS["number"]._replace
    assert rescore._previous(run, installed(version=11)) == "number-v10"
    assert rescore._previous(run, installed(version=10)) == "number-v3"
    assert rescore._previous(run, installed(version=2)) == "number-v2", "no older one: the installed one's own"
    assert rescore._previous(run, SCORERS["gsm8k"]) == "number-v2", "another scorer is held against the task's own"


def test_a_race_of_an_older_version_keeps_the_texts(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (old,) = configured(tiny_model, mode="lossless", pilot=16).runs
    (old.folder / "search" / "completions").mkdir(parents=True)
    (old.folder / "run.yaml").write_text(yaml.safe_dump(dict(old.description)))
    monkeypatch.setitem(SCORERS, "number", SCORERS["number"]._replace(version=3))
    (new,) = configured(tiny_model, mode="lossless", pilot=16).runs
    assert new.folder != old.folder
    assert rescore._with_texts(new).folder == old.folder
    (new.folder / "search" / "completions").mkdir(parents=True)
    (new.folder / "run.yaml").write_text(yaml.safe_dump(dict(new.description)))
    assert rescore._with_texts(new).folder == new.folder


def test_every_paper_scorer_has_its_twin() -> None:
    for name in SCORERS:
        names = [scorer.name for scorer in judges(name)]
        plain = name.removesuffix("_paper")
        assert names == ([plain, f"{plain}_paper"] if f"{plain}_paper" in SCORERS else [name])
    with pytest.raises(UserError, match="'nobody' is unknown"):
        judges("nobody")


def test_empty_scores_say_why(tmp_path: Path) -> None:
    empty = tables.SCORES.schema.to_frame()
    for name, failed in (("failed", "it divided by zero"), ("empty", None)):
        tables.write(empty, tables.SCORES, tmp_path / name, failed=failed)
    with pytest.raises(UserError, match="failed holds no scores: it divided by zero"):
        check_scored(tmp_path / "failed", empty)
    check_scored(tmp_path / "empty", empty)  # what is missing there is another check's to say


def test_stored_scorers_are_named_like_their_folders() -> None:
    assert rescore._folder(NEW) == "exact-v2" and layout.scores("exact", 2).endswith("/exact-v2")
