"""Tasks: what a YAML may say, items that are the same next year, splits that share no problem."""

import importlib.util
import io
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from randopt.canonical import short_hash
from randopt.errors import UserError
from randopt.tables import ITEMS
from randopt.tasks import countdown, scorers, tabular, times_table
from randopt.tasks.items import check_disjoint, make_items, render
from randopt.tasks.judge import judge
from randopt.tasks.row import Row, normalised
from randopt.tasks.spec import SPLITS, TaskSpec, identity, load_task

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "config" / "tasks"


@pytest.fixture
def project(tmp_path):
    """A project with one table task, "words", of ten rows; `write(**changes)` rewrites its YAML."""
    folder = tmp_path / "config" / "tasks"
    folder.mkdir(parents=True)
    rows = [{"question": f"How many is {n}?", "answer": f"So\n#### {n:,}"} for n in range(1000, 1010)]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = {
        "version": 1,
        "source": {"file": "words.jsonl", "reference_transform": "after_hashes"},
        "prompt": [{"role": "user", "content": "{question}"}],
        "reference": "answer",
        "splits": {
            "select": {"size": 3},
            "confirm": {"size": 3, "start": 3},
            "test": {"size": 4, "start": 6},
        },
        "max_tokens": 8,
        "scorer": "gsm8k",
    }

    def write(**changes):
        merged = {key: value for key, value in {**base, **changes}.items() if value != "DROP"}
        (folder / "words.yaml").write_text(yaml.safe_dump(merged))
        return folder

    write()
    write.root, write.rows = tmp_path, rows
    return write


# Specifications.


def test_spec_is_cheap_to_import():
    heavy = "{'polars', 'datasets', 'torch', 'numpy', 'reasoning_gym', 'sympy'} & set(sys.modules)"
    code = f"import sys, randopt.tasks.spec; sys.exit(str({heavy}) if {heavy} else 0)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT / "workflow")})


@pytest.mark.parametrize("name", [*sorted(path.stem for path in FOLDER.glob("*.yaml")), "reasoning_gym:chain_sum"])
def test_shipped_tasks_load(name):
    spec = load_task(name, FOLDER)
    assert spec.name == name and spec.label == name.replace(":", "-")
    assert spec.scorer in scorers.SCORERS and tuple(spec.splits) == SPLITS
    json.dumps(identity(spec))


def test_a_spec_survives_yaml():
    spec = load_task("countdown", FOLDER)
    assert TaskSpec(**yaml.safe_load(yaml.safe_dump(asdict(spec)))) == spec


def test_paper_sizes_of_gsm8k():
    splits = load_task("gsm8k", FOLDER).splits
    assert splits["select"] == {"part": "train", "start": 0, "size": 200}
    assert splits["confirm"] == {"part": "train", "start": 200, "size": 200}
    assert splits["test"] == {"part": "test", "start": 0, "size": 1319}


def test_overrides():
    entry = {
        "name": "times_table",
        "label": "small",
        "splits": {"select": 6, "confirm": 2, "test": {"size": 8}},
        "max_tokens": 4,
        "source": {"high": 5},
        "scorer": "gsm8k",
    }
    spec = load_task(entry, FOLDER)
    assert {split: value["size"] for split, value in spec.splits.items()} == {
        "select": 6,
        "confirm": 2,
        "test": 8,
    }
    assert (spec.label, spec.max_tokens, spec.scorer, spec.source["high"]) == ("small", 4, "gsm8k", 5)
    assert spec.source["low"] == 2
    gsm8k = load_task({"name": "gsm8k", "splits": {"confirm": 50}}, FOLDER)
    assert gsm8k.splits["confirm"] == {"part": "train", "start": 200, "size": 50}
    gym = load_task({"name": "reasoning_gym:chain_sum", "source": {"params": {"max_terms": 3}, "seed": 5}}, FOLDER)
    assert gym.source == {"reasoning_gym": "chain_sum", "params": {"max_terms": 3}, "seed": 5}


def test_identity_is_what_changes_items(project):
    spec = load_task("times_table", FOLDER)
    same = [replace(spec, label="x"), replace(spec, scorer="gsm8k"), replace(spec, max_tokens=1)]
    assert all(identity(other) == identity(spec) for other in same)
    for entry in ({"splits": {"test": 47}}, {"source": {"seed": 2}}):
        assert identity(load_task({"name": "times_table", **entry}, FOLDER)) != identity(spec)
    assert identity(replace(spec, version=2)) != identity(spec)
    table = load_task("words", project())
    before = identity(table)
    assert str(project.root) not in json.dumps(before)
    assert set(table.source["path"].values()) == {str(project.root / "words.jsonl")}
    with open(project.root / "words.jsonl", "a") as stream:
        stream.write("\n")
    assert identity(table) != before


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("times_tabel", r"did you mean 'times_table'\?.*countdown, gsm8k, .*times_table"),
        ("no/where.yaml", "does not exist"),
        (7, "expected a task's name"),
        ({"splits": {}}, "mapping with the key `name`"),
        ({"name": "times_table", "sizes": 3}, "unknown key 'sizes'"),
        ({"name": "times_table", "max_token": 3}, "did you mean 'max_tokens'"),
        (
            {"name": "times_table", "scorer": "numbr"},
            "scorer 'numbr' is unknown; choose one of number, countdown",
        ),
        (
            {"name": "times_table", "max_tokens": 0},
            "max_tokens: 0 was given, expected a whole number, 1 or more",
        ),
        ({"name": "times_table", "max_tokens": True}, "max_tokens: True"),
        ({"name": "times_table", "splits": {"select": 1.5}}, r"splits.select.size: 1.5"),
        ({"name": "times_table", "splits": {"select": {"start": 3}}}, "unknown key 'start'"),
        ({"name": "times_table", "splits": {"train": 3}}, "unknown key 'train'"),
        ({"name": "times_table", "splits": 48}, "expected a mapping"),
        ({"name": "times_table", "source": {"hihg": 3}}, "did you mean 'high'"),
        (
            {"name": "times_table", "source": {"high": 1}},
            r"source.high: 1 was given, expected a whole number, 2 or",
        ),
        ({"name": "times_table", "source": {"seed": "a"}}, "source.seed: 'a'"),
        (
            {"name": "times_table", "source": {"generator": "sums"}},
            "'sums' is unknown; choose one of times_table",
        ),
        ({"name": "times_table", "label": "a/b"}, "label 'a/b'"),
        ({"name": "countdown", "source": {"counts": [9]}}, "source.counts: 9 was given.*from 2 to 6"),
        ({"name": "gsm8k", "source": {"revision": None}}, "source.revision: None.*expected the commit"),
        ({"name": "gsm8k", "source": {"reference_transform": "x"}}, "expected one of after_hashes"),
        ({"name": "gsm8k", "source": {"file": "no.jsonl"}}, "no.jsonl does not exist"),
        ({"name": "reasoning_gym:chain_sum", "source": {"params": {"size": 3}}}, "sizes are in splits"),
    ],
)
def test_mistakes_in_an_entry(entry, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        load_task(entry, FOLDER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "DROP"}, "reference: None was given, expected the name of the column"),
        ({"version": "DROP"}, "the key 'version' is missing"),
        ({"verison": 1}, "unknown key 'verison'.*did you mean 'version'"),
        (
            {"source": {"hub": "a/b", "file": "words.jsonl"}},
            "with one of generator, reasoning_gym, hub, file",
        ),
        ({"source": {"file": "words.txt"}}, "does not exist"),
        ({"prompt": "{question}"}, "expected a list of messages"),
        ({"prompt": [{"role": "robot", "content": "{question}"}]}, "role 'robot'"),
        ({"prompt": [{"role": "user", "content": "What?"}]}, "every item would ask the same"),
        ({"splits": {"select": 3, "confirm": 3}}, "splits.test is missing"),
        ({"splits": {"select": 3, "confirm": 3, "test": {"start": 6}}}, "splits.test.size: None"),
    ],
)
def test_mistakes_in_a_yaml(project, changes, message):
    with pytest.raises(UserError, match=f"(?s)words.yaml.*{message}"):
        load_task("words", project(**changes))


def test_broken_yaml_is_named(project):
    folder = project()
    (folder / "words.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"words.yaml is not valid YAML"):
        load_task("words", folder)


def test_a_yaml_may_be_given_by_path(project):
    """Also from another project; its source file is then looked for beside it."""
    path = project(source={"file": "../../words.jsonl"}) / "words.yaml"
    assert load_task(str(path), FOLDER).label == "words"


# Items.


def contents(frames):
    return {split: set(frame["content_hash"]) for split, frame in frames.items()}


def test_items_of_times_table():
    frames = make_items(load_task("times_table", FOLDER), ROOT)
    assert {split: frame.height for split, frame in frames.items()} == {
        "select": 48,
        "confirm": 32,
        "test": 160,
    }
    factors = [json.loads(meta).values() for frame in frames.values() for meta in frame["meta"]]
    assert {(min(pair), max(pair)) for pair in factors} == {(a, b) for a in range(2, 10) for b in range(a, 21)}
    assert all(frame.schema == ITEMS.schema for frame in frames.values())
    first = frames["select"].row(0, named=True)
    a, b = json.loads(first["meta"]).values()
    assert first["item_id"] == "select-00000"
    asked = f"What is {a} times {b}? Answer with only the number."
    assert first["messages"] == [{"role": "user", "content": asked}]
    assert json.loads(first["reference"]) == a * b


def test_items_are_the_same_next_year():
    """Golden hashes over whole splits: a change here changes every published result; raise `version`."""
    found = {}
    for name in ("times_table", "countdown"):
        for split, frame in make_items(load_task(name, FOLDER), ROOT).items():
            rows = frame.select("content_hash", "reference").rows()
            found[name, split] = (rows[0][0], short_hash(rows))
    assert found == GOLDEN


GOLDEN = {
    ("times_table", "select"): ("e44301c240156258", "f35b3ca90f"),
    ("times_table", "confirm"): ("d48fbc0317c8bc08", "7d60248c36"),
    ("times_table", "test"): ("caf51efda1425252", "b2abfbea17"),
    ("countdown", "select"): ("5f2a9f1e65a2b8de", "0c94a23ecc"),
    ("countdown", "confirm"): ("81a3fa8f82aed951", "6319fd10d9"),
    ("countdown", "test"): ("7ef25f21ce1939b0", "8ab8beaf8b"),
}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.integers(2, 8), st.lists(st.integers(1, 25), min_size=3, max_size=3))
def test_times_table_splits_are_disjoint(seed, width, sizes):
    source = {"low": 2, "high": 1 + width, "seed": seed}
    wanted = dict(zip(SPLITS, sizes, strict=True))
    if sum(sizes) > width**2:
        with pytest.raises(UserError, match=f"only {width**2}"):
            times_table.rows(source, wanted)
        return
    try:
        made = times_table.rows(source, wanted)
    except UserError as error:
        assert "even" in str(error) and sum(sizes) > width**2 - 3
        return
    assert {split: len(rows) for split, rows in made.items()} == wanted
    pairs = {split: {tuple(row.problem) for row in rows} for split, rows in made.items()}
    assert not pairs["select"] & pairs["confirm"] and not (pairs["select"] | pairs["confirm"]) & pairs["test"]
    assert all(len({row.variant for row in rows}) == len(rows) for rows in made.values())


def test_the_whole_times_table_can_be_used():
    made = times_table.rows({"low": 2, "high": 12, "seed": 1}, {"select": 48, "confirm": 0, "test": 73})
    assert len({row.variant for rows in made.values() for row in rows}) == 121


def test_countdown_problems_can_be_solved():
    spec = load_task({"name": "countdown", "splits": {"select": 40, "confirm": 30, "test": 30}}, FOLDER)
    frames = make_items(spec, ROOT)
    hashes = contents(frames)
    assert sum(map(len, hashes.values())) == len(set().union(*hashes.values())) == 100
    score = scorers.get("countdown").score
    for frame in frames.values():
        for reference, meta in frame.select("reference", "meta").iter_rows():
            problem = json.loads(reference)
            assert isinstance(problem["target"], str) and len(problem["numbers"]) in (3, 4)
            assert score(f"x</think>\n<answer>{json.loads(meta)['solution']}</answer>", problem).strict


def test_countdown_sizes_do_not_shift_other_splits():
    source = load_task("countdown", FOLDER).source
    small = countdown.rows(source, {"select": 5, "confirm": 5, "test": 5})
    large = countdown.rows(source, {"select": 9, "confirm": 5, "test": 5})
    assert small["test"] == large["test"] and small["select"] == large["select"][:5]


def test_countdown_runs_out_of_problems():
    source = {"seed": 1, "counts": [2], "low": 1, "high": 2, "target_low": 1, "target_high": 9}
    with pytest.raises(UserError, match="select needs 50 items, but only"):
        countdown.rows(source, {"select": 50})


def test_overlap_names_the_items():
    rows = [Row([n], {}, n) for n in range(3)]
    check_disjoint("t", {"select": rows[:1], "test": rows[1:]})
    with pytest.raises(UserError, match="select-00000 = test-00001"):
        check_disjoint("t", {"select": rows[:1], "test": [rows[1], rows[0]]})
    with pytest.raises(UserError, match="test-00000 = test-00001"):
        check_disjoint("t", {"test": [rows[0], rows[0]]})
    check_disjoint("t", {"test": [Row([1], {}, 1, variant="a"), Row([1], {}, 1, variant="b")]})


def test_normalised_and_render():
    assert normalised(" What\u00a0is\n\uff12 ? ") == normalised("what is 2 ?")
    template = r"{a} of {{x}} in \boxed{} and {b}"
    assert render(template, {"a": "{b}", "b": [1, 2]}) == r"{b} of {x} in \boxed{} and [1, 2]"


# Tables.


def test_table_items(project):
    frames = make_items(load_task("words", project()), project.root)
    assert frames["test"]["reference"].to_list() == [f'"{n}"' for n in range(1006, 1010)]
    assert frames["select"]["messages"][0].to_list() == [{"role": "user", "content": "How many is 1000?"}]
    assert json.loads(frames["confirm"]["meta"][0]) == {"part": "train", "row": 3}


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
def test_other_files(project, suffix):
    import polars as pl

    frame, path = pl.DataFrame(project.rows), project.root / f"words.{suffix}"
    {"json": frame.write_json, "csv": frame.write_csv, "parquet": frame.write_parquet}[suffix](path)
    spec = load_task("words", project(source={"file": path.name, "reference_transform": "after_hashes"}))
    assert make_items(spec, project.root)["select"]["reference"].to_list() == ['"1000"', '"1001"', '"1002"']


def test_a_reference_of_several_columns(project):
    rows = [{"numbers": [n, 1], "target": str(n + 1), "other": 0} for n in range(1, 11)]
    (project.root / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompt = [{"role": "user", "content": "Make {target} of {numbers}."}]
    changes = {"source": {"file": "words.jsonl"}, "reference": ["numbers", "target"], "prompt": prompt}
    first = make_items(load_task("words", project(**changes)))["select"].row(0, named=True)
    assert json.loads(first["reference"]) == {"numbers": [1, 1], "target": "2"}
    assert first["messages"][0]["content"] == "Make 2 of [1, 1]."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"reference": "solution"},
            "column 'solution' is missing from part 'train', which has question, answer",
        ),
        ({"prompt": [{"role": "user", "content": "{problem}"}]}, "column 'problem' is missing"),
        (
            {"splits": {"select": 3, "confirm": 3, "test": {"size": 5, "start": 6}}},
            "rows 6 to 10.*has 10 rows",
        ),
        (
            {"splits": {"select": 3, "confirm": 3, "test": {"size": 4, "start": 6}}},
            "select-00000 = confirm-00000",
        ),
        (
            {"splits": {"select": 3, "confirm": 3, "test": {"size": 1, "part": "test"}}},
            "part 'test', but.*has train",
        ),
    ],
)
def test_mistakes_in_a_table(project, changes, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        make_items(load_task("words", project(**changes)), project.root)


def test_bad_rows_and_files(project):
    spec = load_task("words", project())
    path = project.root / "words.jsonl"
    path.write_text("".join(json.dumps({**row, "answer": "42"}) + "\n" for row in project.rows))
    with pytest.raises(UserError, match=r"row 0 of part 'train'.*no '####'"):
        make_items(spec)
    path.write_text("".join(json.dumps({**row, "question": None}) + "\n" for row in project.rows))
    with pytest.raises(UserError, match="column 'question' is empty"):
        make_items(spec)
    path.write_text("{torn")
    with pytest.raises(UserError, match=r"words.jsonl cannot be read \("):
        make_items(spec)
    path.unlink()
    with pytest.raises(UserError, match=r"words\.jsonl"):
        make_items(spec)
    with pytest.raises(UserError, match="cannot read"):
        identity(spec)


def test_no_network_says_what_to_do(monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise ConnectionError("offline\nmore")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError) as caught:
        make_items(load_task("gsm8k", FOLDER))
    message = str(caught.value)
    for part in (
        "openai/gsm8k",
        "ConnectionError: offline",
        "HF_HOME",
        "train: train.jsonl, test: test.jsonl",
    ):
        assert part in message


def test_local_files_in_place_of_the_hub(project):
    names = {"train": str(project.root / "words.jsonl"), "test": str(project.root / "test.jsonl")}
    rows = [{"question": f"And {n}?", "answer": f"#### {n}"} for n in range(5)]
    Path(names["test"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = {"select": 4, "confirm": {"size": 4, "start": 4}, "test": 5}
    spec = load_task({"name": "gsm8k", "source": {"file": names}, "splits": splits}, FOLDER)
    assert make_items(spec, ROOT)["test"]["reference"].to_list() == [f'"{n}"' for n in range(5)]
    assert set(identity(spec)["source"]) == {"reference_transform", "sha256"}


def test_hub_rows_come_from_the_pinned_revision(project, monkeypatch):
    import datasets

    calls = []

    def serve(*args, **kwargs):
        calls.append((args, kwargs))
        base = 0 if kwargs["split"] == "train" else 10**6
        rows = [{"question": f"Q{base + n}", "answer": f"#### {n}"} for n in range(1319)]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", serve)
    frames = tabular.rows(load_task("gsm8k", FOLDER), ROOT)
    assert {split: len(rows) for split, rows in frames.items()} == {
        "select": 200,
        "confirm": 200,
        "test": 1319,
    }
    assert frames["confirm"][0].reference == "200"
    revision = "e53f048856ff4f594e959d75785d2c2d37b678ee"
    for part, (args, kwargs) in zip(("train", "test"), calls, strict=True):
        assert args == ("openai/gsm8k", "main") and kwargs == {"split": part, "revision": revision}


# reasoning-gym.


@pytest.fixture
def gym():
    if not importlib.util.find_spec("reasoning_gym"):
        pytest.skip("reasoning-gym is not installed")
    return lambda name, **source: load_task(
        {"name": f"reasoning_gym:{name}", "source": source, "splits": {"select": 5, "confirm": 4, "test": 6}},
        FOLDER,
    )


def test_reasoning_gym_items(gym, monkeypatch):
    """word_ladder depends on Python's hash seed unless it is fixed."""
    spec = gym("word_ladder", params={"max_word_length": 3, "min_word_length": 3})
    frames = make_items(spec)
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    again = make_items(spec)
    assert all(frames[split].equals(again[split]) for split in SPLITS)
    assert len(set().union(*contents(frames).values())) == 15
    reference = json.loads(frames["select"]["reference"][0])
    assert reference["dataset"] == "word_ladder" and reference["params"]["max_word_length"] == 3
    assert reference["question"] in frames["select"]["messages"][0][1]["content"]
    found = scorers.get("reasoning_gym").score(f"<answer>{reference['answer']}</answer>", reference)
    assert found.strict


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("chain_summ", {}, "reasoning_gym:chain_summ: this data set is unknown.*chain_sum"),
        ("chain_sum", {"max_termz": 3}, "source.params.*were refused.*max_termz"),
        ("count_bits", {"min_n": 1, "max_n": 50}, "only [0-9]+ new questions came in"),
    ],
)
def test_reasoning_gym_mistakes(gym, name, params, message):
    spec = load_task({"name": f"reasoning_gym:{name}", "source": {"params": params}, "splits": {"test": 1000}}, FOLDER)
    with pytest.raises(UserError, match=f"(?s){message}"):
        make_items(spec)


# judge.


def test_judge():
    lines = [json.dumps({"response": r, "reference": "42"}) for r in ("#### 42", "43")]
    out = io.StringIO()
    judge("gsm8k", None, [lines[0], "\n", lines[1]], out)
    assert [json.loads(line) for line in out.getvalue().splitlines()] == [
        {"reward": 1.0, "strict": True, "lenient": True, "vote_key": "42"},
        {"reward": 0.0, "strict": False, "lenient": False, "vote_key": "43"},
    ]
    out = io.StringIO()
    judge(load_task("gsm8k", FOLDER), "paper", ['{"response": "", "reference": "42"}'], out)
    assert json.loads(out.getvalue())["vote_key"] is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("[]", "line 2: the key 'response' is missing"),
        ('{"response": "x"}', "line 2: the key 'reference' is missing"),
        ('{"response": 3, "reference": "3"}', "line 2: response is int, expected text"),
        ('{"response": "3", "reference": "x"}', "line 2: scorer 'gsm8k'.*expected a number"),
    ],
    ids=lambda text: text[:20],
)
def test_judge_names_the_line(line, message):
    with pytest.raises(UserError, match=message):
        judge("gsm8k", None, ['{"response": "3", "reference": "3"}', line], io.StringIO())


def test_judge_fills_in_the_data_set():
    entry = {"question": "2 + 2 = ?", "answer": "4", "metadata": {}}
    out = io.StringIO()
    judge(
        "reasoning_gym:chain_sum",
        None,
        [json.dumps({"response": "<answer>4</answer>", "reference": entry})],
        out,
    )
    assert json.loads(out.getvalue())["strict"]
