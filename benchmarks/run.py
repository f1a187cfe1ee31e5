"""`make bench`: every benchmark in one run, as a table and as results/bench/bench.json.

Each runs in a process of its own, so that memory and thread pools do not carry over. `--quick` shrinks the gather to
20,000 candidates and leaves out the SLURM cluster; in full they write 200 million rows (1 GiB) into the temporary
folder and run 200 jobs on this machine (half an hour on two cores).
"""

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
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
    for name, script, *arguments in [
        ("noise", "noise.py"),
        ("engine", "engine.py"),
        *VLLM,
        ("demo_race", "demo_race.py"),
        ("memory", "memory.py"),
        ("scoring", "scoring.py"),
        ("dry_run", "dry_run.py"),
        ("gather", "gather.py", *gather),
        *([] if quick else [("slurm", "slurm.py")]),
    ]:
        if "vllm" in arguments and importlib.util.find_spec("vllm") is None:
            found[name] = {"not run": "run make vllm"}
        else:
            found[name] = measure(script, *arguments)
        path.write_text(json.dumps(found, indent=1) + "\n")  # what is measured outlives a later failure
    table = Table("benchmark", "what", "value")
    for name, values in found.items():
        for key, value in values.items():
            table.add_row(name, key.replace("_", " "), json.dumps(value))
    Console(width=110).print(table)
    print(path)


if __name__ == "__main__":
    main()
