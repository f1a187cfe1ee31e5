"""Intervals that say how much of a score is the luck of the items."""

from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np

BLOCK = 4_000_000  # drawn indices held at once: 32 MB
Seed = int | Sequence[int]


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (0 .. 1).

    centre ± half width, with p = successes / n and z the normal quantile of (1 + confidence) / 2:
    centre = (p + z²/2n) / (1 + z²/n);  half = z / (1 + z²/n) · sqrt(p(1 - p)/n + z²/4n²).
    Source: Wilson 1927, JASA 22:209; recommended at small n by Brown, Cai, DasGupta 2001, Stat. Sci. 16:101.
    Raises ValueError unless 0 ≤ successes ≤ n and n ≥ 1.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / n
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z / scale * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # at 0 and n the bound is exactly the edge; rounding would leave 1e-17 beside it
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return float(low), float(high)


def bootstrap_means(values: np.ndarray, resamples: int, seed: Seed) -> np.ndarray:
    """Means of every column over resampled items: (resamples, columns) from (items, columns).

    All columns see the same resamples, so means of a difference of two methods are paired by item.
    Whole numbers (counts, differences of verdicts) give the same bits on every machine; divide the
    result, not the input, where a column is a fraction.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not len(values):
        raise ValueError(f"expected (items, columns) with at least one item, got shape {values.shape}")
    sums = [counts @ values for counts in _resampled(len(values), resamples, seed)]
    return np.concatenate(sums) / len(values)


def percentile_interval(resampled: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of each column: the (1 ∓ confidence)/2 quantiles of its resampled means.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, §13.3. Too narrow for a
    few dozen items, by about sqrt((n - 1)/n); width 0 when all items agree.
    """
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
    return low, high


def bootstrap_interval(
    values: np.ndarray, confidence: float = 0.95, resamples: int = 10_000, seed: Seed = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of per-item `values`, shape (items,)."""
    low, high = percentile_interval(bootstrap_means(np.asarray(values)[:, None], resamples, seed), confidence)
    return float(low[0]), float(high[0])


def paired_difference(
    a: np.ndarray, b: np.ndarray, confidence: float = 0.95, resamples: int = 10_000, seed: Seed = 0
) -> tuple[float, float, float]:
    """mean(a) - mean(b) of two methods on the same items, and its percentile bootstrap interval.

    An item is resampled with both of its values, so what makes items hard for both cancels.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"the methods have {a.shape} and {b.shape} values; they must answer the same items")
    return float((a - b).mean()), *bootstrap_interval(a - b, confidence, resamples, seed)


def _resampled(n: int, resamples: int, seed: Seed) -> Iterator[np.ndarray]:
    """How often each of n items is drawn, in blocks of (≤ resamples, n) float64."""
    generator = np.random.Generator(np.random.PCG64(seed))
    block = max(1, BLOCK // n)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        # one bincount for the block: item i of resample r has the number r·n + i
        drawn = generator.integers(0, n, (size, n)) + np.arange(size)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)
