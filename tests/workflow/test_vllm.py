"""The workflow with engine vllm: a run of its own, the same texts in float32."""

import importlib.util
import json

import polars as pl
import pytest

from tests.conftest import Checkout, build_tiny_model


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here: run make vllm")
def test_a_search_with_vllm_is_a_run_of_its_own_with_the_same_texts(tmp_path, tmp_path_factory) -> None:
    checkout = Checkout(tmp_path, build_tiny_model(tmp_path_factory.mktemp("model") / "tiny", head_dim=32))
    checkout.config["models"][0]["dtype"] = "float32"
    checkout.config["search"]["shard_size"] = 16
    found = {}
    for engine in ("transformers", "vllm"):
        checkout.config["engine"] = {"name": engine}
        before = set(tmp_path.glob("results/tiny/times_table/*"))
        checkout.snakemake("--cores", "2", "scores")
        (run,) = set(tmp_path.glob("results/tiny/times_table/*")) - before
        found[engine] = pl.read_parquet(run / "search" / "completions" / "*.parquet")
        ledger = pl.read_parquet(run / "search" / "ledger" / "*.parquet").row(0, named=True)
        assert ledger["device"] == "cpu"
        assert ("vllm" in "".join(json.loads(ledger["versions"]))) == (engine == "vllm")
    assert found["vllm"].equals(found["transformers"])
