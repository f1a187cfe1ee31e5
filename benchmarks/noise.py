"""How fast one candidate's weights are made, on the CPU: `python benchmarks/noise.py`.

Ours writes base + σ·ε from a pristine base into a buffer, once per candidate. The other is what RandOpt's
public code does with torch: draw seeded noise in the weights' dtype, add it, and later subtract it again.
"""

import json
import statistics
import time
from collections.abc import Callable

import torch

from randopt.noise import perturb

SIZE = 64_000_000
SIGMA = 1e-3


def median_seconds(step: Callable[[], None], repeats: int) -> float:
    """The median wall time of step in seconds, after one run that is not counted."""
    step()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def bench(size: int = SIZE, repeats: int = 7) -> dict:
    """Both ways on `size` bfloat16 weights, one term, the same threads."""
    base = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    buffer = torch.empty_like(base)
    weights = base.clone()
    generator = torch.Generator()

    def ours() -> None:
        perturb(base, "weight", [(42, SIGMA)], out=buffer)

    def with_torch() -> None:
        noise = torch.randn(size, dtype=torch.bfloat16, generator=generator.manual_seed(42))
        weights.add_(noise, alpha=SIGMA)
        weights.sub_(noise, alpha=SIGMA)

    kernel_rate = size / median_seconds(ours, repeats) / 1e6
    torch_rate = size / median_seconds(with_torch, repeats) / 1e6
    return {
        "weights": size,
        "dtype": "bfloat16",
        "threads": torch.get_num_threads(),
        "kernel_million_weights_per_second": round(kernel_rate, 1),
        "torch_million_weights_per_second": round(torch_rate, 1),
        "ratio": round(kernel_rate / torch_rate, 2),
    }


if __name__ == "__main__":
    print(json.dumps(bench(), indent=2))
