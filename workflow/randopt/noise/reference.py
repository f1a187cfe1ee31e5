"""Noise version 1 in plain NumPy: slow, short, and the truth that every fast kernel is tested against.

bfloat16, which NumPy lacks, is held as its bit patterns in uint16 arrays.

A NaN in the result is always the positive quiet NaN of its dtype (7fc00000, 7fc0, 7e00): which payload and
sign an addition passes on differs between x86, ARM and GPUs, and the bits are to be the same on all of them.
"""

from collections.abc import Sequence

import numpy as np

from randopt.noise import quantiles

# Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", and their Random123
# library: the multipliers, and the increments of the key (golden ratio, √3 − 1).
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
MASK_32 = 0xFFFFFFFF


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of many counters under one key.

    counter: (n, 4) integers below 2**32; key: two such. Returns (n, 4) uint32.
    """
    c0, c1, c2, c3 = counter.astype(np.uint64).T
    k0, k1 = key
    low, shift = np.uint64(MASK_32), np.uint64(32)
    for _ in range(ROUNDS):
        product_0 = c0 * np.uint64(MULTIPLIER_0)
        product_1 = c2 * np.uint64(MULTIPLIER_1)
        c0, c1, c2, c3 = (
            (product_1 >> shift) ^ c1 ^ np.uint64(k0),
            product_1 & low,
            (product_0 >> shift) ^ c3 ^ np.uint64(k1),
            product_0 & low,
        )
        k0 = (k0 + WEYL_0) & MASK_32
        k1 = (k1 + WEYL_1) & MASK_32
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def halfwords(key: int, seed: int, start: int, count: int) -> np.ndarray:
    """The 16 random bits h of each flat index in [start, start + count): (count,) uint16.

    key: the 64-bit tensor key t; seed: 64 bits.
    """
    first, stop = start // 8, (start + count + 7) // 8
    block = np.uint64(first) + np.arange(stop - first, dtype=np.uint64)
    counter = np.empty((len(block), 4), dtype=np.uint64)
    counter[:, 0] = block & np.uint64(MASK_32)
    counter[:, 1] = block >> np.uint64(32)
    counter[:, 2] = key & MASK_32
    counter[:, 3] = key >> 32
    words = philox4x32(counter, (seed & MASK_32, seed >> 32))
    h = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], axis=2).astype(np.uint16)
    return h.reshape(-1)[start % 8 : start % 8 + count]


def noise(key: int, seed: int, start: int, count: int) -> np.ndarray:
    """z of each flat index in [start, start + count): (count,) float32, mean 0, variance 1."""
    h = halfwords(key, seed, start, count)
    magnitude = quantiles.table()[h & np.uint16(0x7FFF)]
    return np.where(h >> np.uint16(15), -magnitude, magnitude)


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """bits: bfloat16 patterns, uint16. Returns their values, float32, same shape; exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """values: float32. Returns bfloat16 patterns, uint16, rounded to nearest, ties to even; NaN is 7fc0."""
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    # In uint64, so that a NaN with all bits set does not wrap around before it is replaced.
    rounded = (bits.astype(np.uint64) + np.uint64(0x7FFF) + odd) >> np.uint64(16)
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def float32_to_float16(values: np.ndarray) -> np.ndarray:
    """values: float32. Returns float16, rounded to nearest, ties to even; NaN is 7e00."""
    with np.errstate(over="ignore", under="ignore"):
        return np.where(np.isnan(values), np.float16(np.nan), values.astype(np.float16))


def perturb(base: np.ndarray, key: int, terms: Sequence[tuple[int, float]], start: int = 0) -> np.ndarray:
    """round(float32(base) + Σ float32(coefficient · z)), the sum in float32 and in the order of the terms.

    base: float32, float16, or uint16 for the bit patterns of bfloat16; any shape, its flat index 0 being
    index `start` of the tensor. Returns an array of the same shape and dtype; without terms a copy.
    """
    if not terms:
        return base.copy()
    total = (bfloat16_to_float32(base) if base.dtype == np.uint16 else base.astype(np.float32)).reshape(-1)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for seed, coefficient in terms:
            z = noise(key, seed, start, base.size)
            total = total + (np.float64(coefficient) * z.astype(np.float64)).astype(np.float32)
    if base.dtype == np.uint16:
        rounded = float32_to_bfloat16(total)
    elif base.dtype == np.float16:
        rounded = float32_to_float16(total)
    else:
        rounded = np.where(np.isnan(total), np.float32(np.nan), total)
    return rounded.reshape(base.shape)
