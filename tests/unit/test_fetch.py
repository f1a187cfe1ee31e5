"""randopt fetch, with the Hub's real client, against a server of this machine that answers as the Hub does."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from randopt.tasks.hub import _patterns

ROOT = Path(__file__).parents[2]
MODEL, DATA = "a" * 40, "b" * 40
CARD = {
    "configs": [
        {"config_name": "main", "data_files": [{"split": "train", "path": "main/train-*"}]},
        {"config_name": "pictures", "data_files": "pictures/*"},
    ]
}


class Hub(BaseHTTPRequestHandler):
    """Two repositories; `asked` is what was asked for."""

    files: dict[str, dict[str, bytes]]
    asked: list[str]

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path}")
        for repository, files in self.files.items():
            if kind == "api" and repository in path and "/commits/" in path:
                about = {"title": "", "message": "", "date": "2026-01-01T00:00:00.000Z", "authors": []}
                history = [{"id": commit, **about} for commit in ("c" * 40, DATA, "b" * 6 + "a" * 34)]
                return self._send(200, json.dumps(history).encode())
            if kind == "api" and repository in path and "/tree/" in path:
                listing = [
                    {"type": "file", "path": name, "size": len(content), "oid": sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
                return self._send(200, json.dumps(listing).encode())
            name = path.partition("/resolve/")[2].partition("/")[2]
            if repository in path and name in files:
                content = files[name]
                headers = {"ETag": f'"{sha1(content).hexdigest()}"', "X-Repo-Commit": path.split("/resolve/")[1][:40]}
                return self._send(200, content, headers)
        self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tiny_model, tmp_path) -> Iterator[str]:
    import polars as pl

    table = pl.DataFrame({"question": [f"Q{n}" for n in range(12)], "answer": [str(n) for n in range(12)]})
    table.write_parquet(tmp_path / "train.parquet")
    Hub.files = {
        "org/tiny": {path.name: path.read_bytes() for path in tiny_model.iterdir()},
        "org/sums": {
            "README.md": f"---\n{yaml.safe_dump(CARD)}---\nSums.\n".encode(),
            "main/train-00000.parquet": (tmp_path / "train.parquet").read_bytes(),
            "pictures/large.parquet": b"never asked for",
        },
    }
    Hub.files["org/tiny"]["pytorch_model.bin"] = b"a pickle"
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def randopt(hub, tmp_path):
    """The command, in a folder with a config of that model and that data set."""
    task = {
        "version": 1,
        "source": {"hub": "org/sums", "config": "main", "revision": DATA},
        "prompt": [{"role": "user", "content": "{question}"}],
        "reference": "answer",
        "splits": {"select": 4, "confirm": {"size": 4, "start": 4}, "test": {"size": 4, "start": 8}},
        "max_tokens": 4,
        "scorer": "exact",
    }
    config = {
        "experiment": "x",
        "models": [{"name": "tiny", "source": f"hf:org/tiny@{MODEL}"}],
        "tasks": ["sums.yaml"],
        "search": {"candidates": 4, "sigmas": [0.1], "shard_size": 4},
        "ensemble": {"top_k": [1]},
    }
    (tmp_path / "sums.yaml").write_text(json.dumps(task))
    (tmp_path / "mine.yaml").write_text(json.dumps(config))

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment = {
            **kept,
            "PYTHONPATH": str(ROOT / "workflow"),
            "HF_HOME": str(tmp_path / "home"),
            "HF_ENDPOINT": hub,
            **variables,
        }
        return subprocess.run(
            [sys.executable, "-m", "randopt.cli", *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    return run


def test_everything_is_fetched_once_and_then_used_offline(randopt, tmp_path):
    first = randopt("fetch", "mine.yaml")
    assert first.returncode == 0, first.stderr
    assert f"model org/tiny@{MODEL[:12]}: fetched " in first.stdout
    assert f"data set org/sums (main)@{DATA[:12]}: fetched " in first.stdout
    assert not any("large" in asked or "pytorch_model" in asked for asked in Hub.asked)
    weights = tmp_path / "home/hub/models--org--tiny/snapshots" / MODEL / "model.safetensors"
    assert weights.read_bytes() == Hub.files["org/tiny"]["model.safetensors"]

    Hub.asked.clear()
    again = randopt("fetch", "mine.yaml")
    assert again.returncode == 0 and again.stdout.count("was there already; ") == 2, again.stdout + again.stderr
    assert not any("org/" in asked for asked in Hub.asked), "nobody is asked for what is there"

    checked = randopt("task", "check", "sums.yaml", "--answer", "0", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://nowhere")
    assert checked.returncode == 0 and "Q8" in checked.stdout, checked.stderr


def test_a_shortened_commit_is_looked_up_once(randopt, tmp_path):
    task = json.loads((tmp_path / "sums.yaml").read_text())
    task["source"]["revision"] = DATA[:7]
    (tmp_path / "sums.yaml").write_text(json.dumps(task))
    first = randopt("task", "check", "sums.yaml")
    assert first.returncode == 0 and (tmp_path / "home/hub/datasets--org--sums/snapshots" / DATA).is_dir(), first.stderr
    Hub.asked.clear()
    again = randopt("task", "check", "sums.yaml", HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and not Hub.asked, again.stderr
    task["source"]["revision"] = "d" * 7
    (tmp_path / "sums.yaml").write_text(json.dumps(task))
    unknown = randopt("task", "check", "sums.yaml")
    assert unknown.returncode != 0 and "0 of its commits begin so; give all 40 digits" in unknown.stderr


def test_what_cannot_be_fetched_is_named_and_the_rest_is_there(randopt, tmp_path):
    del Hub.files["org/sums"]
    done = randopt("fetch", "mine.yaml")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"data set org/sums (main)@{DATA[:12]}" in done.stderr and "model org/tiny" in done.stdout
    done = randopt("fetch", "mine.yaml", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "HF_HUB_OFFLINE is set" in done.stderr


def test_where_the_files_of_a_configuration_lie():
    assert _patterns(CARD, "main") == ["main/train-*"] and _patterns(CARD, "pictures") == ["pictures/*"]
    assert _patterns(CARD, None) == [] and _patterns({}, "main") == []
    card = {
        "configs": [{"config_name": "default", "data_dir": "x", "data_files": [{"split": "a", "path": ["1", "2"]}]}]
    }
    assert _patterns(card, None) == ["x/1", "x/2"]
    assert _patterns({"configs": [{"config_name": "c", "data_dir": "x"}]}, "c") == ["x/*"]
