"""randopt verify on a finished run: every member, one expert, and what a changed file does."""

import json
import os
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from randopt import tables
from tests.conftest import Checkout
from tests.workflow.tools import refused, said


@pytest.fixture
def weights(finished: Checkout):
    """The model's weights, as they were before and after the test."""
    (path,) = Path(finished.config["models"][0]["source"].removeprefix("path:")).glob("*.safetensors")
    whole, status = path.read_bytes(), path.stat()
    yield path
    path.write_bytes(whole)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def row(text: str, *words: str) -> str:
    (line,) = [line for line in text.splitlines() if all(word in line for word in words)]
    return line


def test_what_engines_recorded_comes_out_of_seed_and_sigma_again(finished) -> None:
    done = finished.randopt("verify", "tiny")
    assert done.returncode == 0, said(done)
    assert "DIFFERENT" not in done.stdout and "rebuilding weights: 100%" in done.stderr
    assert "manifest" in row(done.stdout, "base", "equal")
    folder = finished.run
    selection = tables.read(folder / "n00016/selection.parquet", tables.SELECTION)
    for expert in selection.iter_rows(named=True):
        line = row(done.stdout, f" {expert['seed']} ", f" {expert['sigma']:g} ", "equal")
        assert "members" in line or "random" in line, "answered in the one, or taken over from the other"
    last = tables.read(folder / "search/requests.parquet", tables.REQUESTS)["perturbation"][-1][0]
    assert "search 00000-00015" in row(done.stdout, f" {last['seed']} ", "equal")

    one = finished.randopt("verify", "tiny", "--rank", "1")
    assert one.returncode == 0, said(one)
    found = row(one.stdout, f" {selection['seed'][0]} ", f" {selection['sigma'][0]:g} ", "equal")
    assert found.split() == row(done.stdout, f" {selection['seed'][0]} ", "equal").split()
    assert one.stdout.count("equal") == 2, "the base and the expert"


def test_one_candidate_of_which_nothing_was_recorded(finished) -> None:
    ledgers = [tables.read(path, tables.LEDGER) for path in finished.run.rglob("ledger/*.parquet")]
    known = {entry["request_id"] for ledger in ledgers for entry in ledger["digests"].item()}
    requests = tables.read(finished.run / "search/requests.parquet", tables.REQUESTS)
    unknown = requests.filter(~pl.col("request_id").is_in(known))["perturbation"][0][0]
    done = finished.randopt("verify", "tiny", "--seed", str(unknown["seed"]))
    assert done.returncode == 2
    assert f" {unknown['coefficient']:g} " in row(done.stdout, f" {unknown['seed']} ", "nothing was recorded")
    assert "nothing was recorded to compare with" in done.stderr
    refused(finished.randopt("verify", "tiny", "--seed", "4000"), "has no seed 4000")
    refused(finished.randopt("verify", "tiny", "--rank", "4"), "has no rank 4")
    refused(finished.randopt("verify", "tiny", "--rank", "1", "--seed", "1"), "give one of them")


def test_another_checkpoint_or_another_record_is_seen(finished, weights) -> None:
    (path,) = finished.run.glob("random/ledger/*.parquet")
    ledger = tables.read(path, tables.LEDGER)
    footer = {key: value for key, value in tables.footer(path).items() if key != "table"}
    digests = ledger["digests"].item().to_list()
    digests[0]["digest"] = "0" * 32
    changed = ledger.with_columns(digests=pl.Series([digests], dtype=tables.DIGESTS))
    tables.write(changed, tables.LEDGER, path, **footer)
    done = finished.randopt("verify", "tiny")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "0" * 32 in row(done.stdout, "DIFFERENT")

    digests[0]["request_id"] = "f" * 16
    foreign = ledger.with_columns(digests=pl.Series([digests], dtype=tables.DIGESTS))
    tables.write(foreign, tables.LEDGER, path, **footer)
    refused(finished.randopt("verify", "tiny"), str(path.relative_to(finished.folder)), "records request " + "f" * 16)
    before = {name: dtype for name, dtype in tables.LEDGER.schema.items() if name != "digests"}
    tables.write(ledger, replace(tables.LEDGER, schema=pl.Schema(before)), path, **footer)
    refused(finished.randopt("verify", "tiny"), "written by another version")
    tables.write(ledger, tables.LEDGER, path, **footer)

    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 1
    weights.write_bytes(whole)
    refused(finished.randopt("verify", "tiny"), "changed since the model was prepared")
    (manifest,) = finished.folder.glob("results/models/*/manifest.json")
    recorded = json.loads(manifest.read_text())["files"][weights.name]["mtime_ns"]
    os.utime(weights, ns=(recorded, recorded))  # as bits rot: size and time are the recorded ones
    done = finished.randopt("verify", "tiny", "--rank", "1")
    assert done.returncode == 1 and done.stdout.count("DIFFERENT") == 2, said(done)
