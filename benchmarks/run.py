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


def vllm_figures() -> dict:
    """The engine vllm with and without its prefix cache, where it is installed."""
    if importlib.util.find_spec("vllm") is None:
        return {"engine_vllm": {"not run": "run make vllm"}}
    return {
        "engine_vllm": measure("engine.py", "vllm"),
        "engine_vllm_without_prefix_cache": measure("engine.py", "vllm", "--no-prefix-cache"),
    }


def main() -> None:
    """Run everything, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller gather")
    quick = parser.parse_args().quick
    gather = ["--candidates", "20000"] if quick else []
    found = {
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "noise": measure("noise.py"),
        "engine": measure("engine.py"),
        **vllm_figures(),
        "demo_race": measure("demo_race.py"),
        "memory": measure("memory.py"),
        "scoring": measure("scoring.py"),
        "dry_run": measure("dry_run.py"),
        "gather": measure("gather.py", *gather),
        **({} if quick else {"slurm": measure("slurm.py")}),
    }
    table = Table("benchmark", "what", "value")
    for name, values in found.items():
        for key, value in values.items():
            table.add_row(name, key.replace("_", " "), json.dumps(value))
    Console(width=110).print(table)
    path = ROOT / "results" / "bench" / "bench.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
