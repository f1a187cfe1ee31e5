"""How fast one candidate's weights are made: `python benchmarks/noise.py`.

Ours writes base + σ·ε from a pristine base into a buffer, once per candidate. On the CPU it is compared to what
RandOpt's public code does with torch: draw seeded noise in the weights' dtype, add it, and later subtract it again.
On a GPU, if there is one, it is compared to copying the base into the buffer: the least that any such kernel can do.
"""

import json
import statistics
import time
from collections.abc import Callable

import torch

from randopt.noise import perturb, runs_on

SIZE = 64_000_000
GPU_SIZE = 2**29
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


def bench_gpu(size: int = GPU_SIZE, repeats: int = 20) -> dict | str:
    """The fused kernel against a device copy of the same `size` weights, one term, for each dtype.

    Rates in GB/s count a read and a write of every weight. A text that says so where no GPU can be measured.
    """
    if not torch.cuda.is_available():
        return "not measured here: no GPU"
    device = torch.device("cuda")
    if not runs_on(device):
        return "not measured here: Triton does not run on this GPU"
    found: dict = {"device": torch.cuda.get_device_name(device), "weights": size}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        base = torch.randn(size, device=device, dtype=dtype)
        buffer = torch.empty_like(base)

        def copy(base: torch.Tensor = base, buffer: torch.Tensor = buffer) -> None:
            buffer.copy_(base)
            torch.cuda.synchronize()

        def ours(base: torch.Tensor = base, buffer: torch.Tensor = buffer) -> None:
            perturb(base, "weight", [(42, SIGMA)], out=buffer)
            torch.cuda.synchronize()

        gigabytes = 2 * base.nbytes / 1e9
        copy_rate, kernel_rate = (gigabytes / median_seconds(step, repeats) for step in (copy, ours))
        found[str(dtype).removeprefix("torch.")] = {
            "kernel_gb_per_second": round(kernel_rate, 1),
            "copy_gb_per_second": round(copy_rate, 1),
            "ratio_to_copy": round(kernel_rate / copy_rate, 3),
        }
    return found


if __name__ == "__main__":
    print(json.dumps({**bench(), "gpu": bench_gpu()}, indent=2))
