"""Intervals against published values, exact enumeration and simulation."""

import numpy as np
import pytest

from randopt import stats


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_published_values(successes: int, n: int, low: float, high: float) -> None:
    got = stats.wilson(successes, n)
    assert got == pytest.approx((low, high), abs=5e-5)
    mirrored = stats.wilson(n - successes, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_edges() -> None:
    assert stats.wilson(0, 7)[0] == 0.0 and stats.wilson(7, 7)[1] == 1.0
    narrow, wide = stats.wilson(30, 60, 0.5), stats.wilson(30, 60, 0.99)
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]
    for bad in ((1, 0), (-1, 3), (4, 3)):
        with pytest.raises(ValueError, match="successes of"):
            stats.wilson(*bad)


def test_wilson_coverage() -> None:
    generator = np.random.default_rng(7)
    for p, n in ((0.1, 40), (0.5, 100), (0.9, 200)):
        intervals = [stats.wilson(k, n) for k in range(n + 1)]
        drawn = generator.binomial(n, p, 20_000)
        covered = np.mean([intervals[k][0] <= p <= intervals[k][1] for k in drawn])
        assert 0.93 < covered < 0.97


def test_bootstrap_of_two_items_is_its_enumeration() -> None:
    means = stats.bootstrap_means(np.array([[0.0], [1.0]]), 40_000, 0)[:, 0]
    shares = [np.mean(means == value) for value in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.01)


def test_bootstrap_is_seeded_and_paired() -> None:
    values = np.random.default_rng(0).integers(0, 2, (50, 2)).astype(float)
    once = stats.bootstrap_means(values, 500, 3)
    assert np.array_equal(once, stats.bootstrap_means(values, 500, 3))
    assert not np.array_equal(once, stats.bootstrap_means(values, 500, 4))
    # one set of resamples for all columns: the difference of the means is the mean of the difference
    difference = stats.bootstrap_means(values[:, :1] - values[:, 1:], 500, 3)
    assert np.allclose(once[:, :1] - once[:, 1:], difference, atol=1e-15)


def test_bootstrap_does_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 2, (31, 3)).astype(float)
    whole = stats.bootstrap_means(values, 200, 1)
    monkeypatch.setattr(stats, "BLOCK", 31 * 7)
    assert np.array_equal(whole, stats.bootstrap_means(values, 200, 1))
    assert whole.shape == (200, 3)


def test_bootstrap_standard_error() -> None:
    values = np.random.default_rng(5).normal(size=400)
    means = stats.bootstrap_means(values[:, None], 20_000, 0)[:, 0]
    assert means.std() == pytest.approx(values.std() / 20, rel=0.02)
    low, high = stats.bootstrap_interval(values, 0.95, 20_000, 0)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.005)


def test_paired_difference() -> None:
    a = np.array([1, 1, 1, 0, 0, 1, 1, 0] * 10)
    value, low, high = stats.paired_difference(a, a)
    assert (value, low, high) == (0.0, 0.0, 0.0)
    b = a.copy()
    b[::8] = 0
    value, low, high = stats.paired_difference(a, b)
    assert value == 10 / 80 and 0 < low < value < high
    # pairing matters: the same two scores, unpaired, would span zero
    shuffled = np.random.default_rng(1).permutation(b)
    loose = stats.paired_difference(a, shuffled)
    assert loose[0] == value and loose[2] - loose[1] > 1.5 * (high - low)
    with pytest.raises(ValueError, match="same items"):
        stats.paired_difference(a, b[1:])


def test_paired_coverage() -> None:
    """Two methods that share an item's difficulty: the 95 % interval holds the truth 95 times in 100."""
    generator = np.random.default_rng(11)
    items, trials, covered = 150, 400, 0
    for trial in range(trials):
        skill = generator.random(items)
        base = generator.random(items) < skill * 0.8
        better = generator.random(items) < np.clip(skill * 0.8 + 0.1, 0, 1)
        _, low, high = stats.paired_difference(better, base, resamples=600, seed=trial)
        covered += low <= 0.1 <= high
    assert 0.92 < covered / trials < 0.975


def test_bootstrap_refuses_wrong_shapes() -> None:
    for bad in (np.zeros(3), np.zeros((0, 2))):
        with pytest.raises(ValueError, match="expected"):
            stats.bootstrap_means(bad, 10, 0)
