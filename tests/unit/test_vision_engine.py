"""Vision-language models in the engine `transformers`: pictures reach the answers, the vision tower stays the base."""

import dataclasses
from pathlib import Path

import pytest
import torch

from randopt import engines
from randopt.engines import EngineSettings, Item
from randopt.engines.vision import load_processor
from randopt.errors import UserError
from randopt.images import Image, read_cell
from randopt.models.prepare import Manifest, load_manifest, prepare
from randopt.models.source import parse
from randopt.models.vision import TOWER
from randopt.requests import Decoding
from tests.vision import FAMILIES, SIDE, build_tiny_vision_model, picture

SETTINGS = EngineSettings("float32", 8, 4, "auto", "iid", TOWER, 2)
GREEDY = Decoding()
COLOURS = [(220, 30, 20), (30, 200, 40), (20, 40, 230), (240, 240, 10)]
SIZES = [(SIDE, SIDE), (2 * SIDE, SIDE), (SIDE, SIDE), (2 * SIDE, 3 * SIDE)]


def shown(item_id: str, image: Image, question: str = "What colour is it ?") -> Item:
    return Item(item_id, (("user", (image, f" {question}")),))


@pytest.fixture(scope="module")
def pictures() -> list[Image]:
    return [read_cell(picture(c, s), Path(), "test") for c, s in zip(COLOURS, SIZES, strict=True)]


@pytest.fixture(scope="module")
def items(pictures) -> list[Item]:
    """Pictures of several shapes, two of them in one prompt, questions of several lengths, and one without any."""
    asked = [shown(f"i{n}", image, f"What colour is it {'is it ' * n}?") for n, image in enumerate(pictures)]
    both = Item("two", (("user", (pictures[0], " Is it ", pictures[3], " red ?")),))
    return [*asked, both, Item("none", (("user", "Is it red ?"),))]


def prepared(family: str, folder: Path, dtype: str = "float32") -> Manifest:
    model = build_tiny_vision_model(folder / "model", family, dtype)
    prepare(parse(f"path:{model}", folder), dtype, folder, folder / "manifest.json")
    return load_manifest(folder / "manifest.json")


@pytest.fixture(scope="module", params=FAMILIES)
def manifest(request, tmp_path_factory) -> Manifest:
    return prepared(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def engine(manifest):
    return engines.load("transformers", manifest, SETTINGS)


def completions(engine, items):
    engine.set_weights(())
    return {c.item_id: c for c in engine.generate(items, GREEDY)}


def test_greedy_texts_equal_those_of_the_library(engine, manifest, items) -> None:
    """Batches of four with pictures of several shapes say what the library's own generate says one at a time."""
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(manifest.folder, dtype=torch.float32)
    processor = load_processor(manifest.folder)
    found = completions(engine, items)
    assert set(found) == {item.item_id for item in items}
    for item in items:
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part.decoded()}
            for part in ([item.messages[0][1]] if isinstance(item.messages[0][1], str) else item.messages[0][1])
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        width = inputs["input_ids"].shape[1]
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, width:]
        assert found[item.item_id].text == processor.tokenizer.decode(out, skip_special_tokens=True), item
        assert found[item.item_id].prompt_tokens == width
        assert found[item.item_id].completion_tokens == len(out)


def test_a_batch_is_as_one_at_a_time(engine, manifest, items) -> None:
    single = engines.load("transformers", manifest, dataclasses.replace(SETTINGS, batch_size=1))
    assert completions(single, items) == completions(engine, items)
    ordered = engines.load("transformers", manifest, dataclasses.replace(SETTINGS, batch_size=3, ordered=True))
    stream = list(ordered.generate(items, GREEDY))
    assert {c.item_id for c in stream[:3]} == {item.item_id for item in items[:3]}
    assert {c.item_id: c for c in stream} == completions(engine, items)


def test_another_picture_is_another_answer(engine, pictures) -> None:
    same = [shown(f"i{n}", read_cell(picture(colour), Path(), "test")) for n, colour in enumerate(COLOURS)]
    assert len({c.text for c in completions(engine, same).values()}) > 1


def test_the_vision_tower_stays_the_base_and_the_base_comes_back(engine, manifest, items) -> None:
    before = completions(engine, items)
    digest = manifest.content["weights_digest"]
    assert engine.weights_digest() == digest
    engine.set_weights(((7, 0.3),))
    changed = {name for name, base in engine._base.items() if not torch.equal(engine._live[name], base)}
    assert {c.item_id: c.text for c in engine.generate(items, GREEDY)} != {i: c.text for i, c in before.items()}
    towers = {
        name for name in engine._base if any(word in name for word in ("vision", "visual", "projector", "connec"))
    }
    assert len(towers) > 20 and changed == set(engine._base) - towers
    engine.set_weights(())
    assert engine.weights_digest() == digest
    assert completions(engine, items) == before


def test_an_explicit_empty_exclude_perturbs_the_tower(manifest) -> None:
    every = engines.load("transformers", manifest, dataclasses.replace(SETTINGS, exclude=()))
    every.set_weights(((7, 0.3),))
    assert all(not torch.equal(every._live[name], base) for name, base in every._base.items())


def test_pictures_beyond_the_memory_are_prepared_again(manifest, items, monkeypatch) -> None:
    from randopt.engines import vision

    kept = completions(engines.load("transformers", manifest, SETTINGS), items)
    monkeypatch.setattr(vision, "KEPT_BYTES", 0)
    assert completions(engines.load("transformers", manifest, SETTINGS), items) == kept


def test_a_text_with_the_mark_of_pictures_is_refused_by_name(engine, pictures) -> None:
    mark = engine._vision.processor.image_token
    with pytest.raises(UserError, match=r"item trick: the model's processor refuses it"):
        completions(engine, [shown("trick", pictures[0], f"What {mark} is it ?")])


def test_a_language_model_refuses_pictures(tiny_model, tmp_path, pictures) -> None:
    prepare(parse(f"path:{tiny_model}", tmp_path), "bfloat16", tmp_path, tmp_path / "manifest.json")
    settings = dataclasses.replace(SETTINGS, dtype="bfloat16", exclude=())
    engine = engines.load("transformers", load_manifest(tmp_path / "manifest.json"), settings)
    with pytest.raises(UserError, match="item i0 asks about a picture, which a language model does not see"):
        completions(engine, [shown("i0", pictures[0])])
    with pytest.raises(UserError, match=r"matches no tensor of the model; give patterns for its vision tower"):
        engines.load(
            "transformers", load_manifest(tmp_path / "manifest.json"), dataclasses.replace(settings, exclude=TOWER)
        )
