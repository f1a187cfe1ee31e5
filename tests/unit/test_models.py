"""Model sources, checkpoints and manifests: what is refused, and what is noticed later."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from randopt.errors import UserError
from randopt.models import checkpoint
from randopt.models.prepare import load_manifest, prepare
from randopt.models.source import parse


@pytest.fixture
def copy(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "copy")


def made(folder, tmp_path):
    out = tmp_path / "out" / "manifest.json"
    prepare(parse(f"path:{folder}", tmp_path), "bfloat16", tmp_path, out)
    return out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hf:org/name", "expected hf:ORG/NAME@COMMIT"),
        ("hf:org/name@main", "A branch moves"),
        ("path:nowhere", "is no folder"),
        ("package:no-such-package-here", "is not installed"),
        ("ftp:x", "expected hf:"),
    ],
)
def test_a_bad_source_is_told_before_anything_runs(text, words, tmp_path) -> None:
    with pytest.raises(UserError, match=words):
        parse(text, tmp_path)


def test_a_folder_without_config_or_weights_is_refused(tmp_path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(UserError, match=r"has no config\.json"):
        parse("path:m", tmp_path)
    (tmp_path / "m" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="pickles are never loaded"):
        parse("path:m", tmp_path)


def test_the_revision_of_a_folder_follows_its_weights(copy, tmp_path) -> None:
    before = parse("path:copy", tmp_path).revision
    assert parse("path:copy", tmp_path).revision == before
    save_file({"x": torch.zeros(3)}, copy / "extra.safetensors")
    assert parse("path:copy", tmp_path).revision != before


def test_a_quantised_checkpoint_is_refused(copy, tmp_path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError, match=r"quantised checkpoint.*gptq"):
        made(copy, tmp_path)
    (copy / "config.json").write_text(json.dumps(config))
    save_file({"layer.qweight": torch.zeros(3, dtype=torch.int32)}, copy / "extra.safetensors")
    with pytest.raises(UserError, match=r"quantised checkpoint.*layer\.qweight"):
        made(copy, tmp_path)


@pytest.mark.parametrize("damage", ["cut", "header", "length", "empty"])
def test_a_damaged_safetensors_file_is_named(copy, tmp_path, damage) -> None:
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    broken = {
        "cut": whole[:-100],
        "header": whole[:8] + b"#" + whole[9:],
        "length": b"\xff" * 8 + whole[8:],
        "empty": b"",
    }[damage]
    path.write_bytes(broken)
    with pytest.raises(UserError, match=r"model\.safetensors is not a whole safetensors file"):
        made(copy, tmp_path)


def test_weights_that_change_later_are_noticed(copy, tmp_path) -> None:
    out = made(copy, tmp_path)
    assert load_manifest(out).content["parameters"] > 0
    path = copy / "model.safetensors"
    path.touch()  # another time, equal content: fine
    load_manifest(out)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="changed since the model was prepared"):
        load_manifest(out)
    path.unlink()
    with pytest.raises(UserError, match="is gone"):
        load_manifest(out)


@pytest.mark.parametrize(
    ("source", "remedy"),
    [
        ("hf:org/name", "set HF_HOME to a folder that every node sees, remove .*manifest.json and run again"),
        ("path:copy", "Move the model to a folder that every node sees"),
        ("package:name", "To make it again, remove .*manifest.json and run again"),
    ],
)
def test_a_folder_that_a_node_does_not_see_is_named_with_the_node_and_the_remedy(
    copy, tmp_path, source, remedy
) -> None:
    out = made(copy, tmp_path)
    out.write_text(json.dumps({**json.loads(out.read_text()), "source": source}))
    shutil.rmtree(copy)
    with pytest.raises(UserError, match=f"{copy}.* cannot be seen on {socket.gethostname()}.*{remedy}"):
        load_manifest(out)


def test_the_digest_sees_names_shapes_types_and_bits() -> None:
    base = {"a": torch.arange(6.0), "b": torch.ones(2)}
    digest = checkpoint.weights_digest(base.items())
    assert checkpoint.weights_digest(reversed(base.items())) == digest
    others = [
        {**base, "a": torch.arange(6.0).reshape(2, 3)},
        {**base, "a": torch.arange(6.0).half()},
        {**base, "a": torch.arange(6.0) + 1},
        {"a": base["a"], "c": base["b"]},
    ]
    assert len({digest, *(checkpoint.weights_digest(other.items()) for other in others)}) == 5


def test_a_missing_tokenizer_is_told(copy, tmp_path) -> None:
    for path in copy.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        made(copy, tmp_path)


def test_a_checkpoint_with_a_missing_shard_is_told(copy, tmp_path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks model-00002\.safetensors"):
        made(copy, tmp_path)


def test_a_hub_model_in_the_cache_needs_no_network(tiny_model, tmp_path) -> None:
    """In a process of its own: the Hub library reads its environment when it is imported.

    The cache's place may be given relative to the folder of that moment; the manifest's is good anywhere.
    """
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(tiny_model, tmp_path / "hub" / "models--org--tiny" / "snapshots" / commit)
    code = (
        "import sys; from pathlib import Path; from randopt.models.prepare import prepare, load_manifest\n"
        "from randopt.models.source import parse\n"
        "out = Path(sys.argv[2]); prepare(parse(sys.argv[1], Path()), 'bfloat16', Path(), out)\n"
        "print(load_manifest(out).content['folder'])"
    )

    def fetched(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, f"hf:org/{name}@{commit}", str(tmp_path / name / "manifest.json")]
        environment = {**os.environ, "HF_HOME": ".", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    cached = fetched("tiny")
    assert cached.stdout.strip() == str(tmp_path / "hub/models--org--tiny/snapshots" / commit), cached.stderr
    absent = fetched("absent")
    assert absent.returncode != 0 and "cannot fetch org/absent" in absent.stderr
