"""Node-local copies of weights: one a node, always whole, and never the reason that a job fails."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from randopt import engines
from randopt.errors import UserError
from randopt.models import local_copy
from randopt.models.local_copy import discard_damaged, local_manifest, scratch_folder
from randopt.models.prepare import Manifest, load_manifest, prepare, read_manifest
from randopt.models.source import parse

# What a job does, in a process of its own; prints the inode of the weights it would read.
JOB = """
import logging, sys
from pathlib import Path
from randopt.models.local_copy import local_manifest
from randopt.models.prepare import read_manifest
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
local = local_manifest(read_manifest(Path(sys.argv[1])), Path(sys.argv[2]))
print((local.folder / "model.safetensors").stat().st_ino)
"""


def recorded(folder: Path, out: Path) -> Manifest:
    """A manifest of the files of `folder`, whatever they are: copying does not look inside."""
    files = {
        path.name: {
            "size": path.stat().st_size,
            "mtime_ns": path.stat().st_mtime_ns,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.iterdir())
    }
    out.parent.mkdir(parents=True)
    out.write_text(
        json.dumps({"source": "path:m", "folder": str(folder), "files": files, "weights_digest": "0123456789abcdef"})
    )
    return read_manifest(out)


@pytest.fixture
def model(tmp_path) -> Manifest:
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(os.urandom(300_000))
    (folder / "tokenizer.json").write_text('{"a": 1}')
    return recorded(folder, tmp_path / "models/tiny-abc/manifest.json")


@pytest.fixture
def scratch(tmp_path) -> Path:
    return tmp_path / "node local"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def leftovers(scratch: Path) -> list[Path]:
    return list(scratch.glob("randopt-*/.*.tmp"))


@pytest.fixture
def job(model, scratch, tmp_path):
    """Starts jobs; returns the process and a function that tells what it has said so far."""
    processes = []

    def start():
        said = tmp_path / f"job{len(processes)}.log"
        with open(said, "w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-c", JOB, str(model.path), str(scratch)],
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
            )
        processes.append(process)
        return process, said.read_text

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def wait_until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.001)


# --- a copy is made and used ------------------------------------------------------------------------------


def test_a_copy_is_made_once_and_found_again(model, scratch, caplog) -> None:
    caplog.set_level(logging.INFO)
    local = local_manifest(model, scratch)
    assert local.folder == scratch / f"randopt-{os.getuid()}" / "tiny-abc-0123456789"
    assert content(local.folder) == content(model.folder)
    assert {key: value for key, value in local.content.items() if key != "folder"} == {
        key: value for key, value in model.content.items() if key != "folder"
    }
    stamps = [path.stat() for path in sorted(local.folder.iterdir())]
    again = local_manifest(model, scratch)
    assert again == local
    assert [path.stat().st_ino for path in sorted(again.folder.iterdir())] == [stamp.st_ino for stamp in stamps]
    assert caplog.text.count("copying") == 1 and leftovers(scratch) == []
    assert local.folder.parent.stat().st_mode & 0o077 == 0, "nobody else may put weights there"


def test_an_engine_loads_from_the_copy_when_the_originals_are_gone(tiny_model, tmp_path, scratch) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "m"))
    path = tmp_path / "out/manifest.json"
    prepare(parse("path:m", tmp_path), "bfloat16", tmp_path, path)
    local_manifest(read_manifest(path), scratch)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="cannot be seen on"):
        load_manifest(path)
    local = local_manifest(read_manifest(path), scratch)
    engine = engines.load("transformers", local, engines.EngineSettings("bfloat16", 4, 8, "auto", "iid", (), 1))
    assert engine.weights_digest() == local.content["weights_digest"]


def test_jobs_that_start_together_make_one_copy(model, scratch, job) -> None:
    folder = scratch / f"randopt-{os.getuid()}"
    folder.mkdir(parents=True, mode=0o700)
    with open(folder / ".tiny-abc-0123456789.lock", "ab") as lock:  # so that all of them meet
        fcntl.flock(lock, fcntl.LOCK_EX)
        jobs = [job() for _ in range(3)]
        wait_until(lambda: all("waiting for it" in said() for _, said in jobs))
    inodes = {process.communicate(timeout=60)[0] for process, _ in jobs}
    assert [process.returncode for process, _ in jobs] == [0, 0, 0]
    everything = "".join(said() for _, said in jobs)
    assert everything.count("copying") == 1
    assert everything.count("read from this node's copy") == 3
    assert inodes == {f"{(folder / 'tiny-abc-0123456789/model.safetensors').stat().st_ino}\n"}
    assert leftovers(scratch) == []


# --- copies that are not whole ----------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "missing", "tokenizer", "a file"])
def test_a_damaged_copy_is_made_again(model, scratch, caplog, damage) -> None:
    caplog.set_level(logging.INFO)
    folder = local_manifest(model, scratch).folder
    weights, tokenizer = folder / "model.safetensors", folder / "tokenizer.json"
    if damage == "cut":
        os.truncate(weights, 1000)
    elif damage == "missing":
        weights.unlink()
    elif damage == "tokenizer":  # no digest covers it, so its content is compared, not its size alone
        tokenizer.write_text('{"a": 2}')
    else:
        shutil.rmtree(folder)
        folder.write_text("not a folder")
    assert local_manifest(model, scratch).folder == folder
    assert content(folder) == content(model.folder)
    assert "is not whole: it is made again" in caplog.text and leftovers(scratch) == []


def test_weights_that_rotted_at_their_size_are_found_when_asked(model, scratch) -> None:
    local = local_manifest(model, scratch)
    assert not discard_damaged(local) and local.folder.is_dir()
    weights = local.folder / "model.safetensors"
    with open(weights, "r+b") as stream, open(weights, "rb") as reader:
        stream.seek(1000)
        stream.write(bytes(10))
        stream.flush()
        assert discard_damaged(local)
        assert not local.folder.exists() and leftovers(scratch) == []
        assert len(reader.read()) == 300_000, "who has it open goes on"
    assert discard_damaged(local), "a copy that is gone is no good either"
    assert content(local_manifest(model, scratch).folder) == content(model.folder)


def test_originals_that_changed_are_not_copied(model, scratch, caplog) -> None:
    weights = model.folder / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    weights.write_bytes(bytes(300_000))
    with pytest.raises(UserError, match="changed since the model was prepared"):
        local_manifest(model, scratch)
    assert caplog.text == "", "it is the model that is wrong, not scratch"
    os.utime(weights, ns=(stamp, stamp))  # a change that size and time do not tell
    assert local_manifest(model, scratch) is model
    assert "read with another content than was recorded" in caplog.text
    assert not list(scratch.glob("*/tiny*")) and leftovers(scratch) == []


# --- scratch that cannot be used --------------------------------------------------------------------------


def refused(model: Manifest, scratch: Path, caplog, *words: str) -> None:
    """The job reads the shared folder, and says so once."""
    assert local_manifest(model, scratch) is model
    (record,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    for word in ("read from the shared folder", str(model.folder), *words):
        assert word in record.getMessage()
    assert leftovers(scratch) == []


def test_too_little_space_is_a_warning(model, scratch, caplog, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, local_copy.MARGIN + 1000))
    refused(model, scratch, caplog, "1.1 GB needed")


def test_a_disk_that_fills_up_meanwhile_is_a_warning(model, scratch, caplog, monkeypatch) -> None:
    def full(source: Path, target: Path, record: dict) -> None:
        target.write_bytes(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local_copy, "_copy", full)
    refused(model, scratch, caplog, "No space left")


def test_a_folder_that_cannot_be_made_is_a_warning(model, tmp_path, caplog) -> None:
    (tmp_path / "file").touch()
    refused(model, tmp_path / "file" / "below", caplog, "Not a directory")


@pytest.mark.parametrize("trap", ["link", "open"])
def test_a_folder_that_others_can_write_is_not_trusted(model, scratch, tmp_path, caplog, trap) -> None:
    folder = scratch / f"randopt-{os.getuid()}"
    scratch.mkdir()
    if trap == "link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    refused(model, scratch, caplog, "not a folder that only you can write")


def test_variables_are_expanded_on_the_node(monkeypatch, caplog) -> None:
    monkeypatch.setenv("NODE_DISK", "/node disk")
    monkeypatch.delenv("NO_SUCH_DISK", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert scratch_folder("") is scratch_folder("  ") is None
    assert scratch_folder("$NODE_DISK/${NODE_DISK}") == Path("/node disk/node disk")
    assert scratch_folder("~/x") == Path("/home/me/x")
    assert caplog.text == ""
    assert scratch_folder("$NO_SUCH_DISK/x") is None
    assert "$NO_SUCH_DISK/x was given, but not every variable in it is set" in caplog.text
    assert scratch_folder("'/quoted once too often'") is None
    assert "is no absolute path" in caplog.text


# --- copiers that die -------------------------------------------------------------------------------------


def test_an_interrupted_copier_cleans_up(model, scratch, monkeypatch) -> None:
    def interrupted(source: Path, target: Path, record: dict) -> None:
        target.write_bytes(b"some")
        raise KeyboardInterrupt

    monkeypatch.setattr(local_copy, "_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        local_manifest(model, scratch)
    assert leftovers(scratch) == [] and not list(scratch.glob("*/tiny*"))


def test_a_killed_copier_harms_nobody(model, scratch, job, tmp_path) -> None:
    """Killed in the middle while another job waits: that one takes away what is left and makes the copy."""
    big = model.folder / "model.safetensors"
    with open(big, "wb") as stream:
        stream.truncate(200_000_000)
    shutil.rmtree(model.path.parent)
    recorded(model.folder, model.path)

    def copied() -> int:
        return sum(path.stat().st_size for path in scratch.glob("randopt-*/.*.tmp/*.safetensors"))

    first, _ = job()
    wait_until(lambda: copied() > 0)
    first.send_signal(signal.SIGSTOP)
    assert copied() < 200_000_000, "it was stopped too late for this test to test anything"
    second, said = job()
    wait_until(lambda: "waiting for it" in said())
    assert not list(scratch.glob("*/tiny*"))
    (torn,) = leftovers(scratch)
    first.kill()
    inode = second.communicate(timeout=60)[0]
    assert second.returncode == 0 and said().count("copying") == 1
    (copy,) = scratch.glob("*/tiny*")
    assert inode == f"{(copy / big.name).stat().st_ino}\n"
    assert not torn.exists() and leftovers(scratch) == []
    assert hashlib.sha256((copy / big.name).read_bytes()).digest() == hashlib.sha256(big.read_bytes()).digest()
