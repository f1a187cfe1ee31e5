"""Experiments by name, from anywhere a user may have them."""

import json
from pathlib import Path

import pytest

from randopt import find
from randopt.errors import UserError


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for path, text in {
        "config/config.yaml": "experiment: demo\n",
        "config/paper/one.yaml": "experiment: one\n",
        "config/broken.yaml": "experiment: [\n",
        "config/tasks/task.yaml": "experiment: not-one\n",
        "results/experiments/old/config.yaml": "experiment: old\n",
        "results/experiments/demo/config.yaml": "experiment: demo\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def test_a_name_a_file_and_what_was_started(project) -> None:
    assert find.find_config("demo") == Path("config/config.yaml")
    assert find.find_config("one") == Path("config/paper/one.yaml")
    assert find.find_config("config/paper/one.yaml") == Path("config/paper/one.yaml")
    assert find.find_config("old") == Path("results/experiments/old/config.yaml")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("demmo", "no experiment 'demmo'.*known: demo, old, one"),
        ("not-one", "no experiment 'not-one'"),
        ("config/none.yaml", "no config file config/none.yaml"),
    ],
)
def test_what_is_not_there(name, words) -> None:
    with pytest.raises(UserError, match=words):
        find.find_config(name)


def test_two_files_of_one_name(project) -> None:
    (project / "config/copy.yaml").write_text("experiment: one\n")
    with pytest.raises(UserError, match=r"config/copy.yaml and config/paper/one.yaml both say"):
        find.find_config("one")


def test_the_started_configuration_comes_first_where_it_counts(project, tiny_model) -> None:
    config = {
        "experiment": "demo",
        "models": [{"name": "tiny", "source": f"path:{tiny_model}"}],
        "tasks": ["times_table"],
        "search": {"candidates": 8, "sigmas": [0.1], "shard_size": 8},
        "ensemble": {"top_k": [1]},
    }
    tasks = Path(find.__file__).parents[2] / "config/tasks"
    (project / "config/tasks/times_table.yaml").write_text((tasks / "times_table.yaml").read_text())
    (project / "results/experiments/demo/config.yaml").write_text(json.dumps(config))
    config["search"]["candidates"] = 16
    (project / "config/config.yaml").write_text(json.dumps(config))
    assert find.started("demo").runs[0].candidates == 8
    assert find.planned("demo").runs[0].candidates == 16
