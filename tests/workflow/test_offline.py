"""Compute nodes without a network, and with a disk of their own."""

import shutil
import socket
import subprocess

import pytest

from randopt import tables
from tests.conftest import Checkout
from tests.workflow.tools import SEARCH, forget_search, generate, new_checkout, refused, said

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Every Python process that finds this writes down whom it asks, and at its end what it believes of the network.
SPY = """
import atexit, os, sys
asked = open(os.environ["ASKED"], "a", buffering=1)
def spy(event, arguments):
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(arguments[1], tuple)):
        asked.write(f"asked {arguments}\\n")
def beliefs():
    from huggingface_hub.constants import HF_HUB_OFFLINE
    asked.write(f"offline {HF_HUB_OFFLINE} {os.environ['TRANSFORMERS_OFFLINE']} {os.environ['HF_DATASETS_OFFLINE']}\\n")
sys.addaudithook(spy)
atexit.register(beliefs)
"""


def without_network() -> list[str]:
    """The command that runs another one in a network namespace of its own, with no way out."""
    for command in (["unshare", "--net"], ["unshare", "--map-root-user", "--net"]):
        try:
            if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
                return command
        except FileNotFoundError:
            break
    pytest.skip("unshare --net is not allowed here")


def test_a_node_without_network_and_an_environment_that_denies_it(
    tmp_path, tiny_model, undisturbed, monkeypatch
) -> None:
    """Model and items are staged first; generate and score then ask nobody, whatever HF_HUB_OFFLINE says."""
    isolated = without_network()
    checkout = new_checkout(tmp_path / "checkout", tiny_model)
    checkout.config["models"][0]["source"] = f"hf:org/tiny@{COMMIT}"
    snapshot = tmp_path / "hub/models--org--tiny/snapshots" / COMMIT
    shutil.copytree(tiny_model, snapshot)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    checkout.snakemake("--until", "prepare_model", "prepare_items", "plan")

    (tmp_path / "spy").mkdir()
    (tmp_path / "spy/sitecustomize.py").write_text(SPY)
    asked = tmp_path / "asked"
    environment = {
        **checkout.environment,
        "PYTHONPATH": f"{tmp_path / 'spy'}:{checkout.environment['PYTHONPATH']}",
        "ASKED": str(asked),
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
    }
    command = generate(checkout)
    score = [*command[:3], "score", *command[4:7], "--scorer", "number"]
    for step in (command, score):
        done = subprocess.run(
            [*isolated, *step],
            cwd=checkout.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert asked.read_text() == "offline True 1 1\n" * 2
    for name in (SEARCH, "search/scores/number-v1/00000-00015.parquet"):
        schema = tables.COMPLETIONS if name == SEARCH else tables.SCORES
        assert tables.read(checkout.run / name, schema).equals(tables.read(undisturbed.run / name, schema))

    # a cache on a disk that only the login node has
    forget_search(checkout)
    (tmp_path / "hub").rename(tmp_path / "elsewhere")
    done = checkout.randopt(*command[3:])
    refused(done, f"error: {snapshot}, the model's folder", f"cannot be seen on {socket.gethostname()}", "set HF_HOME")


def logs(checkout: Checkout) -> str:
    return "".join(path.read_text() for path in checkout.folder.glob("logs/generate/**/*.log"))


def test_a_copy_on_the_node_gives_the_same_tables(tmp_path, tiny_model, undisturbed, monkeypatch) -> None:
    node = tmp_path / "node disk"
    node.mkdir()
    monkeypatch.setenv("NODE_DISK", str(node))
    checkout = new_checkout(tmp_path / "checkout", tiny_model)
    checkout.snakemake("--set-resources", "generate:scratch='$NODE_DISK/of me'")
    assert checkout.tables() == undisturbed.tables()
    assert logs(checkout).count("copying") == 1, "four shards, one copy"
    assert logs(checkout).count("read from this node's copy") == 4
    (copy,) = (node / "of me").glob("randopt-*/tiny-*")

    # bits that rotted in the copy, at the same size: noticed, and the shard does not fail for it
    forget_search(checkout)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000] + bytes(1000))
    done = checkout.randopt(*generate(checkout)[3:], "--scratch", "$NODE_DISK/of me")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "this node's copy was damaged (the base weights as loaded have the digest" in done.stderr
    assert not copy.exists(), "the next job makes it again"
    assert (checkout.run / SEARCH).read_bytes() == (undisturbed.run / SEARCH).read_bytes()

    # a disk that this node does not have
    forget_search(checkout)
    done = checkout.randopt(*generate(checkout)[3:], "--scratch", "$NO_SUCH_DISK/x")
    assert done.returncode == 0 and "not every variable in it is set" in done.stderr
    assert (checkout.run / SEARCH).read_bytes() == (undisturbed.run / SEARCH).read_bytes()


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (None, ""),
        ("", ""),
        ("'$NODE_DISK/x'", "'/node disk/x'"),
        ("$NODE_DISK/x", "'/node disk/x'"),
        ("/scratch/me", "/scratch/me"),
        ("'$NO_SUCH_DISK/x'", "'$NO_SUCH_DISK/x'"),
        ("${NO_SUCH_DISK}", "'${NO_SUCH_DISK}'"),
    ],
)
def test_what_a_profile_says_reaches_the_command(finished, monkeypatch, asked, given) -> None:
    """Snakemake expands what is set where the job runs; the rest is the command's, so that bash does not stumble."""
    monkeypatch.setenv("NODE_DISK", "/node disk")
    forget_search(finished)
    arguments = [] if asked is None else ["--set-resources", f"generate:scratch={asked}"]
    text = said(finished.snakemake("-n", "-p", *arguments))
    assert f" --scratch={given} 2>" in text
