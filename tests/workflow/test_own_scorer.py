"""Scorers with options and scorers of one's own, through the whole workflow: other scores, no generation."""

import json

from randopt import tables
from tests.workflow.tools import jobs, refused, said

# as the scorer number judges, so that the experts stay the same
OWN = """\
import re

def judge(response, reference):
    found = re.findall("[0-9]+", response)
    return bool(found) and int(found[-1]) == reference
"""


def test_another_scorer_makes_scores_beside_the_old_ones_without_generating(finished) -> None:
    def scored() -> set[str]:
        return {path.name for path in finished.run.glob("search/scores/*")}

    task = finished.config["tasks"][0]
    task["scorer"] = {"name": "regex", "pattern": r"([0-9]+)\D*$"}
    counts = jobs(said(finished.snakemake()))
    assert counts["score"] == 4 and "generate" not in counts
    (regex,) = scored() - {"number-v1"}
    assert regex.startswith("regex-") and regex.endswith("-v1")
    path = next(finished.run.glob(f"search/scores/{regex}/*.parquet"))
    assert set(tables.read(path, tables.SCORES)["scorer"]) == {regex.removesuffix("-v1")}

    own = finished.folder / "config/tasks/judge it.py"
    own.write_text(OWN)
    task["scorer"] = "judge it.py:judge"
    counts = jobs(said(finished.snakemake()))
    assert counts["score"] == 4 and "generate" not in counts
    (first,) = scored() - {"number-v1", regex}
    assert first.startswith("judge_it.judge-")
    assert "Nothing to be done" in said(finished.snakemake())

    own.write_text(OWN + "# edited\n")
    text = said(finished.snakemake())
    assert jobs(text)["score"] == 4 and "generate" not in jobs(text) and len(scored()) == 4

    own.write_text("def judge(response, reference):\n    return response.no_such_thing\n")
    refused(finished.snakemake(check=False), "judge it.py, line 2: AttributeError", "The completions are kept")
    task["scorer"] = {"name": "numeric", "tolerence": 1}
    refused(finished.snakemake("-n", check=False), "unknown key 'tolerence'", "did you mean 'tolerance'?")
    task["scorer"] = "number"
    assert json.dumps(task) and "generate" not in jobs(said(finished.snakemake()))
