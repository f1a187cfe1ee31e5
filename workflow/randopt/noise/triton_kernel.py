"""Noise version 1 on a GPU: base + Σ coefficient·ε(seed) in one fused pass, bit-equal to reference.py.

One program makes GROUPS Philox blocks per term and turns each into the 8 elements that belong to it. The rest is
integer work, one gather, one addition and one rounding per element; bfloat16 is rounded with integers, so that it
does not depend on what a GPU's own conversion does with NaN.

Base and result are read and written once and past the L1 cache: it is left to the term's table of 128 KiB, which it
holds whole from the A100 on (192 KiB; H100 and H200 256 KiB) and which every program of the same processor gathers
from. Shared memory, which would be taken from the L1 cache, is not used for whole 16-bit tensors (float32 takes 2 KiB
a program). A slice that starts inside a Philox block, or a size that 16 does not divide, costs narrower accesses.

The goal is half of a device copy's bandwidth. It was not measured: no GPU was at hand. The kernel is tested in
Triton's interpreter and compiled for the A100 and the H100; benchmarks/noise.py measures it where there is a GPU.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from randopt.noise import quantiles, reference

GROUPS = 256  # Philox blocks per program, 8 elements each
WARPS = 4

FORMATS = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}

_ROUNDS = tl.constexpr(reference.ROUNDS)
_MULTIPLIER_0 = tl.constexpr(reference.MULTIPLIER_0)
_MULTIPLIER_1 = tl.constexpr(reference.MULTIPLIER_1)
_WEYL_0 = tl.constexpr(reference.WEYL_0)
_WEYL_1 = tl.constexpr(reference.WEYL_1)
_TABLE = tl.constexpr(quantiles.SIZE)


@triton.jit
def philox(block, key, seed):
    """The four output words, each [n] uint32, of the Philox blocks [n]; block, key, seed: uint64."""
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    c2, c3 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        product_0 = c0.to(tl.uint64) * _MULTIPLIER_0
        product_1 = c2.to(tl.uint64) * _MULTIPLIER_1
        c0 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product_1.to(tl.uint32)
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product_0.to(tl.uint32)
        k0 += _WEYL_0
        k1 += _WEYL_1
    return c0, c1, c2, c3


@triton.jit
def halfwords(block, key, seed, GROUPS: tl.constexpr):
    """The draws [8 * GROUPS] uint32 below 2**16 of the Philox blocks [GROUPS], in the order of the elements."""
    r0, r1, r2, r3 = philox(block, key, seed)
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # [GROUPS, 2, 2]: a block's four words in order
    return tl.join(words & 0xFFFF, words >> 16).reshape(8 * GROUPS)


@triton.jit
def decode(bits, FORMAT: tl.constexpr):
    """Bit patterns [n] int16 or int32 to their values, float32, exactly."""
    if FORMAT == "bfloat16":
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif FORMAT == "float16":
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def encode(values, FORMAT: tl.constexpr):
    """float32 [n] to bit patterns, int16 or int32, rounded to nearest, ties to even; NaN is quiet and positive."""
    if FORMAT == "bfloat16":
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(values != values, 0x7FC0, rounded).to(tl.int16)
    elif FORMAT == "float16":
        rounded = values.to(tl.float16).to(tl.int16, bitcast=True)
        return tl.where(values != values, 0x7E00, rounded).to(tl.int16)
    else:
        return tl.where(values != values, 0x7FC00000, values.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["key", "first"])
def kernel(
    base,
    out,
    seeds,
    tables,
    key: tl.uint64,
    first: tl.uint64,
    skipped,
    size,
    terms,
    FORMAT: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """out [size] = round(base [size] + Σ terms), on bit patterns, int16 or int32.

    seeds: [terms] int64; tables: [terms, 32768] int32, bit patterns of float32. base[0] is element `skipped` (0 … 7)
    of the tensor's Philox block `first`.
    """
    # Relative to the program's first whole block; 64 bits, for a tensor may have more than 2**31 elements.
    group = tl.program_id(0).to(tl.int64) * GROUPS
    block = first.to(tl.uint64) + (group + tl.arange(0, GROUPS)).to(tl.uint64)
    index = 8 * group - skipped + tl.arange(0, 8 * GROUPS)
    inside = (index >= 0) & (index < size)
    total = decode(tl.load(base + index, mask=inside, other=0, cache_modifier=".cg"), FORMAT)
    for term in range(terms):
        seed = tl.load(seeds + term).to(tl.uint64, bitcast=True)
        h = halfwords(block, key.to(tl.uint64), seed, GROUPS)
        table = tables + tl.cast(term, tl.int64) * _TABLE
        scaled = tl.load(table + (h & 0x7FFF), eviction_policy="evict_last").to(tl.uint32, bitcast=True)
        total += (scaled ^ ((h & 0x8000) << 16)).to(tl.float32, bitcast=True)
    tl.store(out + index, encode(total, FORMAT), mask=inside, cache_modifier=".cg")


def perturb_into(
    base: torch.Tensor, out: torch.Tensor, key: int, terms: Sequence[tuple[int, float]], start: int = 0
) -> None:
    """out = round(float32(base) + Σ float32(coefficient · z)), queued on the current stream.

    base, out: contiguous, of one dtype, one size > 0 and one GPU; the same memory or disjoint. key: the tensor key t.
    terms: (seed, coefficient), at least one. start: the flat index of base[0] in its tensor.
    """
    bits = torch.int32 if base.dtype.itemsize == 4 else torch.int16
    # The interpreter, which the tests use, works on host memory and knows no streams.
    stream = torch.cuda.current_stream(base.device).cuda_stream if base.is_cuda else 0
    seeds, tables = _on_device(
        np.array([seed for seed, _ in terms], dtype=np.uint64).tobytes(),
        np.array([coefficient for _, coefficient in terms], dtype=np.float64).tobytes(),
        base.device,
        stream,
    )
    skipped = start % 8
    with torch.cuda.device_of(base):
        kernel[(triton.cdiv(skipped + base.numel(), 8 * GROUPS),)](
            base.detach().view(bits),
            out.detach().view(bits),
            seeds,
            tables,
            key,
            start // 8,
            skipped,
            base.numel(),
            len(terms),
            FORMAT=FORMATS[base.dtype],
            GROUPS=GROUPS,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


@lru_cache(maxsize=1)  # a perturbation is applied to one tensor after another
def _on_device(
    seeds: bytes, coefficients: bytes, device: torch.device, stream: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeds (terms,) int64 and scaled tables (terms, 32768) int32 on the device, for use on one stream.

    stream is part of the key because the memory is free for reuse on its stream as soon as the entry is dropped.
    """
    tables = torch.from_numpy(quantiles.scaled(coefficients).view(np.int32))
    return torch.from_numpy(np.frombuffer(seeds, dtype=np.int64).copy()).to(device), tables.to(device)
