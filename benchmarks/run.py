"""`make bench`: every benchmark in one run, as a table and as results/bench/bench.json.

Each runs in a process of its own, so that memory and thread pools do not carry over. `--quick` shrinks the gather to
20,000 candidates and leaves out the SLURM cluster; in full they write 200 million rows (1 GiB) into the temporary
folder and run 200 jobs on this machine (three quarters of an hour on two cores).
"""

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
VLLM = (
    ("engine_vllm", "engine.py", "vllm"),
    ("engine_vllm_without_prefix_cache", "engine.py", "vllm", "--no-prefix-cache"),
)


def measure(script: str, *arguments: str) -> dict:
    """What a benchmark script prints as JSON."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return json.loads(done.stdout)


def flat(values: dict, before: str = "") -> Iterator[tuple[str, str]]:
    """Rows of the table: the words that lead to each value of a nested dictionary, and the value."""
    for key, value in values.items():
        what = f"{before}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            yield from flat(value, f"{what}: ")
        else:
            yield what, value if isinstance(value, str) else json.dumps(value)


def main() -> None:
    """Run everything, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller gather")
    quick = parser.parse_args().quick
    gather = ["--candidates", "20000"] if quick else []
    found: dict[str, dict] = {
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
    }
    path = ROOT / "results" / "bench" / "bench.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    planned = [
        ("noise", "noise.py"),
        ("engine", "engine.py"),
        *VLLM,
        ("demo_race", "demo_race.py"),
        ("memory", "memory.py"),
        ("scoring", "scoring.py"),
        ("dry_run", "dry_run.py"),
        ("gather", "gather.py", *gather),
        *([] if quick else [("slurm", "slurm.py")]),
    ]
    console = Console(width=110)
    begun = time.monotonic()
    for number, (name, script, *arguments) in enumerate(planned, start=1):
        minutes = (time.monotonic() - begun) / 60
        console.rule(f"{number} of {len(planned)}: {name.replace('_', ' ')}, after {minutes:.0f} minutes")
        if "vllm" in arguments and importlib.util.find_spec("vllm") is None:
            found[name] = {"not run": "run make vllm"}
        else:
            found[name] = measure(script, *arguments)
        path.write_text(json.dumps(found, indent=1) + "\n")  # what is measured outlives a later failure
    table = Table("benchmark", "what", "value")
    for name, values in found.items():
        for what, value in flat(values):
            table.add_row(name.replace("_", " "), what, value)
    console.print(table)
    console.print(str(path))


if __name__ == "__main__":
    main()
