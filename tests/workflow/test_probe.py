"""A probe before a search: it measures, sizes the shards, and none of its work is done again."""

import json
import shutil

import yaml

from randopt import tables


def test_a_probe_is_measured_and_taken_over(checkout) -> None:
    checkout.config["search"] = {"candidates": 16, "sigmas": [0.05, 0.2], "shard_minutes": 2}
    checkout.write_config()
    done = checkout.randopt("cost", "tiny.yaml", "--probe", "--", "--cores", "2", "--set-threads", "generate=1")
    assert done.returncode == 0, done.stderr
    assert "measured on 1 shard(s) of a probe (cpu)" in done.stdout
    probe = json.loads((checkout.run / "probe.json").read_text())
    assert probe["seconds_per_completion"] > 0
    assert not (checkout.run / "search").exists()

    checkout.snakemake("--set-threads", "generate=1", "--", "scores")
    size = yaml.safe_load((checkout.run / "run.yaml").read_text())["shard_size"]
    assert 1 <= size <= 16
    (first, *_) = sorted((checkout.run / "search/ledger").glob("*.parquet"))
    row = tables.read(first, tables.LEDGER).row(0, named=True)
    assert row["requests_here"] == row["stop"] - row["start"] - 4, "the probe's four candidates were there"

    said = checkout.randopt("cost", "tiny.yaml").stdout
    assert "of this run" in said and "0 of" in said
    known = checkout.randopt("cost", "tinny")
    assert known.returncode == 2 and "known: " in known.stderr and "tiny" in known.stderr

    # an output that Snakemake removes is taken over, and its ledger still says what it took
    before = tables.read(first, tables.LEDGER).row(0, named=True)
    for name in ("completions", "scores", "ledger"):
        for path in (checkout.run / "search" / name).rglob(f"{first.stem}.parquet"):
            path.unlink()
    checkout.snakemake("--set-threads", "generate=1", "--", "scores")
    after = tables.read(first, tables.LEDGER).row(0, named=True)
    assert after["requests_here"] == 0 and after["attempts"] == before["attempts"] + 1
    assert after["seconds_generating"] == before["seconds_generating"]
    shutil.rmtree(checkout.run)
