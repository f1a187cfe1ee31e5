"""Engine vllm on a tiny vision-language model: texts, weights and tokens are those of the engine transformers.

An Idefics3, whose model in vLLM can be imported without torchvision.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from randopt import engines
from randopt.engines import Completion, EngineSettings, Item, vision
from randopt.images import read_cell
from randopt.models.prepare import load_manifest, prepare
from randopt.models.source import parse
from randopt.models.vision import TOWER
from randopt.requests import Decoding, Perturbation
from tests.unit.test_vllm_engine import process
from tests.vision import build_tiny_vision_model, picture

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here: run make vllm"
)

SETTINGS = EngineSettings("float32", 8, 4, "auto", "iid", TOWER, 2)
PERTURBATIONS: tuple[Perturbation, ...] = ((), ((7, 0.3),), ((8, 0.3),), ())
COLOURS = [(220, 30, 20), (30, 200, 40), (20, 40, 230), (240, 240, 10)]
SIZES = [(28, 28), (56, 28), (28, 28), (56, 84)]

Answers = list[tuple[str, dict[str, Completion]]]


def items() -> list[Item]:
    images = [read_cell(picture(c, s), Path(), "test") for c, s in zip(COLOURS, SIZES, strict=True)]
    asked = [
        Item(f"i{n}", (("user", (image, f" What colour is it {'is it ' * n}?")),)) for n, image in enumerate(images)
    ]
    return [*asked, Item("same", asked[0].messages[:]), Item("none", (("user", "Is it red ?"),))]


def answers(engine: Any) -> Answers:
    """Digest and completions at each perturbation."""
    found = []
    for perturbation in PERTURBATIONS:
        engine.set_weights(perturbation)
        completions = {c.item_id: c for c in engine.generate(items(), Decoding())}
        found.append((engine.weights_digest(), completions))
    return found


def with_vllm(manifest: str) -> tuple[Answers, Answers]:
    """With prepared pictures kept, and prepared again each time. Called in a process of its own."""
    engine = engines.load("vllm", load_manifest(Path(manifest)), SETTINGS)
    kept = answers(engine)
    engine._prompts.clear()
    vision.KEPT_BYTES = 0
    return kept, answers(engine)


def test_pictures_reach_vllm_and_its_caches_do_not_outlive_a_candidate(tmp_path) -> None:
    model = build_tiny_vision_model(tmp_path / "model", "idefics3", head_dim=32)
    prepare(parse(f"path:{model}", tmp_path), "float32", tmp_path, tmp_path / "manifest.json")
    with process() as call:
        kept, again = call(with_vllm, str(tmp_path / "manifest.json"))
    expected = answers(engines.load("transformers", load_manifest(tmp_path / "manifest.json"), SETTINGS))
    assert kept == expected
    assert again == expected
    assert expected[0] == expected[3] and len({digest for digest, _ in expected}) == 3
    assert len({c.text for c in expected[0][1].values()}) > 2
