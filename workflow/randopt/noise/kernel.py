"""Noise version 1 on the CPU: one Numba kernel for float32, float16 and bfloat16, bit-equal to reference.py.

One call takes many tensors, by address, so that small ones cost little. The work goes in strips that stay in the
L2 cache, each in three steps over a float32 buffer: decode the base, add one scaled draw per term, round and store. A
step is a plain loop over unsigned integers that LLVM turns into vector code. fastmath stays off: it would allow a
fused multiply-add and other sums than the reference's.

In Numba, uint32 with uint32 gives uint64 and uint64 with a literal gives float64; hence the casts.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from randopt.noise import quantiles
from randopt.noise.reference import MULTIPLIER_0, MULTIPLIER_1, ROUNDS, WEYL_0, WEYL_1

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
LAYOUTS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16}

# Elements per strip, a multiple of 8. Its sums and table entries (128 KiB each) and 16-bit draws (64 KiB) share the
# L2 cache with one table of 128 KiB. With many terms each table is fetched once per strip: 300 terms on two cores run
# at 580 M weights/s per term with 4,096 elements and at 2,100 with 32,768. One term runs alike with either.
STRIP = 32_768

if sys.byteorder != "little":  # the kernel reads pairs of 16-bit draws out of 32-bit words
    raise ImportError("randopt.noise.kernel needs a little-endian processor.")


def _compile(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba.njit that keeps the machine code on disk where it can.

    In a read-only container without a home folder Numba finds no place for its cache and refuses to
    compile at all; compiling anew in each process (some seconds) is better than that.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:
            return numba.njit(nogil=True, **options)(function)

    return decorate


_intrinsic: Callable[[Callable[..., Any]], Any] = intrinsic  # its first argument is Numba's own affair


@_compile()
def blocks(words, key, seed, first):
    """Philox4x32-10 output of the blocks first, first + 1, …: words (4·n,) uint32 is filled, word by word.

    key, seed, first: uint64.
    """
    c2_all = np.uint32(key)
    c3_all = np.uint32(key >> np.uint64(32))
    for b in range(np.uint64(words.size // 4)):
        block = first + b
        c0 = np.uint32(block)
        c1 = np.uint32(block >> np.uint64(32))
        c2 = c2_all
        c3 = c3_all
        k0 = np.uint32(seed)
        k1 = np.uint32(seed >> np.uint64(32))
        for _ in range(ROUNDS):
            product_0 = np.uint64(c0) * np.uint64(MULTIPLIER_0)
            product_1 = np.uint64(c2) * np.uint64(MULTIPLIER_1)
            c0 = np.uint32(np.uint32(product_1 >> np.uint64(32)) ^ c1 ^ k0)
            c1 = np.uint32(product_1)
            c2 = np.uint32(np.uint32(product_0 >> np.uint64(32)) ^ c3 ^ k1)
            c3 = np.uint32(product_0)
            k0 = np.uint32(k0 + np.uint32(WEYL_0))
            k1 = np.uint32(k1 + np.uint32(WEYL_1))
        words[np.uint64(4) * b] = c0
        words[np.uint64(4) * b + np.uint64(1)] = c1
        words[np.uint64(4) * b + np.uint64(2)] = c2
        words[np.uint64(4) * b + np.uint64(3)] = c3


@_intrinsic
def _pointer(_, address):
    """The pointer of an address given as an integer."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@_intrinsic
def _prefetch(_, array, index):
    """Have the processor fetch the cache line of array[index] into L2, and go on meanwhile; index: int64."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), cgutils.voidptr_t)
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(fetch, [place, number(0), number(2), number(1)])  # to read, in L2, data
        return context.get_dummy_value()

    return types.void(array, index), generate


@_compile()
def _look_up(entries, draws, table, following):
    """entries (n,) uint32 = table[k], k the lower 15 bits of each of the draws (n,) uint16.

    A loop of its own, which LLVM leaves scalar: vector code would take the draws out of vectors one by one. It is
    the longest step and leaves the memory idle, so the base's next strip, `following` (any size), is fetched meanwhile.
    """
    line = np.uint64(64 // following.itemsize)
    lines = np.uint64(following.size) // line
    for first in range(np.uint64(0), np.uint64(draws.size), line):
        if first < lines * line:
            _prefetch(following, np.int64(first))
        for i in range(first, min(first + line, np.uint64(draws.size))):
            entries[i] = table[np.uint32(draws[i]) & np.uint32(0x7FFF)]


@_compile()
def _add(total, entries, draws):
    """total (n,) float32 += ±entries (n,), bit patterns of float32; the highest bit of a draw (n,) is the sign."""
    for i in range(np.uint64(total.size)):
        sign = np.uint32((np.uint32(draws[i]) & np.uint32(0x8000)) << np.uint32(16))
        total[i] += np.uint32(np.uint32(entries[i]) ^ sign).view(np.float32)


@_compile()
def _decode(total, base, layout):
    """total (n,) float32 = the values of the bit patterns base (n,), exactly."""
    if layout == FLOAT32:
        for i in range(np.uint64(total.size)):
            total[i] = np.uint32(base[i]).view(np.float32)
    elif layout == BFLOAT16:
        for i in range(np.uint64(total.size)):
            total[i] = np.uint32(np.uint32(base[i]) << np.uint32(16)).view(np.float32)
    else:
        for i in range(np.uint64(total.size)):
            h = np.uint32(base[i])
            sign = np.uint32((h & np.uint32(0x8000)) << np.uint32(16))
            magnitude = np.uint32((h & np.uint32(0x7FFF)) << np.uint32(13))
            # The exponent's bias grows from 15 to 127; infinity and NaN need the largest exponent.
            shifted = np.uint32(magnitude + np.uint32(112 << 23))
            special = np.uint32(magnitude + np.uint32(224 << 23))
            # Subnormal: place the fraction under exponent 2**-14, then take that implicit leading 1 away.
            implicit = np.uint32(magnitude | np.uint32(113 << 23)).view(np.float32)
            subnormal = np.float32(implicit - np.uint32(113 << 23).view(np.float32)).view(np.uint32)
            exponent = np.uint32(h & np.uint32(0x7C00))
            bits = shifted if exponent != np.uint32(0) else subnormal
            bits = bits if exponent != np.uint32(0x7C00) else special
            total[i] = np.uint32(bits | sign).view(np.float32)


@_compile()
def _encode(out, total, layout):
    """out (n,) = bit patterns of total (n,) float32, rounded to nearest, ties to even; NaN is quiet."""
    infinity = np.uint32(0x7F800000)
    if layout == FLOAT32:
        for i in range(np.uint64(total.size)):
            bits = np.uint32(np.float32(total[i]).view(np.uint32))
            nan = np.uint32(bits & np.uint32(0x7FFFFFFF)) > infinity
            out[i] = np.uint32(0x7FC00000) if nan else bits
    elif layout == BFLOAT16:
        for i in range(np.uint64(total.size)):
            bits = np.uint32(np.float32(total[i]).view(np.uint32))
            nan = np.uint32(bits & np.uint32(0x7FFFFFFF)) > infinity
            odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
            rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
            out[i] = np.uint32(0x7FC0) if nan else rounded
    else:
        for i in range(np.uint64(total.size)):
            bits = np.uint32(np.float32(total[i]).view(np.uint32))
            sign = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000))
            magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
            odd = np.uint32(np.uint32(magnitude >> np.uint32(13)) & np.uint32(1))
            # Exponent bias 127 to 15, then half a unit less one, plus one where the last kept bit is odd.
            rebiased = np.uint32(magnitude - np.uint32(112 << 23))
            normal = np.uint32(np.uint32(rebiased + np.uint32(0xFFF) + odd) >> np.uint32(13))
            # Below 2**-14: 0.5 has its last place at 2**-24, float16's smallest step; the sum rounds to it.
            half = np.float32(0.5)
            stepped = np.float32(np.uint32(magnitude).view(np.float32) + half).view(np.uint32)
            subnormal = np.uint32(stepped - np.float32(half).view(np.uint32))
            result = normal if magnitude >= np.uint32(113 << 23) else subnormal
            result = result if magnitude < np.uint32(143 << 23) else np.uint32(0x7C00)
            result = np.uint32(result | sign)
            out[i] = result if magnitude <= infinity else np.uint32(0x7E00)


@_compile()
def _perturb_strip(base, out, following, layout, start, key, seeds, tables):
    """out (n,) = round(base (n,) + Σ terms); flat index 0 is element `start` (uint64) of the tensor."""
    skipped = np.int64(start & np.uint64(7))
    first = start >> np.uint64(3)
    total = np.empty(base.size, np.float32)
    words = np.empty(4 * ((skipped + base.size + 7) // 8), np.uint32)
    draws = words.view(np.uint16)[skipped : skipped + base.size]
    entries = np.empty(base.size, np.uint32)
    _decode(total, base, layout)
    for term in range(seeds.size):
        blocks(words, key, seeds[term], first)
        _look_up(entries, draws, tables[term], following)
        _add(total, entries, draws)
    _encode(out, total, layout)


@_compile()
def _strip(strip, firsts, sizes):
    """Which piece a strip is of, where it begins there and how many elements it has; none beyond the last strip."""
    if strip >= firsts[-1]:
        return 0, 0, 0
    piece = np.searchsorted(firsts, strip, side="right") - 1
    low = (strip - firsts[piece]) * STRIP
    return piece, low, min(STRIP, sizes[piece] - low)


@_compile()
def _perturb_nth(strip, sources, targets, sizes, keys, starts, firsts, like, layout, seeds, tables):
    """_perturb_strip of one strip of all pieces.

    sources, targets, keys, starts (pieces,) uint64; sizes (pieces,) int64; firsts (pieces + 1,) int64, the number of
    strips before each piece and of all; like: an array of the pieces' type.
    """
    width = like.itemsize
    piece, low, size = _strip(strip, firsts, sizes)
    following, ahead, more = _strip(strip + 1, firsts, sizes)
    _perturb_strip(
        numba.carray(_pointer(sources[piece] + np.uint64(low * width)), (size,), like.dtype),
        numba.carray(_pointer(targets[piece] + np.uint64(low * width)), (size,), like.dtype),
        numba.carray(_pointer(sources[following] + np.uint64(ahead * width)), (more,), like.dtype),
        layout,
        starts[piece] + np.uint64(low),
        keys[piece],
        seeds,
        tables,
    )


@_compile(parallel=True)
def _perturb(begin, sources, targets, sizes, keys, starts, firsts, like, layout, seeds, tables):
    """_perturb_nth of the strips from `begin` on, by as many threads as numba.get_num_threads() says."""
    for strip in numba.prange(begin, firsts[-1]):
        _perturb_nth(strip, sources, targets, sizes, keys, starts, firsts, like, layout, seeds, tables)


@_compile()
def _perturb_until(stop, begin, sources, targets, sizes, keys, starts, firsts, like, layout, seeds, tables):
    """_perturb_nth of strip after strip from `begin` on, in this thread, until stop (1,) is set; the first one left."""
    strip = begin
    while strip < firsts[-1] and stop[0] == 0:
        _perturb_nth(strip, sources, targets, sizes, keys, starts, firsts, like, layout, seeds, tables)
        strip += 1
    return strip


class Piece(NamedTuple):
    """A tensor or a range of its flat indices: `size` bit patterns in C order, read at one address, written at another.

    The caller keeps that memory alive. Both ranges are the same or disjoint, and no other piece's are written.
    """

    source: int
    target: int
    size: int
    key: int  # the tensor key t
    start: int = 0  # flat index in the tensor of the first element


# Numba's plain thread pool aborts the process when two Python threads enter it at once.
_one_at_a_time = threading.Lock()


@cache
def _start_threads() -> None:
    """Have Numba start its threads, once.

    It then tells OpenMP, which torch uses too, to take that many from then on: torch would go on with every core of
    the machine, however few it was told to use. So it is told again, in a way that vLLM has not replaced.
    """
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    numba.get_num_threads()
    if torch:
        torch._C.set_num_threads(before)


class Strips:
    """target = round(float32(source) + Σ float32(coefficient · z)) of every piece, all of one layout, cut into strips.

    For terms after terms: begin(), and then the strips in one call or in several, one at a time. Neither that nor the
    number of threads changes a bit.
    """

    def __init__(self, pieces: Sequence[Piece], layout: int) -> None:
        sources, targets, sizes, keys, starts = np.array(pieces, dtype=np.uint64).T.copy()
        sizes = sizes.astype(np.int64)
        firsts = np.concatenate([[0], np.cumsum((sizes + STRIP - 1) // STRIP)])
        like = np.empty(0, np.uint32 if layout == FLOAT32 else np.uint16)
        self._pieces = (sources, targets, sizes, keys, starts, firsts, like, layout)
        self._all = self._finished = int(firsts[-1])

    def begin(self, terms: Sequence[tuple[int, float]]) -> None:
        """terms: (seed, coefficient), at least one. No strip is done yet."""
        seeds = np.array([seed for seed, _ in terms], dtype=np.uint64)
        tables = quantiles.scaled(np.array([coefficient for _, coefficient in terms], dtype=np.float64).tobytes())
        self._terms = (seeds, tables)
        self._finished = 0

    @property
    def done(self) -> bool:
        """Whether no strip is left, of which a call that is still running says nothing."""
        return self._finished == self._all

    def run(self, threads: int | None = None) -> None:
        """Do what is left, by at most `threads` threads; by default, and at most, numba.get_num_threads()."""
        if self.done:
            return
        with _one_at_a_time:
            _start_threads()
            available = numba.get_num_threads()
            numba.set_num_threads(max(1, min(available, threads or available)))
            try:
                _perturb(self._finished, *self._pieces, *self._terms)
                self._finished = self._all
            finally:
                numba.set_num_threads(available)

    def run_until(self, stop: np.ndarray) -> None:
        """Do strip after strip in the calling thread alone, until all are done or another thread sets stop (1,) int64.

        It holds neither the GIL nor Numba's threads, and looks at `stop` every 20 microseconds or so.
        """
        if not self.done:
            self._finished = _perturb_until(stop, self._finished, *self._pieces, *self._terms)
