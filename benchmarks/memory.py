"""Peak host memory of a generate job by the model's size: `python benchmarks/memory.py`.

Llamas with random weights of three sizes in bfloat16, each on each engine in a process of its own, which answers with
some candidates as a shard does. A straight line through the peaks is what workflow/randopt/resources.py asks a
scheduler for: so much for any engine, and so many times the weights. On a CPU; a job on a GPU holds less on the host.
"""

import importlib.util
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from engine import ROOT, demo_manifest, task_items

from randopt import engines
from randopt.engines import EngineSettings
from randopt.models.prepare import load_manifest, prepare
from randopt.models.source import parse
from randopt.requests import candidate

SHAPES = ((576, 24), (1152, 24), (1536, 36))  # hidden size and layers: 0.15, 0.5 and 1.4 billion parameters
CANDIDATES = 3


def build(width: int, layers: int, folder: Path) -> Path:
    """Path of the manifest of a random Llama with the tokenizer of the demo's model."""
    import torch
    import transformers

    tokenizer = demo_manifest(ROOT / "results" / "bench" / "model").folder
    config = transformers.AutoConfig.from_pretrained(tokenizer)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64, "head_dim": 64}
    config.update(sizes | heads)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").bfloat16()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.tie_weights()
    model.save_pretrained(folder)
    for path in tokenizer.glob("token*"):
        shutil.copy(path, folder)
    manifest = folder / "made" / "manifest.json"
    prepare(parse(f"path:{folder}", ROOT), "bfloat16", ROOT, manifest)
    return manifest


def peak(engine_name: str, path: Path) -> dict[str, float]:
    """Of this process: GB of weights, GB at the peak."""
    engines.share_cores()
    import torch

    manifest = load_manifest(path)
    settings = EngineSettings("bfloat16", 16, 64, "auto", "iid", (), torch.get_num_threads())
    engine = engines.load(engine_name, manifest, settings)
    _, items = task_items("times_table")
    engine.weights_digest()
    plan = [candidate(seed, 0.002) for seed in range(CANDIDATES)]
    for request in plan:
        engine.set_weights(request.perturbation)
        list(engine.generate(items, request.decoding))
    engine.set_weights(())
    engine.weights_digest()
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"weights": manifest.content["parameters"] * 2 / 1e9, "peak": highest / 1e9}


def main() -> None:
    """Print, for each engine, the peaks and the line through them as JSON."""
    if len(sys.argv) == 3:
        print(json.dumps(peak(sys.argv[1], Path(sys.argv[2]))))
        return
    names = ["transformers", *(["vllm"] if importlib.util.find_spec("vllm") else [])]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for width, layers in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            manifest = build(width, layers, Path(folder))
            for name in names:
                command = [sys.executable, __file__, name, str(manifest)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    table = {}
    for name, rows in found.items():
        weights, peaks = ([row[key] for row in rows] for key in ("weights", "peak"))
        copies, rest = np.polyfit(weights, peaks, 1)
        table[name] = {
            "gb_of_weights": [round(value, 2) for value in weights],
            "gb_at_the_peak": [round(value, 2) for value in peaks],
            "copies_of_the_weights": round(float(copies), 2),
            "gb_for_the_rest": round(float(rest), 2),
        }
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
