"""What a generate job asks a scheduler for: pure functions of run, shard and attempt.

The constants are cautious assumptions, not measurements: no GPU was at hand. Memory and time grow
with the attempt, so a job that was too tight succeeds when it is retried.
"""

import re
from pathlib import Path

from randopt import layout
from randopt.experiment import Run

BYTES_PER_WEIGHT = {"bfloat16": 2, "float16": 2, "float32": 4}
UNKNOWN_BILLIONS = 8.0  # where nothing tells a model's size
TOKENS_PER_SECOND_AT_1B = 2000.0  # assumed decoding rate of a 1 B model, inversely proportional to size
START_MINUTES = 15
MAX_MINUTES = 24 * 60
MAX_MB = 512_000


def billions(run: Run) -> float:
    """Parameters in 10⁹: from the files of a local model, else from a size in its name, else a guess."""
    kind, _, location = run.description["model"]["source"].partition(":")
    if kind == "path":
        size = sum(path.stat().st_size for path in Path(location).glob("*.safetensors"))
        if size:
            return size / 2 / 1e9
    found = re.findall(r"(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", f"{location} {run.model_id}".lower())
    if found:
        number, unit = found[0]
        return float(number) / (1 if unit == "b" else 1000)
    return 0.2 if kind == "package" else UNKNOWN_BILLIONS


def generate_mem_mb(run: Run, attempt: int) -> int:
    """Host memory: the pristine base, one more copy while loading, and 6 GB for the rest."""
    weights = billions(run) * 1000 * BYTES_PER_WEIGHT[run.description["model"]["dtype"]]
    return min(MAX_MB, int((6000 + 2 * weights) * attempt))


def generate_runtime(run: Run, stage: str, shard: str, attempt: int) -> int:
    """Minutes: every completion at its token limit, at the assumed rate, plus the start."""
    start, stop = layout.parse_shard(shard)
    items = sum(run.task.splits[split]["size"] for split in layout.stage_splits(stage))
    tokens = (stop - start) * items * run.task.max_tokens
    minutes = tokens / (TOKENS_PER_SECOND_AT_1B / max(billions(run), 0.1)) / 60
    return min(MAX_MINUTES, int((START_MINUTES + minutes) * attempt))
