"""A run on a tiny vision-language model, every command of the workflow in one process: items to metrics."""

import polars as pl
import pytest
import yaml
from typer.testing import CliRunner

from randopt import cli, config, experiment, layout, tables
from randopt.verify import verify
from tests.conftest import ROOT
from tests.vision import build_tiny_vision_model, task_file, write_questions

SIZES = {"select": {"size": 5}, "confirm": {"size": 4, "start": 5}, "test": {"size": 4, "start": 9}}


def command(*arguments) -> None:
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (arguments, done.output, done.exception)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A search of candidates of a tiny Qwen2.5-VL that is planned, its items made."""
    monkeypatch.chdir(tmp_path)
    build_tiny_vision_model(tmp_path / "model", "qwen2_5_vl", "bfloat16")
    write_questions(tmp_path / "data", 13)
    given = {
        "experiment": "tiny",
        "models": [{"name": "tiny", "source": f"path:{tmp_path / 'model'}"}],
        "tasks": [str(task_file(tmp_path / "data", {"file": "questions.jsonl"}, SIZES))],
        "search": {"candidates": 6, "sigmas": [0.05, 0.2], "shard_size": 3},
        "ensemble": {"top_k": [1, 3], "members": 3},
    }
    built = experiment.build(config.resolve(given), ROOT)
    experiment.describe(built)
    (run,) = built.runs
    command(
        "prepare-model",
        given["models"][0]["source"],
        "--dtype",
        "bfloat16",
        "--output",
        layout.manifest_file(run.model_id),
    )
    command("prepare-items", run.task_id)
    return built, run


def answer(run, stage: str) -> None:
    if layout.stage_kind(stage) != "members":  # whose requests the selection writes
        command("plan", run.folder, stage, "--rows", run.rows(stage))
    for shard in run.shards(stage):
        command("generate", run.folder, stage, layout.shard_name(shard), "--threads", 2, "--batch-size", 3)
        command("score", run.folder, stage, layout.shard_name(shard), "--scorer", "gqa")


def test_questions_about_pictures_from_items_to_metrics(run) -> None:
    built, run = run
    described = yaml.safe_load((run.folder / "run.yaml").read_text())
    assert described["model"]["exclude"] == ["*connector*", "*projector*", "*vision*", "*visual*"]
    assert len(list(layout.images_folder(layout.task_folder(run.task_id)).iterdir())) == 13
    for stage in (run.controls, "search", "random"):
        answer(run, stage)
    command("gather", run.folder, 6, "--scorer", "gqa")
    command("select", run.folder, 6, "--members", 3)
    answer(run, "n00006/members")
    command("vote", run.folder, 6, "--controls", run.controls, "--scorer", "gqa", "--top-k", "1,3")
    command("metrics", run.folder, 6, "--controls", run.controls, "--scorer", "gqa", "--bootstrap", 100)

    texts = pl.read_parquet(run.folder / "search" / "completions" / "*.parquet")
    assert texts.height == 6 * 5
    by_candidate = texts.group_by("request_id").agg(pl.col("text").sort_by("item_id"))
    assert by_candidate["text"].n_unique() > 1, "perturbations of the language model change what is said"
    votes = pl.read_parquet(run.folder / "n00006" / "votes.parquet")
    assert votes.filter(method="randopt", top_k=3)["item_id"].n_unique() == 13
    checks = verify(built)
    assert len(checks) > 3 and all(check.equal for check in checks), "seed and σ give the weights that answered"

    # The same run with two pictures exchanged: what was said of one is not taken for the other.
    path = layout.task_folder(run.task_id) / "select.parquet"
    frame = tables.read(path, tables.IMAGE_ITEMS)
    rows = frame.to_dicts()
    first, second = (row["messages"][0]["content"][0] for row in rows[:2])
    first["value"], second["value"] = second["value"], first["value"]
    tables.write(pl.DataFrame(rows, schema=frame.schema), tables.IMAGE_ITEMS, path)
    shard = layout.shard_name(run.shards("search")[0])
    done = CliRunner().invoke(cli.app, ["score", str(run.folder), "search", shard, "--scorer", "gqa"])
    assert done.exit_code != 0 and "items_hash" in f"{done.output} {done.exception}"
