"""What goes wrong in practice: kills, Ctrl-C, torn and foreign files, bad input, full disks, two copies of a job.

Every test starts real processes on a tiny real model. The measure is always the same: the message tells a
person what to do, nothing finished is lost, and in the end the tables are those of an undisturbed run, byte
for byte (the ledger, which holds times, excepted).
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import polars as pl
import pytest

from randopt import layout, tables
from randopt.experiment import load_run
from tests.conftest import Checkout

WAIT = 240  # seconds after which something that should have happened counts as never happening
SEARCH = "search/completions/00000-00015.parquet"


def new_checkout(folder: Path, model: Path) -> Checkout:
    """A checkout whose stages have one shard each."""
    folder.mkdir(exist_ok=True)
    checkout = Checkout(folder, model)
    checkout.config["search"]["shard_size"] = 16
    return checkout


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_model) -> Checkout:
    """A finished run; tests work on copies of it."""
    checkout = new_checkout(tmp_path_factory.mktemp("undisturbed"), tiny_model)
    checkout.snakemake()
    return checkout


@pytest.fixture
def finished(tmp_path, tiny_model, undisturbed) -> Checkout:
    """A copy of the finished run, with Snakemake's records of it."""
    return copy_of(undisturbed, tmp_path, tiny_model)


def copy_of(original: Checkout, folder: Path, model: Path) -> Checkout:
    checkout = new_checkout(folder, model)
    for name in ("results", ".snakemake"):
        shutil.copytree(original.folder / name, folder / name, dirs_exist_ok=True)
    for kept in (folder / "results").rglob("*.kept"):  # a second name of one file, as it was
        kept.unlink()
        os.link(kept.with_suffix(".parquet"), kept)
    return checkout


def forget_search(checkout: Checkout) -> None:
    """Take away what the search generated: the next start has one shard to make."""
    for name in ("completions", "ledger"):
        shutil.rmtree(checkout.run / "search" / name)


def said(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout + done.stderr


def refused(done: subprocess.CompletedProcess[str], *words: str) -> str:
    """What a failed command said: every one of `words`, and no traceback."""
    text = said(done)
    assert done.returncode != 0, text
    assert "Traceback" not in text
    for word in words:
        assert word in text, f"{word!r} is not in:\n{text}"
    return text


def jobs(text: str) -> dict[str, int]:
    """Jobs per rule in Snakemake's job table."""
    counts = {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", text, flags=re.M)}
    return {name: count for name, count in counts.items() if name not in ("total", "all")}


@contextmanager
def started(checkout: Checkout, command: list[str]) -> Iterator[subprocess.Popen]:
    """A process group of its own, as a terminal makes it; its output goes to `output.txt`."""
    with open(checkout.folder / "output.txt", "w") as output:
        process = subprocess.Popen(
            command,
            cwd=checkout.folder,
            env=checkout.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=WAIT)


def output_of(checkout: Checkout) -> str:
    return (checkout.folder / "output.txt").read_text()


def wait_until(condition: Callable[[], object], process: subprocess.Popen) -> None:
    """Until `condition()`, which must come true before the process ends."""
    end = time.monotonic() + WAIT
    while not condition():
        assert process.poll() is None, "the process ended before anything could be done to it"
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.005)


def generate(checkout: Checkout, shard: str = "00000-00015", threads: int = 2) -> list[str]:
    """The command that the rule generate calls, for a search shard."""
    folder = str(checkout.run.relative_to(checkout.folder))
    randopt = [sys.executable, "-m", "randopt.cli", "generate"]
    return [*randopt, folder, "search", shard, "--threads", str(threads)]


def parts_of(checkout: Checkout, shard: str = "00000-00015") -> dict[str, tuple[int, int]]:
    """Finished requests of an unfinished shard: name -> inode and time of the part."""
    folder = checkout.run / f"search/completions/{shard}.parts"
    stamps = {}
    for path in folder.glob("[!.]*.parquet"):
        status = path.stat()
        stamps[path.name] = (status.st_ino, status.st_mtime_ns)
    return stamps


def progress_of(checkout: Checkout, shard: str = "00000-00015") -> dict:
    path = checkout.run / f"search/completions/{shard}.parts/progress.json"
    return json.loads(path.read_text()) if path.exists() else {}


def leftovers(checkout: Checkout) -> list[Path]:
    """Temporary files and part folders below results/."""
    everything = (checkout.folder / "results").rglob("*")
    return [path for path in everything if path.suffix in (".tmp", ".parts") or path.name == "progress.json"]


def finish(checkout: Checkout, undisturbed: Checkout) -> str:
    """The same command again brings the run to its end, with the tables of an undisturbed run."""
    text = said(checkout.snakemake())
    assert checkout.tables() == undisturbed.tables()
    assert leftovers(checkout) == []
    return text


# --- kills ------------------------------------------------------------------------------------------------


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


# --- damaged and foreign tables ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "runs", "generations"),
    [
        (SEARCH, {"generate": 1, "score": 1, "gather": 1}, 16),
        ("search/scores/number-v1/00000-00015.parquet", {"generate": None, "score": 1, "gather": 1}, 0),
        ("n00016/candidates.parquet", {"gather": 1, "select": 1, "vote": 1}, 0),
    ],
)
def test_a_corrupt_table_is_named_and_only_it_is_redone(finished, undisturbed, name, runs, generations) -> None:
    started_at = time.time()
    path = finished.run / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(
        finished.snakemake(check=False),
        f"{path.relative_to(finished.folder)} cannot be read as Parquet",
        "remove it and run again",
    )
    assert path.exists(), "only a person removes it"
    path.unlink()
    counts = jobs(finish(finished, undisturbed))
    assert {rule: counts.get(rule) for rule in runs} == runs
    assert generated_since(finished, started_at) == generations


def generated_since(checkout: Checkout, moment: float) -> int:
    """Requests generated by the shards that ended after `moment`, not taken over."""
    ledgers = [p for p in checkout.run.rglob("ledger/*.parquet") if p.stat().st_mtime > moment]
    return sum(tables.read(path, tables.LEDGER)["requests_here"].item() for path in ledgers)


def test_what_snakemake_removed_is_taken_over(finished, undisturbed) -> None:
    """It makes shards again whose plan is missing (a plan that was interrupted, say), and removes them first."""
    started_at = time.time()
    layout.requests_file(finished.run, "search").unlink()
    layout.requests_file(finished.run, "n00016/members").unlink()
    counts = jobs(finish(finished, undisturbed))
    assert counts["generate"] == 2
    assert generated_since(finished, started_at) == 0


def test_completions_of_another_run_are_refused_by_name(finished, undisturbed) -> None:
    path = finished.run / SEARCH
    footer = {key: value for key, value in tables.footer(path).items() if key != "table"}
    rows = tables.read(path, tables.COMPLETIONS)
    tables.write(rows, tables.COMPLETIONS, path, **{**footer, "run_id": "0123456789"})
    refused(
        finished.snakemake(check=False),
        f"{path.relative_to(finished.folder)} does not belong here: its run_id is '0123456789'",
        "remove it and run again",
    )
    path.unlink()
    finish(finished, undisturbed)


def test_another_selection_after_a_corrected_scorer_generates_the_new_experts_alone(finished) -> None:
    """Scores that choose other experts: the old members are set aside, those that stayed are taken over."""
    members = layout.requests_file(finished.run, "n00016/members")
    before = tables.read(members, tables.REQUESTS)["request_id"].to_list()
    scorer = finished.folder / "workflow/randopt/tasks/scorers/number.py"
    scorer.write_text(
        scorer.read_text()
        .replace("    return Verdict(float(lenient),", "    return Verdict(float(_reward(response)),")
        .replace("def value_of(", "def _reward(response):\n    return sum(map(ord, response)) % 97\n\n\ndef value_of(")
    )
    version = finished.folder / "workflow/randopt/tasks/scorers/__init__.py"
    version.write_text(version.read_text().replace('Scorer("number", 1', 'Scorer("number", 2'))
    refused(finished.snakemake(check=False), "select other experts", "run the same command again")
    chosen = tables.read(members, tables.REQUESTS)["request_id"].to_list()
    assert set(chosen) != set(before), "the new scorer must choose otherwise for this test to test anything"
    known = {*before, *random_requests(finished)}
    text = said(finished.snakemake())
    assert jobs(text)["generate"] == 1
    ledger = tables.read(finished.run / "n00016/members/ledger/00000-00002.parquet", tables.LEDGER)
    assert ledger["requests_here"].item() == len(set(chosen) - known)


def test_a_new_scorer_version_is_scored_whole_beside_the_old_one(finished, undisturbed) -> None:
    version = finished.folder / "workflow/randopt/tasks/scorers/__init__.py"
    version.write_text(version.read_text().replace('Scorer("number", 1', 'Scorer("number", 2'))
    assert "generate" not in jobs(said(finished.snakemake()))
    for number in (1, 2):
        scores = list(finished.run.rglob(f"scores/number-v{number}/*.parquet"))
        assert len(scores) == 4
        for path in scores:
            assert tables.read(path, tables.SCORES)["scorer_version"].unique().to_list() == [number]
    votes = "n00016/votes.parquet"
    assert (finished.run / votes).read_bytes() == (undisturbed.run / votes).read_bytes()


def random_requests(checkout: Checkout) -> list[str]:
    return tables.read(layout.requests_file(checkout.run, "random"), tables.REQUESTS)["request_id"].to_list()


# --- bad input --------------------------------------------------------------------------------------------


def test_mistakes_in_the_configuration_are_explained_before_anything_runs(finished) -> None:
    before = finished.tables()
    good = json.dumps(finished.config)

    def wrong(change: Callable[[dict], object], *words: str) -> None:
        finished.config = json.loads(good)
        change(finished.config)
        refused(finished.snakemake("-n", check=False), *words)

    wrong(lambda c: c["search"].update(candidate=3), "unknown key 'search.candidate'", "did you mean 'candidates'?")
    wrong(lambda c: c["ensemble"].update(top_k=[40], members=40), "K = 40 is more than N = 16")
    wrong(lambda c: c["models"][0].update(source="path:/no/such/model"), "/no/such/model is no folder")
    wrong(lambda c: c["search"].update(shard_size=4), "fixed it at 16", "Set it back to 16")
    wrong(lambda c: c.update(tasks=["times_tabel"]), "did you mean 'times_table'?")
    finished.config = json.loads(good)
    done = finished.snakemake("-n")
    assert "Nothing to be done" in said(done)
    assert finished.tables() == before


def task_of(checkout: Checkout, rows: list[dict], **changes: object) -> None:
    """Make the checkout's task one from a local file; a changed key that is None is left out."""
    (checkout.folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "version": 1,
        "source": {"file": "problems.jsonl"},
        "prompt": [{"role": "user", "content": "What is {question} ?"}],
        "reference": "answer",
        "splits": {
            "select": {"start": 0, "size": 4},
            "confirm": {"start": 4, "size": 4},
            "test": {"start": 8, "size": 4},
        },
        "max_tokens": 4,
        "scorer": "number",
        **changes,
    }
    kept = {key: value for key, value in task.items() if value is not None}
    (checkout.folder / "problems.yaml").write_text(json.dumps(kept))
    checkout.config["tasks"] = ["problems.yaml"]


def test_a_task_without_reference_or_with_overlapping_splits_is_refused(finished) -> None:
    before = finished.tables()
    rows = [{"question": f"{i} times 2", "answer": 2 * i} for i in range(12)]
    task_of(finished, rows, reference=None)
    refused(finished.snakemake("-n", check=False), "problems.yaml: reference: None was given", "add `reference")

    task_of(finished, rows, reference="solution")
    refused(
        finished.snakemake(check=False),
        "the column 'solution' is missing from part 'train', which has question, answer",
    )

    rows[9] = {"question": " 2 TIMES 2", "answer": 4}  # the same problem as select's row 2
    task_of(finished, rows)
    refused(finished.snakemake(check=False), "the same problem stands twice: select-00002 = test-00001")
    after = finished.tables()
    assert {path: after[path] for path in before} == before
    assert not list(finished.folder.rglob("*.parts")), "refused before anything was generated"


def test_models_that_cannot_be_used_are_refused_before_generation(tmp_path, tiny_model) -> None:
    checkout = new_checkout(tmp_path / "checkout", tiny_model)
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    checkout.config["models"][0]["source"] = f"path:{model}"
    config = model / "config.json"
    plain = config.read_text()
    config.write_text(json.dumps({**json.loads(plain), "quantization_config": {"quant_method": "gptq"}}))
    refused(checkout.snakemake(check=False), f"{model} is a quantised checkpoint", "use the unquantised model")
    config.write_text(plain)

    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    refused(checkout.snakemake(check=False), f"{weights} is not a whole safetensors file", "copy it again")
    assert not list(checkout.folder.glob("results/**/completions")), "no generate job was started"

    # damaged after it was prepared, at the same size: the shard itself refuses
    weights.write_bytes(whole)
    checkout.snakemake("--until", "prepare_model", "prepare_items", "plan")
    weights.write_bytes(whole[:-1000] + bytes(1000))
    (manifest,) = checkout.folder.glob("results/models/*/manifest.json")
    runs = checkout.folder.glob("results/tiny/times_table/*")  # one for each state the model was in
    (run,) = (run for run in runs if load_run(run)["model_id"] == manifest.parent.name)
    done = checkout.randopt("generate", str(run.relative_to(checkout.folder)), "search", "00000-00015")
    refused(done, f"{weights} changed since the model was prepared", "Restore the file")
    assert done.returncode == 2


def test_a_scorer_that_raises_names_the_item_and_keeps_the_texts(finished, undisturbed) -> None:
    scorer = finished.folder / "workflow/randopt/tasks/scorers/number.py"
    good = scorer.read_text()
    start = '    expected = value_of("number", reference)\n'
    assert start in good
    scorer.write_text(good.replace(start, start + "    1 / 0\n"))
    (finished.run / "search/scores/number-v1/00000-00015.parquet").unlink()
    refused(
        finished.snakemake(check=False),
        "the scorer number failed on item select-",
        "ZeroDivisionError",
        "The completions are kept",
    )
    assert (finished.run / SEARCH).read_bytes() == (undisturbed.run / SEARCH).read_bytes()
    scorer.write_text(good)
    counts = jobs(finish(finished, undisturbed))
    assert "generate" not in counts and counts["score"] == 1


# --- a results folder that cannot be written --------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own, which can be filled and made read-only even for root."""
    folder = tmp_path / "results"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True, timeout=60
    )
    if mount.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=60)


def test_a_full_and_a_read_only_disk_lose_nothing(small_disk, tmp_path, tiny_model, undisturbed) -> None:
    checkout = copy_of(undisturbed, tmp_path, tiny_model)
    forget_search(checkout)

    filler = small_disk / "filler"
    status = os.statvfs(small_disk)
    filler.write_bytes(bytes((status.f_bavail - 14) * status.f_frsize))  # room for a few parts
    refused(
        checkout.snakemake(check=False),
        "No space left on device. Free space or make the folder writable, then run the same command again",
        "everything already written is kept",
    )
    kept = parts_of(checkout)
    assert 0 < len(kept) < 16

    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True, timeout=60)
    try:
        refused(checkout.snakemake(check=False), "Write-protected output files")  # Snakemake's own words
        done = checkout.randopt(*generate(checkout)[3:])
        refused(done, "Read-only file system. Free space or make the folder writable, then run the same command")
        assert parts_of(checkout) == kept
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True, timeout=60)

    filler.unlink()
    finish(checkout, undisturbed)
    ledger = tables.read(checkout.run / "search/ledger/00000-00015.parquet", tables.LEDGER)
    assert ledger["requests_here"].item() == 16 - len(kept)
