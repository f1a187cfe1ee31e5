"""The engine on a tiny real model: weights, restoring, batching, sampling, streaming."""

import dataclasses
import resource
from pathlib import Path

import pytest
import torch

from randopt import engines, noise, parts
from randopt.engines import EngineSettings, Item
from randopt.engines.prompts import batches, shared_prefix
from randopt.engines.sampling import next_tokens, stream_seed, uniform
from randopt.errors import UserError
from randopt.models import checkpoint
from randopt.models.prepare import load_manifest, prepare
from randopt.models.source import parse
from randopt.requests import Decoding, candidate
from randopt.shard import run_requests

SETTINGS = EngineSettings("bfloat16", 6, 4, "auto", "iid", (), 2)
GREEDY = Decoding()


@pytest.fixture(scope="module")
def manifest(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("prepared") / "manifest.json"
    prepare(parse(f"path:{tiny_model}", path.parent), "bfloat16", path.parent, path)
    return load_manifest(path)


@pytest.fixture
def engine(manifest):
    return engines.load("transformers", manifest, SETTINGS)


@pytest.fixture(scope="module")
def items() -> list[Item]:
    pairs = [(2, 3), (4, 5), (12, 13), (7, 8), (9, 9), (10, 11)]
    long = [Item("long", (("user", "What is 4 times 5 times 6 times 7 ? Answer with only the number ."),))]
    return [Item(f"i{a}", (("user", f"What is {a} times {b} ?"),)) for a, b in pairs] + long


def texts(engine, items, decoding=GREEDY) -> dict[str, str]:
    return {c.item_id: c.text for c in engine.generate(items, decoding)}


def test_weights_are_the_perturbation_of_the_checkpoint_tensors(engine, manifest) -> None:
    terms = ((5, 0.1), (9, -0.05))
    engine.set_weights(terms)
    for name, base in checkpoint.tensors(manifest.folder, manifest.tensors):
        expected = noise.perturb(base, name, terms)
        assert torch.equal(engine._live[name].cpu().view(torch.int16), expected.view(torch.int16)), name


def test_the_base_comes_back_exactly_after_many_perturbations(engine, manifest, items) -> None:
    digest = manifest.content["weights_digest"]
    assert engine.weights_digest() == digest
    before = texts(engine, items)
    answers = set()
    for seed in range(20):
        engine.set_weights(((seed, 0.3),))
        assert engine.weights_digest() != digest
        answers.add(tuple(sorted(texts(engine, items).items())))
    assert len(answers) > 5  # the perturbations do change what the model says
    engine.set_weights(())
    assert engine.weights_digest() == digest
    assert texts(engine, items) == before


def test_sigma_zero_gives_the_answers_of_the_base(engine, items) -> None:
    before = texts(engine, items)
    engine.set_weights(((1, 0.4),))
    engine.set_weights(((3, 0.0),))
    assert texts(engine, items) == before


def test_a_mirrored_perturbation_is_another_model(engine) -> None:
    engine.set_weights(((3, 0.1),))
    plus = engine.weights_digest()
    engine.set_weights(((3, -0.1),))
    assert engine.weights_digest() != plus


def test_excluded_tensors_stay_the_base(manifest) -> None:
    settings = dataclasses.replace(SETTINGS, exclude=("model.embed_tokens.*", "*norm*"))
    engine = engines.load("transformers", manifest, settings)
    engine.set_weights(((1, 0.5),))
    changed = {name for name, base in engine._base.items() if not torch.equal(engine._live[name], base)}
    assert changed == {n for n in engine._base if "norm" not in n and "embed" not in n}
    with pytest.raises(UserError, match="excludes every tensor"):
        engines.load("transformers", manifest, dataclasses.replace(SETTINGS, exclude=("*",)))


def test_greedy_texts_equal_those_of_the_library(tiny_model, tmp_path, items) -> None:
    """In float32 our loop, with shared prefix and shrinking batches, says what model.generate says."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "manifest.json"
    prepare(parse(f"path:{tiny_model}", tmp_path), "float32", tmp_path, path)
    settings = dataclasses.replace(SETTINGS, dtype="float32", max_tokens=12)
    ours = engines.load("transformers", load_manifest(path), settings)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    found = {c.item_id: c for c in ours.generate(items, GREEDY)}
    for item in items:
        ids = tokenizer(item.messages[0][1], return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert found[item.item_id].text == tokenizer.decode(out, skip_special_tokens=True)
        assert found[item.item_id].completion_tokens == len(out)
        assert found[item.item_id].prompt_tokens == ids.shape[1]
        assert found[item.item_id].finish_reason == ("stop" if out[-1] == 1 else "length")


def test_batches_and_their_size_do_not_change_float32_texts(tiny_model, tmp_path, items) -> None:
    path = tmp_path / "manifest.json"
    prepare(parse(f"path:{tiny_model}", tmp_path), "float32", tmp_path, path)
    found = []
    for size in (1, 3, 64):
        settings = dataclasses.replace(SETTINGS, dtype="float32", batch_size=size)
        engine = engines.load("transformers", load_manifest(path), settings)
        found.append([texts(engine, items), texts(engine, items, Decoding(0.8, 3))])
    assert found[0] == found[1] == found[2]


def test_samples_depend_on_their_seed_alone(engine, items) -> None:
    first = texts(engine, items, Decoding(1.0, 1))
    assert first != texts(engine, items, Decoding(1.0, 2))
    assert first == texts(engine, items, Decoding(1.0, 1))


def test_completions_stream_and_can_be_abandoned(engine, items) -> None:
    before = texts(engine, items)
    stream = engine.generate(items, GREEDY)
    next(stream)
    stream.close()
    assert texts(engine, items) == before


def test_ordered_items_are_answered_batch_by_batch_in_the_order_given(manifest, items) -> None:
    ordered = engines.load("transformers", manifest, dataclasses.replace(SETTINGS, batch_size=3, ordered=True))
    assert items[-1].item_id == "long", "unordered it would be in the first batch"
    found = [completion.item_id for completion in ordered.generate(items, GREEDY)]
    assert [set(found[:3]), set(found[3:6]), found[6]] == [{"i2", "i4", "i12"}, {"i7", "i9", "i10"}, "long"]


def test_a_broken_candidate_ends_and_the_base_returns(engine, items, manifest) -> None:
    engine.set_weights(((1, 1e30),))
    assert len(texts(engine, items)) == len(items)
    engine.set_weights(())
    assert engine.weights_digest() == manifest.content["weights_digest"]


def test_an_engine_that_is_not_installed_is_named_before_anything_runs(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    engines.require("transformers")
    with pytest.raises(UserError, match="make vllm"):
        engines.require("vllm")


def test_a_base_stays_on_the_device_where_it_leaves_room() -> None:
    from randopt.engines.vllm_engine import device_memory

    resident, share = device_memory(6, 80)
    assert resident and share == pytest.approx(0.9 - 6 / 80)
    assert device_memory(30, 80) == (False, 0.9)


def test_sampling_follows_the_distribution() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).repeat(4000, 1)
    ids = [f"item-{i}" for i in range(4000)]
    counts = torch.bincount(next_tokens(logits, Decoding(1.0, 7), ids, 0), minlength=3) / 4000
    # three standard errors of a share at n = 4000
    assert torch.allclose(counts, torch.tensor([0.5, 0.3, 0.2]), atol=0.024)
    cold = next_tokens(logits, Decoding(0.01, 7), ids, 0)
    assert (cold == 0).all()
    assert 0 <= uniform(1, "a", 0) < 1
    assert uniform(1, "a", 0) != uniform(1, "a", 1)
    seeds = {stream_seed(sample, item) for sample in range(20) for item in "abc"}
    assert len(seeds) == 60 and all(0 <= seed < 2**63 for seed in seeds)


def test_prefix_and_batches() -> None:
    assert shared_prefix([[1, 2, 3, 4], [1, 2, 9]]) == 2
    assert shared_prefix([[1, 2], [1, 2, 3]]) == 1  # a token of the shortest is left to predict from
    assert shared_prefix([[1], [2]]) == 0
    assert batches([3, 9, 5, 9], 3) == [[1, 3, 2], [0]]


def test_memory_that_runs_out_is_told_and_what_is_finished_stays(engine, items, tmp_path) -> None:
    many = [Item(f"{n}", (("user", f"What is {n} times 7 ? " * 400),)) for n in range(16)]
    kept = parts.Parts(tmp_path / "short.parquet", {"run_id": "short"}, [item.item_id for item in many])
    progress = parts.begin_attempt(None, "short", "search", (0, 3))
    engine.settings = dataclasses.replace(SETTINGS, batch_size=16)
    plan = [candidate(seed, 0.1) for seed in range(3)]
    generate, limit = engine.generate, resource.getrlimit(resource.RLIMIT_AS)

    def short_of_memory(problems, decoding):
        if progress.done == 1:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (512 << 20), limit[1]))
            # longer ones: what the first request has freed is kept and would do for the same again
            problems = [Item(item.item_id, (("user", item.messages[0][1] * 12),)) for item in problems]
        return generate(problems, decoding)

    engine.generate = short_of_memory
    try:
        with pytest.raises(UserError, match=r"16 items.*lower engine\.batch_size"):
            run_requests(engine, many, plan, kept, progress)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert [kept.read(request) is not None for request in plan] == [True, False, False]


def test_a_broken_candidate_ends_at_once_and_says_why(engine, items) -> None:
    before = texts(engine, items)
    engine.set_weights(((1, 1e39),))  # weights beyond bfloat16: infinite, and what is computed from them NaN
    found = list(engine.generate(items, GREEDY))
    assert {c.item_id for c in found} == {item.item_id for item in items}
    assert {(c.finish_reason, c.text, c.completion_tokens) for c in found} == {("nan", "", 1)}
    engine.set_weights(())
    assert texts(engine, items) == before
