"""A task that runs models' programs: nothing starts without a sandbox, and with one programs are judged."""

import json
from pathlib import Path

import polars as pl

from tests.unit.sandboxes import need_bubblewrap

ROWS = (Path(__file__).parents[1] / "data" / "mbpp.jsonl").read_text("utf-8")


def ask_for_programs(checkout) -> None:
    (checkout.folder / "mbpp.jsonl").write_text(ROWS)
    parts = {"select": (0, 4), "confirm": (4, 4), "test": (8, 4)}
    splits = {name: {"part": "train", "start": start, "size": size} for name, (start, size) in parts.items()}
    source = {"file": str(checkout.folder / "mbpp.jsonl")}
    checkout.config["tasks"] = [{"name": "mbpp", "source": source, "splits": splits, "max_tokens": 4}]
    checkout.config["search"] = {"candidates": 3, "sigmas": [0.05], "shard_size": 3}
    checkout.config["ensemble"] = {"top_k": [1]}


def test_nothing_starts_without_a_sandbox(checkout, monkeypatch):
    ask_for_programs(checkout)
    checkout.config["scoring"] = {"sandbox": "bubblewrap"}
    empty = checkout.folder / "bin"
    empty.mkdir()
    (empty / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    (empty / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(empty), prepend=":")
    done = checkout.snakemake("--", "scores", check=False)
    assert done.returncode and "No permissions to create new namespace" in done.stderr + done.stdout
    assert not list((checkout.folder / "results").glob("*/mbpp"))


def test_programs_are_judged(checkout):
    need_bubblewrap()
    ask_for_programs(checkout)
    checkout.snakemake("--", "scores")
    (scores,) = checkout.folder.glob("results/tiny/mbpp/*/search/scores/mbpp-v1/*.parquet")
    assert pl.read_parquet(scores).select("reward", "scorer").unique().rows() == [(0.0, "mbpp")]  # a nonsense model
    line = json.dumps({"response": "<answer>def f(x): return x</answer>", "reference": {"code": "def f(x): return x",
            "test_list": ["assert f(2) == 2"]}})  # fmt: skip
    judged = checkout.randopt("judge", "mbpp", stdin=line)
    assert json.loads(judged.stdout)["strict"], judged.stderr
    assert "bubblewrap: works" in checkout.randopt("sandbox").stdout
