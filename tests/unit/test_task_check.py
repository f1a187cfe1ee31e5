"""randopt task check: everything that is wrong at once, and how answers would be judged."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from randopt.errors import Mistakes, UserError
from randopt.tasks.check import check
from randopt.tasks.items import make_items
from randopt.tasks.judge import judge
from randopt.tasks.spec import load_task

ROOT = Path(__file__).parents[2]
ROWS = "question,answer\n" + "".join(f"What is 1 + {n}?,{n + 1}\n" for n in range(12))
TASK = """\
version: 1
source:
  file: sums.csv
prompt:
  - role: user
    content: "{question} Answer with the number."
reference: answer
splits:
  select: {size: 4}
  confirm: {size: 4, start: 4}
  test:
    size: 4
    start: 8
max_tokens: 8
scorer: numeric
"""


@pytest.fixture
def told(tmp_path):
    """Write the table and the task, check it, and return what is printed."""

    def run(task=TASK, rows=ROWS, answers=(), **options):
        (tmp_path / "sums.csv").write_text(rows)
        (tmp_path / "sums.yaml").write_text(task)
        out = io.StringIO()
        options = {"file": None, "item": "select-00000", **options}
        check(str(tmp_path / "sums.yaml"), answers, console=Console(file=out, width=150), **options)
        return out.getvalue()

    run.folder = tmp_path
    return run


def test_a_sound_task_is_shown(told):
    text = told(answers=["1", "It is 1.", "2"])
    for split, n in (("select", 0), ("confirm", 4), ("test", 8)):
        assert f"{split}-00000" in text and f"What is 1 + {n}? Answer with the number." in text
    assert "part train, rows 8 to 11" in text and "scorer numeric, version 1" in text
    verdicts = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│ select-" in line]
    assert verdicts == [
        ["select-00000", "1", "1", "1", "yes", "yes", "1"],
        ["select-00000", "It is 1.", "1", "1", "no", "yes", "1"],
        ["select-00000", "2", "1", "0", "no", "no", "2"],
    ]


def test_answers_of_a_file(told):
    file = told.folder / "answers.jsonl"
    file.write_text('{"response": "9", "item": "test-00000"}\n\n{"response": "none"}\n')
    text = told(file=file, item="confirm-00001")
    assert "│ test-00000" in text and "abstains" in text and "│ confirm-00001" in text
    for line, message in (("{", "line 1 is no JSON"), ("[]", "line 1: '\\[\\]' was given")):
        file.write_text(line)
        with pytest.raises(UserError, match=message):
            told(file=file)
    with pytest.raises(UserError, match="'x' is unknown; give one from select-00000 to test-00003"):
        told(answers=["1"], item="x")


def mistakes(told, *changes, rows=ROWS):
    task = TASK
    for before, after in changes:
        assert before in task
        task = task.replace(before, after)
    with pytest.raises(Mistakes) as caught:
        told(task, rows)
    return [(mistake.line, mistake.text) for mistake in caught.value.mistakes]


def test_every_mistake_is_told_at_once_with_its_line(told):
    rows = ROWS.replace("What is 1 + 6?", "").replace("What is 1 + 9?", "what is  1 + 1?")
    found = mistakes(
        told,
        ("version: 1", "version: one\nvers: 2"),
        ("max_tokens: 8", "max_tokens: 0"),
        ("scorer: numeric", "scorer: {name: numeric, tolerence: 1}"),
        rows=rows,
    )
    expected = [
        (2, "unknown key 'vers'"),
        (15, "max_tokens: 0 was given"),
        (1, "version: 'one' was given, expected a whole number"),
        (16, "unknown key 'tolerence' (value 1): did you mean 'tolerance'?"),
        (11, "row 6 of part 'train': the column 'question' is empty"),
        (9, "the same problem stands twice: select-00001 = test-00001"),
    ]
    for (line, text), (right, words) in zip(found, expected, strict=True):
        assert words in text and line == right


@pytest.mark.parametrize(
    ("before", "after", "line", "message"),
    [
        ("{question}", "{problem}", 4, "the column 'problem' is missing from part 'train', which has question, answer"),
        ("{question}", "{question:letters}", 4, "stands in a column that is shown as letters, expected a list"),
        ("{question}", "{question:leters}", 6, "{question:leters} was given, expected {question} or one of"),
        ("reference: answer", "reference: solution", 7, "the column 'solution' is missing"),
        ("scorer: numeric", "scorer: choice", 15, "confirm-00000: scorer 'choice': the reference '5' was given"),
        ("scorer: numeric", "scorer: mine.py:judge", 15, "the file of mine.py:judge does not exist"),
        ("    start: 8", "    start: 9", 11, "splits.test needs rows 9 to 12 of part 'train', which has 12 rows"),
        ("max_tokens: 8", "max_tokens: 999999", 14, "more than any model's context"),
        ("file: sums.csv", "file: sum.csv", 3, "sum.csv does not exist"),
        ("role: user", "role: robot", 5, "role: 'robot' was given, expected one of system, user, assistant"),
        ("    size: 4\n", "", 11, "splits.test: the key 'size' is missing"),
    ],
)
def test_one_mistake(told, before, after, line, message):
    ((where, text),) = mistakes(told, (before, after))
    assert message in text and where == line


def test_an_answer_that_would_be_cut_off(told):
    rows = ROWS.replace(",1\n", f",{'long ' * 40}\n")
    ((line, text),) = mistakes(told, ("scorer: numeric", "scorer: exact"), rows=rows)
    assert line == 14 and "max_tokens: 8 was given, but a right answer has 200 characters" in text


def test_every_reference_is_tried(told):
    rows = ROWS.replace("What is 1 + 11?,12", "What is 1 + 11?,twelve")
    ((line, text),) = mistakes(told, rows=rows)
    assert line == 15 and text.startswith("test-00003: scorer 'numeric': the reference 'twelve'")
    with pytest.raises(UserError, match=r"task .*sums\.yaml: test-00003: scorer 'numeric'"):
        make_items(load_task(str(told.folder / "sums.yaml"), told.folder))


def test_programs_are_judged_in_the_sandbox_that_is_asked_for(tmp_path):
    """The weaker one works for everybody but root; here is no bubblewrap, and nothing takes its place."""
    rows = (ROOT / "tests" / "data" / "mbpp.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(rows[:3]))
    task = yaml.safe_load((ROOT / "config" / "tasks" / "mbpp.yaml").read_text())
    task["source"] = {"file": "train.jsonl"}
    task["splits"] = {name: {"size": 1, "start": n} for n, name in enumerate(("select", "confirm", "test"))}
    (tmp_path / "programs.yaml").write_text(yaml.safe_dump(task))
    answer = f"<answer>{json.loads(rows[0])['code']}</answer>"
    command = [sys.executable, "-m", "randopt.cli", "task", "check", "programs.yaml", "--answer", answer, "--sandbox"]
    environment = {"PYTHONPATH": str(ROOT / "workflow"), "PATH": "/nowhere"}  # no bubblewrap there
    limits = (2, "this process is root") if os.geteuid() == 0 else (0, "│ yes ")
    for mode, code, words in (
        ("limits", *limits),
        ("bubblewrap", 2, "scoring.sandbox: bubblewrap does not work"),
        ("none", 2, "sandbox 'none' was given"),
    ):
        done = subprocess.run([*command, mode], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == code and words in done.stdout + done.stderr, done.stdout + done.stderr


def test_the_command(told):
    told()
    command = [sys.executable, "-m", "randopt.cli", "task", "check", "sums.yaml", "--answer", "1"]
    environment = {"PYTHONPATH": str(ROOT / "workflow"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=told.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "What is 1 + 8?" in done.stdout, done.stderr
    (told.folder / "sums.yaml").write_text(TASK.replace("max_tokens: 8", "max_tokens: no"))
    done = subprocess.run(command, cwd=told.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "sums.yaml: max_tokens: False was given" in done.stderr
    assert done.stderr.rstrip().endswith("(line 14)") and "Traceback" not in done.stderr


# The tasks whose tables are not ours: their shape, on rows made up for this test.


@pytest.mark.parametrize(("name", "parts"), [("uspto50k", ("train", "validation")), ("rocstories", ("train",))])
def test_text_tasks_of_the_paper(name, parts):
    file = ROOT / "tests" / "data" / "tasks" / f"{name}.jsonl"
    entry = {
        "name": name,
        "source": {"file": {part: str(file) for part in parts}},
        "splits": {"select": 4, "confirm": {"size": 4, "start": 4}, "test": {"size": 4, "start": 8}},
    }
    spec = load_task(entry, ROOT / "config" / "tasks")
    assert spec.max_tokens == 64 and spec.splits["select"]["start"] == 0
    frames = make_items(spec, ROOT)
    row = json.loads(file.read_text().splitlines()[8])
    first = frames["test"].row(0, named=True)
    prompt, reference = first["messages"][-1]["content"], json.loads(first["reference"])
    if name == "rocstories":
        assert reference == row["gold_order"]
        lines = [line for line in prompt.splitlines() if line[1:3] == ". "]
        assert lines == [f"{'ABCDE'[i]}. {sentence}" for i, sentence in enumerate(row["shuffled_sentences"])]
        story = [lines[place][3:] for place in reference]
        assert story[0] == "Ben wanted to learn the violin." and story[-1] == "His grandmother cried with joy."
        answer = ", ".join("ABCDE"[place] for place in reference)
    else:
        assert row["rxn_smiles"] in prompt and reference == row["class"] == 9
        answer = "<answer>9</answer>"
    for scorer in (None, "paper"):
        out = io.StringIO()
        judge(name, scorer, [json.dumps({"response": answer, "reference": reference})], out)
        assert json.loads(out.getvalue())["reward"] == pytest.approx(1)


def test_their_splits_are_apart():
    uspto = load_task("uspto50k", ROOT / "config" / "tasks").splits
    assert [(part["part"], part["start"], part["size"]) for part in uspto.values()] == [
        ("train", 0, 200), ("train", 200, 200), ("validation", 0, 1001),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"rocstories.jsonl does not exist .*line"):
        load_task("rocstories", ROOT / "config" / "tasks")
