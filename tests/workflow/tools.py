"""What the tests of faults share: starting, stopping and comparing real runs.

The measure is always the same: the message tells a person what to do, nothing finished is lost, and in the end
the tables are those of an undisturbed run, byte for byte (the ledger, which holds times, excepted).
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.conftest import Checkout

WAIT = 240  # seconds after which something that should have happened counts as never happening
SEARCH = "search/completions/00000-00015.parquet"

# The tiny model hardly ever knows a product. By this scorer its candidates differ, as real ones do by theirs.
LARGE_SCORER = '''"""Larger numbers are better."""

from randopt.tasks.scorers.number import score as by_number
from randopt.tasks.scorers.verdict import Verdict


def score(response, reference):
    found = by_number(response, reference).vote_key
    reward = 0.0 if found is None else min(float(found) / 25, 1.0)
    return Verdict(reward, reward > 0.5, reward > 0.5, found)
'''


def new_checkout(folder: Path, model: Path) -> Checkout:
    """A checkout whose stages have one shard each."""
    folder.mkdir(exist_ok=True)
    checkout = Checkout(folder, model)
    checkout.config["search"]["shard_size"] = 16
    return checkout


def large_scorer(checkout: Checkout) -> None:
    """Add the scorer `large` to the checkout, as its user would."""
    folder = checkout.folder / "workflow/randopt/tasks/scorers"
    (folder / "large.py").write_text(LARGE_SCORER)
    text = (folder / "__init__.py").read_text().replace("    countdown,\n", "    countdown,\n    large,\n")
    text = text.replace('Scorer("number",', 'Scorer("large", 1, large.score),\n        Scorer("number",')
    (folder / "__init__.py").write_text(text)


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
    assert "Traceback" not in text, text
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
