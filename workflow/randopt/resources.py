"""What a generate job asks a scheduler for: pure functions of run, shard and attempt.

Memory and time grow with the attempt, so a job that was too tight succeeds when it is retried.
"""

from randopt import layout
from randopt.experiment import Run
from randopt.speed import billions

BYTES_PER_WEIGHT = {"bfloat16": 2, "float16": 2, "float32": 4}
# Of the weights in host memory: the pristine base and those in use; on a CPU vLLM has buffers for those being made
# and packs those being loaded. On CPUs, models of 0.3, 1.1 and 2.9 GB peaked at 1.4, 3.2 and 6.9 GB; with vLLM at 3.5,
# 7.3 and 14.9 GB (benchmarks/memory.py): 2.14 and 4.45 times the weights and 0.8 and 2.2 GB, of which 1 is vLLM's
# cache. GPUs are asked the same, where less is held on the host; nothing was measured there.
COPIES = {"transformers": 2.5, "vllm": 5.0}
OTHER_MB = 6000
START_MINUTES = 15  # a cold file system, a slow node
MEASURED_FACTOR = 2.0  # between a probe's speed and that of the slowest node and the longest answers
MAX_MINUTES = 24 * 60
MAX_MB = 512_000


def generate_mem_mb(run: Run, attempt: int, engines: int = 1) -> int:
    """Host memory: for each of the `engines` (workers × ranks) its copies of the weights, and OTHER_MB."""
    weights = billions(run.description) * 1000 * BYTES_PER_WEIGHT[run.description["model"]["dtype"]]
    return min(MAX_MB, int((OTHER_MB + COPIES[run.description["engine"]] * weights) * engines * attempt))


def generate_runtime(run: Run, stage: str, shard: str, attempt: int, workers: int = 1) -> int:
    """Minutes: every completion at the probed speed with room to spare, or at the assumed one, plus the start.

    Several workers share the completions. Those on one device are slower each, which a probe with as many has seen.
    """
    start, stop = layout.parse_shard(shard)
    items = sum(run.task.splits[split]["size"] for split in layout.stage_splits(stage))
    minutes = (stop - start) * items * run.speed.seconds_per_completion / 60 / workers
    factor = MEASURED_FACTOR if run.speed.measured else 1.0
    return min(MAX_MINUTES, int((START_MINUTES + factor * minutes) * attempt))
