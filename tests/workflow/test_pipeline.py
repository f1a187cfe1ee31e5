"""The whole workflow on a tiny real model, run as a user runs it, then changed as users change it.

The tests of this module share one checkout and stand in the order of a working day: each starts from
the finished state that the one before left.
"""

import re
import shutil

import polars as pl
import pytest

from randopt import tables
from tests.conftest import Checkout


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model) -> Checkout:
    checkout = Checkout(tmp_path_factory.mktemp("pipeline"), tiny_model)
    checkout.snakemake()
    return checkout


def planned(checkout: Checkout, *arguments: str) -> dict[str, int]:
    """Jobs per rule of a dry run; empty when nothing is to be done."""
    text = checkout.snakemake("-n", *arguments).stdout + checkout.snakemake("-n", *arguments).stderr
    counts = {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", text, flags=re.M)}
    counts.pop("total", None)
    counts.pop("all", None)
    return counts


def generated(checkout: Checkout) -> set[str]:
    """Shards whose completions exist."""
    return {str(p.relative_to(checkout.run)) for p in checkout.run.rglob("completions/*.parquet")}


def test_everything_is_made_and_then_nothing_is_to_be_done(finished) -> None:
    assert generated(finished) == {
        "search/completions/00000-00007.parquet",
        "search/completions/00008-00015.parquet",
        "controls-t0.7/completions/00000-00001.parquet",
        "controls-t0.7/completions/00002-00003.parquet",
        "controls-t0.7/completions/00004-00004.parquet",
        "random/completions/00000-00002.parquet",
        "n00016/members/completions/00000-00002.parquet",
    }
    assert not list(finished.folder.rglob("*.parts")), "parts are removed once merged"
    report = finished.folder / "results/experiments/tiny"
    assert "RandOpt" in (report / "report.md").read_text()
    assert {p.suffix for p in (report / "figures").glob("[!.]*")} == {".png", ".svg"}
    assert planned(finished) == {}


def test_the_tables_say_what_the_design_says(finished) -> None:
    candidates = tables.read(finished.run / "n00016/candidates.parquet", tables.CANDIDATES)
    assert candidates["seed"].to_list() == list(range(1, 17))
    assert candidates["sigma"].to_list() == [0.05, 0.2] * 8
    assert candidates["items"].unique().to_list() == [6]
    assert candidates["reward"].n_unique() > 1, "the tiny model must not score the same everywhere"
    selection = tables.read(finished.run / "n00016/selection.parquet", tables.SELECTION)
    ranked = candidates.sort(["reward", "seed"], descending=[True, False])
    assert selection["seed"].to_list() == ranked["seed"].to_list()[:3]
    metrics = tables.read(finished.run / "n00016/metrics.parquet", tables.METRICS)
    methods = {"base", "self_consistency", "member_mean", "top1", "random", "randopt"}
    assert set(metrics["method"]) == methods
    assert set(metrics["split"]) == {"select", "confirm", "test"}
    assert metrics.filter(pl.col("ci_low") > pl.col("value")).is_empty()
    assert metrics.filter(pl.col("ci_high") < pl.col("value")).is_empty()


def test_items_of_the_splits_are_disjoint(finished) -> None:
    (folder,) = finished.folder.glob("results/tasks/times_table-*")
    items = [tables.read(folder / f"{s}.parquet", tables.ITEMS) for s in ("select", "confirm", "test")]
    assert [frame.height for frame in items] == [6, 5, 8]
    everything = pl.concat(items)
    for split in items:
        others = everything.filter(~pl.col("item_id").is_in(split["item_id"].to_list()))
        assert not set(split["content_hash"]) & set(others["content_hash"])


def test_a_prediction_was_made_by_the_weights_it_names(finished) -> None:
    """Any completion can be made again from (seed, σ) alone, with nothing but the library."""
    from randopt import engines, noise
    from randopt.items import to_items
    from randopt.models import checkpoint
    from randopt.models.prepare import load_manifest
    from randopt.requests import Decoding

    (path,) = finished.folder.glob("results/models/tiny-*/manifest.json")
    manifest = load_manifest(path)
    engine = engines.load("transformers", manifest, engines.EngineSettings("bfloat16", 4, 64, "auto", "iid", (), 2))
    for name, base in checkpoint.tensors(manifest.folder, manifest.tensors):
        engine._live[name].copy_(noise.perturb(base, name, [(6, 0.2)]))
    (folder,) = finished.folder.glob("results/tasks/times_table-*")
    items = to_items(tables.read(folder / "select.parquet", tables.ITEMS), folder)
    found = {c.item_id: c.text for c in engine.generate(items, Decoding())}
    candidates = tables.read(finished.run / "n00016/candidates.parquet", tables.CANDIDATES)
    request = candidates.filter(pl.col("seed") == 6)["request_id"].item()
    kept = tables.read(finished.run / "search/completions/00000-00007.parquet", tables.COMPLETIONS)
    rows = kept.filter(pl.col("request_id") == request).select("item_id", "text").iter_rows()
    assert dict(rows) == found


def test_status_and_show_speak_of_the_finished_run(finished) -> None:
    status = finished.randopt("status", "tiny", "--once")
    assert status.returncode == 0, status.stderr
    assert "16/16" in status.stdout and "best so far: seed" in status.stdout
    show = finished.randopt("show", "tiny")
    assert show.returncode == 0 and "self-consistency" in show.stdout


def test_another_k_needs_no_generation(finished) -> None:
    finished.config["ensemble"]["top_k"] = [1, 3]
    assert planned(finished) == {"vote": 1, "metrics": 1, "report": 1}
    finished.snakemake()
    votes = tables.read(finished.run / "n00016/votes.parquet", tables.VOTES)
    assert set(votes["top_k"]) == {1, 3}


def test_a_deleted_shard_is_all_that_runs_again(finished) -> None:
    before = finished.tables()
    (finished.run / "search/completions/00008-00015.parquet").unlink()
    jobs = planned(finished)
    assert jobs["generate"] == 1 and jobs["score"] == 1
    finished.snakemake()
    assert finished.tables() == before


def test_a_new_scorer_version_needs_no_generation(finished) -> None:
    path = finished.folder / "workflow/randopt/tasks/scorers/__init__.py"
    text = path.read_text()
    assert 'Scorer("number", 1' in text
    path.write_text(text.replace('Scorer("number", 1', 'Scorer("number", 2'))
    jobs = planned(finished)
    assert "generate" not in jobs and jobs["score"] == 7
    finished.snakemake()
    scores = tables.read(finished.run / "search/scores/number-v2/00000-00007.parquet", tables.SCORES)
    assert scores["scorer_version"].unique().to_list() == [2]
    assert planned(finished) == {}


def test_a_larger_n_runs_the_new_candidates_alone(finished) -> None:
    before = finished.tables()
    finished.config["search"]["candidates"] = 20
    jobs = planned(finished)
    assert jobs["generate"] == 2  # rows 16-19, and the members of the new selection
    finished.snakemake()
    after = finished.tables()
    old = {p: b for p, b in before.items() if p.endswith("/search/requests.parquet") or "experiments" not in p}
    changed = {p for p, b in old.items() if after[p] != b}
    assert changed == {str((finished.run / "search/requests.parquet").relative_to(finished.folder))}
    smaller = tables.read(finished.run / "n00016/candidates.parquet", tables.CANDIDATES)
    larger = tables.read(finished.run / "n00020/candidates.parquet", tables.CANDIDATES)
    assert larger.head(16).equals(smaller)


def test_a_shard_that_grows_takes_over_what_it_has(finished) -> None:
    finished.config["search"]["candidates"] = 24
    finished.snakemake()
    ledger = tables.read(finished.run / "search/ledger/00016-00023.parquet", tables.LEDGER)
    assert ledger["requests_here"].item() == 4, "rows 16-19 were already there"
    before = finished.tables()
    for name in ("completions", "scores/number-v2", "ledger"):
        shutil.rmtree(finished.run / "search" / name)
    finished.snakemake()
    after = finished.tables()
    fresh = {p: b for p, b in before.items() if "00016-00019" not in p}
    assert {p: after[p] for p in fresh} == fresh, "resumed and undisturbed runs are the same bytes"


def test_gathered_in_blocks_the_candidates_are_the_same_files(finished) -> None:
    files = [finished.run / f"n{n:05d}/candidates.parquet" for n in (24, 20)]
    targets = [str(path.relative_to(finished.folder)) for path in files]
    finished.snakemake("--", targets[1])  # 20 rows end within a shard
    before = [path.read_bytes() for path in files]

    module = finished.folder / "workflow/randopt/layout.py"
    text = module.read_text()
    assert "GATHER_BLOCK = 1000" in text
    module.write_text(text.replace("GATHER_BLOCK = 1000", "GATHER_BLOCK = 2"))
    done = finished.snakemake("--", *targets)
    module.write_text(text)
    assert dict(re.findall(r"^(gather\w*|score|generate) +(\d+)$", done.stdout + done.stderr, flags=re.M)) == {
        "gather_block": "3",
        "gather": "2",
    }
    made = {path.name for path in finished.run.glob("search/blocks/number-v2/*")}
    assert made == {"00000-00015.parquet", "00016-00019.parquet", "00016-00023.parquet"}
    assert [path.read_bytes() for path in files] == before
    shutil.rmtree(finished.run / "search/blocks")


def test_another_shard_size_is_refused(finished) -> None:
    finished.config["search"]["shard_size"] = 6
    done = finished.snakemake("-n", check=False)
    finished.config["search"]["shard_size"] = 8
    said = done.stdout + done.stderr
    assert done.returncode != 0 and "fixed it at 8" in said and "Traceback" not in said


def test_prefixes_of_one_population_are_reported(finished) -> None:
    finished.config["search"]["prefixes"] = [8, 16]
    finished.snakemake()
    metrics = tables.read(finished.folder / "results/experiments/tiny/metrics.parquet", tables.METRICS)
    assert set(metrics["candidates"]) == {8, 16, 24}


def test_the_rule_graph_is_drawn(finished) -> None:
    done = finished.randopt("dag", "--configfile", "tiny.yaml", "--output", "dag.svg")
    assert done.returncode == 0, done.stderr
    svg = (finished.folder / "dag.svg").read_text()
    for rule in ("prepare_model", "generate", "score", "gather", "select", "vote", "metrics", "report"):
        assert f">{rule}<" in svg


def test_models_times_tasks_are_runs_of_one_experiment(tmp_path, tiny_model) -> None:
    checkout = Checkout(tmp_path, tiny_model)
    checkout.config["models"].append({**checkout.config["models"][0], "name": "twin", "dtype": "float32"})
    checkout.config["tasks"].append({"name": "countdown", "splits": {"select": 4, "confirm": 4, "test": 4}})
    jobs = planned(checkout)
    assert jobs["prepare_model"] == jobs["prepare_items"] == 2
    assert jobs["gather"] == jobs["metrics"] == 4 and jobs["report"] == 1
