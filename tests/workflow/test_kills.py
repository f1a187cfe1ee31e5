"""Kills, Ctrl-C, two copies of a job: at most the request in flight is lost."""

import os
import random
import re
import shutil
import signal
import subprocess
import time

import polars as pl

from randopt import layout, tables
from tests.workflow.tools import (
    SEARCH,
    WAIT,
    finish,
    forget_search,
    generate,
    leftovers,
    new_checkout,
    output_of,
    parts_of,
    progress_of,
    started,
    wait_until,
)


def test_ten_kills_of_a_shard_cost_only_what_was_in_flight(tmp_path, tiny_model) -> None:
    total, shard = 200, "00000-00199"
    checkout = new_checkout(tmp_path, tiny_model)
    checkout.config["search"].update(candidates=total, shard_size=total)
    checkout.config["tasks"][0].update(splits={"select": 4, "confirm": 4, "test": 4}, max_tokens=2)
    checkout.snakemake("--until", "prepare_model", "prepare_items", "plan")
    output = checkout.run / f"search/completions/{shard}.parquet"
    # as a process leaves it that is killed while it writes the final output
    output.parent.mkdir(parents=True)
    (output.parent / f".{output.name}.killed.tmp").write_bytes(b"half a table")

    rng = random.Random(20)
    for attempt in range(10):
        before = parts_of(checkout, shard)
        with started(checkout, generate(checkout, shard)) as process:
            if attempt in (1, 6):  # at some moment of the start, the loading, or soon after
                time.sleep(rng.uniform(0.1, 3))
            else:
                wanted = len(before) + rng.randint(1, 15)
                wait_until(lambda wanted=wanted: len(parts_of(checkout, shard)) >= wanted, process)
                time.sleep(rng.uniform(0, 0.05))
            assert process.poll() is None, "the shard was finished before it could be killed"
            process.kill()
        after = parts_of(checkout, shard)
        assert {name: after.get(name) for name in before} == before, "a finished part was touched"
        assert attempt in (1, 6) or len(after) > len(before)
        assert not output.exists()

    kept = parts_of(checkout, shard)
    assert 0 < len(kept) < total
    last = checkout.randopt(*generate(checkout, shard)[3:])
    assert last.returncode == 0, last.stderr
    assert f"{total - len(kept)} of {total} requests are to be generated" in last.stderr
    ledger = tables.read(checkout.run / f"search/ledger/{shard}.parquet", tables.LEDGER)
    assert ledger["requests_here"].item() == total - len(kept)
    assert ledger["attempts"].item() >= 9  # one that is killed before it can say so is not counted
    assert leftovers(checkout) == []

    resumed = tmp_path / "resumed.parquet"
    output.rename(resumed)
    layout.kept_file(output).unlink()  # or it would be taken over
    again = checkout.randopt(*generate(checkout, shard)[3:])
    assert f"{total} of {total} requests are to be generated" in again.stderr
    assert output.read_bytes() == resumed.read_bytes()
    assert tables.read(output, tables.COMPLETIONS)["text"].n_unique() > 10, "equal bytes must mean something"


def test_a_killed_shard_fails_its_snakemake_and_the_same_command_goes_on(tmp_path, tiny_model, undisturbed) -> None:
    checkout = new_checkout(tmp_path, tiny_model)
    killed = []
    with started(checkout, checkout.command()) as process:

        def kill() -> bool:
            if not list(checkout.folder.glob("results/tiny/*/*/search")):
                return False
            parts = parts_of(checkout)
            if not parts:
                return False
            pid = progress_of(checkout)["pid"]
            assert os.readlink(f"/proc/{pid}/cwd") == str(checkout.folder)
            os.kill(pid, signal.SIGKILL)
            killed.append(parts)
            return True

        wait_until(kill, process)
        assert process.wait(timeout=WAIT) != 0
    text = output_of(checkout)
    assert "Traceback" not in text
    assert f"logs/generate/{checkout.run.relative_to(checkout.folder / 'results')}/search/00000-00015.log" in text
    assert "Everything finished is kept: run the same command again" in text
    assert "killed?" in text, "the status of the dead shard"
    assert not (checkout.run / SEARCH).exists()
    kept = parts_of(checkout)
    assert 0 < len(kept) < 16
    assert {name: kept[name] for name in killed[0]} == killed[0]

    finish(checkout, undisturbed)
    ledger = tables.read(checkout.run / "search/ledger/00000-00015.parquet", tables.LEDGER)
    assert ledger["requests_here"].item() == 16 - len(kept)
    assert ledger["attempts"].item() == 2


def test_ctrl_c_leaves_a_state_that_the_same_command_resumes(finished, undisturbed) -> None:
    forget_search(finished)
    with started(finished, finished.command()) as process:
        wait_until(lambda: len(parts_of(finished)) >= 2, process)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does: the whole process group
        assert process.wait(timeout=WAIT) != 0
    assert "Traceback" not in output_of(finished)
    kept = parts_of(finished)
    assert 2 <= len(kept) < 16
    assert progress_of(finished)["state"] == "interrupted"
    log = next(finished.folder.glob("logs/generate/tiny/*/*/search/*.log")).read_text()
    assert "interrupted (SIGINT): everything finished is kept" in log

    finish(finished, undisturbed)  # no --unlock by hand
    ledger = tables.read(finished.run / "search/ledger/00000-00015.parquet", tables.LEDGER)
    assert ledger["requests_here"].item() == 16 - len(kept)


def test_sigterm_is_answered_and_torn_and_foreign_parts_are_redone(finished, undisturbed) -> None:
    forget_search(finished)
    with started(finished, generate(finished)) as process:
        wait_until(lambda: len(parts_of(finished)) >= 4, process)
        process.terminate()
        assert process.wait(timeout=WAIT) == 130
    text = output_of(finished)
    assert "interrupted (SIGTERM): everything finished is kept; run the same command again" in text
    assert "Traceback" not in text
    state = progress_of(finished)
    assert state["state"] == "interrupted" and state["done"] >= 4
    status = finished.randopt("status", "tiny", "--once")
    assert status.returncode == 0 and "SIGTERM" in status.stdout

    kept = sorted(parts_of(finished))
    folder = finished.run / "search/completions/00000-00015.parts"
    torn, other_run, other_items = (folder / name for name in kept[:3])
    torn.write_bytes(torn.read_bytes()[:-300])
    for path, footer in (
        (other_run, {"run_id": "0123456789"}),
        (other_items, {"items_hash": "0123456789abcdef"}),
    ):
        own = {key: value for key, value in tables.footer(path).items() if key != "table"}
        rows = tables.read(path, tables.COMPLETIONS).with_columns(text=pl.lit("5"))
        tables.write(rows, tables.COMPLETIONS, path, **{**own, **footer})
    again = finished.randopt(*generate(finished)[3:])
    assert again.returncode == 0, again.stderr
    assert f"{16 - len(kept) + 3} of 16 requests are to be generated" in again.stderr
    for path in (torn, other_run, other_items):
        assert re.search(f"part ignored and redone: .*{path.name}", again.stderr)
    assert (finished.run / SEARCH).read_bytes() == (undisturbed.run / SEARCH).read_bytes()
    assert leftovers(finished) == []


def test_two_copies_of_a_shard_at_once_do_no_harm(finished, undisturbed) -> None:
    """As after a driver was killed and started again while its job still ran."""
    forget_search(finished)
    command = [*generate(finished, threads=1)]
    copies = [
        subprocess.Popen(command, cwd=finished.folder, env=finished.environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        words = [copy.communicate(timeout=WAIT)[1] for copy in copies]
    finally:
        for copy in copies:
            copy.kill()
    assert [copy.returncode for copy in copies] == [0, 0], words
    assert (finished.run / SEARCH).read_bytes() == (undisturbed.run / SEARCH).read_bytes()
    assert leftovers(finished) == []

    # a third that comes when all is done finds everything there
    third = finished.randopt(*command[3:])
    assert third.returncode == 0 and "0 of 16 requests are to be generated" in third.stderr
    assert (finished.run / SEARCH).read_bytes() == (undisturbed.run / SEARCH).read_bytes()
    assert leftovers(finished) == []


def test_a_copy_that_lost_its_parts_to_a_faster_one_ends_well(finished, undisturbed) -> None:
    forget_search(finished)
    with started(finished, generate(finished)) as process:
        wait_until(lambda: len(parts_of(finished)) >= 3, process)
        process.send_signal(signal.SIGSTOP)
        shutil.copy(undisturbed.run / SEARCH, finished.run / SEARCH)
        shutil.rmtree(finished.run / "search/completions/00000-00015.parts")
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=WAIT) == 0, output_of(finished)
    assert (finished.run / SEARCH).read_bytes() == (undisturbed.run / SEARCH).read_bytes()
    assert leftovers(finished) == []
