"""Several workers of one shard: the tables of one, and every way in which a worker or their parent can die."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from randopt import tables
from tests.conftest import Checkout
from tests.workflow.tools import (
    WAIT,
    generate,
    leftovers,
    new_checkout,
    output_of,
    parts_of,
    progress_of,
    said,
    started,
    wait_until,
)

TOTAL = 240
SHARD = f"00000-{TOTAL - 1:05}"
SEARCH = f"search/completions/{SHARD}.parquet"


@pytest.fixture(scope="module")
def planned(tmp_path_factory, tiny_model) -> Checkout:
    """A checkout whose search, long enough to be interrupted, was made by one worker."""
    checkout = new_checkout(tmp_path_factory.mktemp("planned"), tiny_model)
    checkout.config["search"].update(candidates=TOTAL, shard_size=TOTAL)
    checkout.config["tasks"][0].update(splits={"select": 4, "confirm": 4, "test": 4}, max_tokens=2)
    checkout.snakemake("--until", "prepare_model", "prepare_items", "plan")
    alone = checkout.randopt(*generate(checkout, SHARD, threads=1)[3:])
    assert alone.returncode == 0, alone.stderr
    shutil.copy(checkout.run / SEARCH, checkout.folder / "alone.parquet")
    return checkout


@pytest.fixture
def ahead(planned) -> Checkout:
    """The same checkout with the search before it."""
    for name in ("completions", "ledger"):
        shutil.rmtree(planned.run / "search" / name, ignore_errors=True)  # a test that failed may have left none
    return planned


def workers_of(checkout: Checkout) -> list[int]:
    """Process ids of live workers and their controllers: whatever works in this checkout for submitit."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            here = os.readlink(folder / "cwd") == str(checkout.folder)
            if here and b"submitit" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def states(checkout: Checkout) -> dict[int, dict]:
    """What each worker of the newest attempt says of itself."""
    folder = checkout.run / f"search/completions/{SHARD}.parts"
    newest = max(folder.glob("workers-*"), key=lambda path: path.stat().st_mtime_ns, default=folder)
    return {int(path.stem): json.loads(path.read_text()) for path in newest.glob("[0-9].json")}


def all_at_work(checkout: Checkout, workers: int) -> bool:
    found = states(checkout)
    return len(found) == workers and all(state["done"] >= 1 for state in found.values())


def assert_as_alone(checkout: Checkout) -> None:
    assert (checkout.run / SEARCH).read_bytes() == (checkout.folder / "alone.parquet").read_bytes()
    assert leftovers(checkout) == []
    assert workers_of(checkout) == []


def test_three_workers_make_the_tables_of_one(ahead) -> None:
    done = ahead.randopt(*generate(ahead, SHARD, threads=3)[3:], "--workers", "3")
    assert done.returncode == 0, said(done)
    assert_as_alone(ahead)
    ledger = tables.read(ahead.run / f"search/ledger/{SHARD}.parquet", tables.LEDGER).row(0, named=True)
    assert (ledger["workers"], ledger["device"], ledger["requests_here"]) == (3, "3 × cpu", TOTAL)
    assert len(ledger["digests"]) == 3, "the last of each worker"
    assert ledger["seconds_total"] >= ledger["seconds_loading"] + ledger["seconds_generating"] > 0


def test_a_killed_worker_costs_its_slice_alone(ahead) -> None:
    command = [*generate(ahead, SHARD), "--workers", "2"]
    with started(ahead, command) as process:
        wait_until(lambda: states(ahead).get(1, {}).get("done", 0) >= 1, process)
        victim = states(ahead)[1]["pid"]
        assert victim in workers_of(ahead)
        os.kill(victim, signal.SIGKILL)
        assert process.wait(timeout=WAIT) == 2
    text = output_of(ahead)
    assert "error: 1 of 2 workers failed" in text and "Traceback" not in text
    assert "worker 1 (CPU): it ended without a word (killed?) (log " in text
    kept = parts_of(ahead, SHARD)
    assert f"{TOTAL - len(kept)} requests are missing" in text
    assert TOTAL // 2 < len(kept) < TOTAL, "all of the first slice, one at least of the second"
    assert workers_of(ahead) == []

    state = progress_of(ahead, SHARD)
    assert state["state"] == "failed" and state["done"] > TOTAL // 2 and state["device"] == "2 × cpu"
    status = " ".join(ahead.randopt("status", "tiny", "--once").stdout.split())  # long lines are folded
    assert "2 workers: 2 × cpu" in status and "worker 1 (CPU): it ended without a word" in status

    again = ahead.randopt(*command[3:])
    assert f"{TOTAL - len(kept)} of {TOTAL} requests are to be generated" in again.stderr
    assert again.returncode == 0, again.stderr
    assert_as_alone(ahead)
    ledger = tables.read(ahead.run / f"search/ledger/{SHARD}.parquet", tables.LEDGER).row(0, named=True)
    assert ledger["attempts"] == 2 and ledger["requests_here"] == TOTAL - len(kept)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(ahead, number) -> None:
    command = [*generate(ahead, SHARD), "--workers", "2"]
    with started(ahead, command) as process:
        wait_until(lambda: all_at_work(ahead, 2), process)
        assert len(workers_of(ahead)) == 4, "two workers, each with submitit's controller"
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # what a terminal does
        else:
            process.send_signal(number)
        process.wait(timeout=WAIT)
        end = time.monotonic() + WAIT
        while workers_of(ahead) and time.monotonic() < end:
            time.sleep(0.1)
        assert workers_of(ahead) == []
    text = output_of(ahead)
    assert "Traceback" not in text
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert f"interrupted ({signal.Signals(number).name}): everything finished is kept" in text
        assert progress_of(ahead, SHARD)["state"] == "interrupted"
    kept = parts_of(ahead, SHARD)
    assert 2 <= len(kept) < TOTAL

    if number == signal.SIGKILL:
        alone = ahead.randopt(*command[3:-2])  # one worker goes on where two were
        assert f"{TOTAL - len(kept)} of {TOTAL} requests are to be generated" in alone.stderr
        assert alone.returncode == 0, alone.stderr
        assert_as_alone(ahead)


def test_a_worker_that_the_user_can_mend_says_so_without_a_traceback(ahead) -> None:
    """Here: the weights changed after the run was planned."""
    (weights,) = Path(ahead.config["models"][0]["source"].removeprefix("path:")).glob("*.safetensors")
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:-2] + b"\1\1")
        done = ahead.randopt(*generate(ahead, SHARD)[3:], "--workers", "2")
    finally:
        weights.write_bytes(whole)
    assert done.returncode == 2
    assert f"2 of 2 workers failed, {TOTAL} requests are missing: worker 0 (CPU): error: " in done.stderr
    assert "changed since the model was prepared" in done.stderr and "Traceback" not in done.stderr
