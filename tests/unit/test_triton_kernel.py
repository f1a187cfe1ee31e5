"""The Triton kernel against the reference, bit for bit, in Triton's interpreter; and compiled for GPUs nobody has here.

The interpreter runs the kernel's own code with NumPy on host memory. What a GPU's processor makes of the compiled code
is only tested where there is one: the last test.
"""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from randopt import noise
from randopt.noise import reference
from tests.unit.noises import DTYPES, KEY, NAME, TERM, bits, expected, random_base, tensor
from tests.unit.test_noise import coefficients, seeds

pytest.importorskip("triton", reason="Triton has wheels for Linux only")
with pytest.MonkeyPatch.context() as patch:  # read when a kernel is defined, Triton's own included
    patch.setenv("TRITON_INTERPRET", "1")
    import triton
    import triton.language as tl

    from randopt.noise import triton_kernel

    @triton.jit
    def draw(out, key: tl.uint64, seed: tl.uint64, first: tl.uint64, GROUPS: tl.constexpr):
        block = first.to(tl.uint64) + tl.arange(0, GROUPS).to(tl.uint64)
        h = triton_kernel.halfwords(block, key.to(tl.uint64), seed.to(tl.uint64), GROUPS)
        tl.store(out + tl.arange(0, 8 * GROUPS), h.to(tl.int16))

    @triton.jit
    def rounded(out, values, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
        index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + index, triton_kernel.encode(tl.load(values + index), FORMAT))


SPAN = 8 * triton_kernel.GROUPS  # elements per program
SEVERAL = [(1, 2e-3), (2**64 - 1, -1e-3), (0, 0.3)]

quick = settings(max_examples=20, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    """The interpreter looks at the variable again at its first call."""
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setenv("TRITON_INTERPRET", "1")
        yield


def perturbed(base: torch.Tensor, terms, start: int = 0, key: int = KEY) -> np.ndarray:
    """The bit patterns that the kernel gives."""
    out = torch.empty_like(base)
    triton_kernel.perturb_into(base, out, key, terms, start)
    return bits(out)


def draws(key: int, seed: int, first: int, groups: int) -> np.ndarray:
    out = torch.empty(8 * groups, dtype=torch.int16)
    draw[(1,)](out, key, seed, first, GROUPS=groups)
    return out.numpy().view(np.uint16)


# Philox


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # kat_vectors of Random123, "philox4x32 10"
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, answer) -> None:
    c, k, r = ([int(word, 16) for word in text.split()] for text in (counter, key, answer))
    found = draws(c[2] | c[3] << 32, k[0] | k[1] << 32, c[0] | c[1] << 32, 1)
    assert found.view(np.uint32).tolist() == r


@given(seeds, seeds, st.integers(0, 2**61 - 40) | st.integers(2**32 - 20, 2**32 + 20))
@quick
def test_draws_equal_the_reference_beyond_32_bits(key, seed, first) -> None:
    assert np.array_equal(draws(key, seed, first, 32), reference.halfwords(key, seed, 8 * first, 8 * 32))


# The kernel against the reference


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    st.integers(1, 2 * SPAN),
    st.integers(0, 2**36) | st.integers(0, 20),
    st.lists(st.tuples(seeds, coefficients), min_size=1, max_size=3),
    st.data(),
)
@quick
def test_kernel_equals_reference_on_any_bits(dtype, size, start, terms, data) -> None:
    width = 4 if dtype == "float32" else 2
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    base = tensor(rng.integers(0, 2 ** (8 * width), size).astype(f"<u{width}"), dtype)
    before = bits(base).copy()
    assert np.array_equal(perturbed(base, terms, start), expected(base, terms, start))
    assert np.array_equal(bits(base), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 9, SPAN - 1, SPAN, 2 * SPAN + 13])
@pytest.mark.parametrize("start", [0, 5, 8 * 2**32 - 11, 2**64 - 3 * SPAN])
def test_kernel_equals_reference_and_numba_at_odd_sizes_and_offsets(dtype, size, start) -> None:
    base = random_base(size, dtype)
    found = perturbed(base, SEVERAL, start)
    assert np.array_equal(found, expected(base, SEVERAL, start))
    assert np.array_equal(found, bits(noise.perturb(base, NAME, SEVERAL, start=start)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("sigma", [-0.0, 1e-8, -1e-3, 1e4, 1e308])
def test_every_16_bit_pattern(dtype, sigma) -> None:
    base = tensor(np.arange(65536, dtype=np.uint16), dtype)
    assert np.array_equal(perturbed(base, [(3, sigma)]), expected(base, [(3, sigma)]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_to_16_bits_at_and_beside_every_tie(dtype) -> None:
    dropped = 16 if dtype == "bfloat16" else 13  # bits of a normal value's fraction
    half = 1 << (dropped - 1)
    kept = np.arange(0, 2**32, 1 << dropped, dtype=np.uint64)[:, None]
    values = (
        (kept + np.array([0, 1, half - 1, half, half + 1], np.uint64)).astype(np.uint32).reshape(-1).view(np.float32)
    )
    out = torch.empty(values.size, dtype=torch.int16)
    block = 2**16
    rounded[(values.size // block,)](out, torch.from_numpy(values), FORMAT=dtype, BLOCK=block)
    rounding = reference.float32_to_bfloat16 if dtype == "bfloat16" else reference.float32_to_float16
    assert np.array_equal(out.numpy().view(np.uint16), rounding(values).view(np.uint16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sigma", [1e-44, 1e-40, 1e-30, 1e-7, 6e-5, 1.0, -1e4, 1e36])
def test_the_whole_range_of_float32(dtype, sigma) -> None:
    # Random exponents, so that sums meet every binade, ties, subnormals, overflow and NaN of both signs.
    patterns = np.random.default_rng(1).integers(0, 2**32, 5_000, dtype=np.uint32)
    values = torch.from_numpy(patterns.view(np.float32).copy()).to(getattr(torch, dtype))
    assert np.array_equal(perturbed(values, [(9, sigma)]), expected(values, [(9, sigma)]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
def test_extreme_seeds_and_keys(dtype, seed) -> None:
    base = random_base(100, dtype)
    for key in (0, 1, 2**31, 2**32, 2**63, 2**64 - 1):
        assert np.array_equal(perturbed(base, [(seed, -2e-3)], key=key), expected(base, [(seed, -2e-3)], key=key))


def test_terms_are_added_in_their_order() -> None:
    base = torch.ones(500)
    for terms in ([(1, 1e8), (1, -1e8), (2, 1e-3)], [(2, 1e-3), (1, 1e8), (1, -1e8)], [(s, 1e-2) for s in range(20)]):
        assert np.array_equal(perturbed(base, terms), expected(base, terms))


def test_nothing_is_written_outside_a_slice() -> None:
    base = random_base(3 * SPAN, "bfloat16")
    for low, high, start in ((0, 5, 3), (7, SPAN + 9, 8), (SPAN - 1, 3 * SPAN - 1, 0)):
        out = torch.zeros_like(base)
        triton_kernel.perturb_into(base[low:high], out[low:high], KEY, TERM, start)
        assert np.array_equal(bits(out[low:high]), expected(base[low:high], TERM, start))
        assert not out[:low].any() and not out[high:].any()


@given(st.lists(st.integers(0, 300), max_size=3), st.integers(0, 100), st.sampled_from(DTYPES))
@quick
def test_any_split_gives_the_same_bytes(cuts, start, dtype) -> None:
    base = random_base(300, dtype)
    edges = sorted({0, *cuts, 300})
    parts = [perturbed(base[low:high], SEVERAL, start + low) for low, high in pairwise(edges)]
    assert np.array_equal(np.concatenate(parts), perturbed(base, SEVERAL, start))


def test_law_tied_is_another_key() -> None:
    base = random_base(60, "bfloat16").reshape(6, 10)
    key = noise.shape_key(base.shape)
    assert np.array_equal(perturbed(base, TERM, key=key), bits(noise.perturb(base, "any", TERM, law="tied")))
    rows = noise.perturb(base[2:4], "any", TERM, law="tied", start=20, shape=base.shape)
    assert np.array_equal(perturbed(base[2:4], TERM, 20, key), bits(rows))


# How perturb uses it on a GPU; a host tensor stands for one on the GPU


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", [[], TERM, SEVERAL])
def test_what_perturb_does_on_a_gpu(dtype, terms) -> None:
    base = random_base(625, dtype).reshape(25, 25)
    fresh = noise.perturb(base, NAME, terms)
    for view in (base, base.T, base[::5, ::5], base[3], base[0, 0], base[:0]):
        out = torch.empty(view.shape, dtype=view.dtype)
        noise._perturb_on_gpu(view, out, KEY, terms, 0)
        assert torch.equal(out, noise.perturb(view.contiguous(), NAME, terms))
    inside = torch.nn.Parameter(base.clone())
    noise._perturb_on_gpu(inside, inside, KEY, terms, 0)
    assert torch.equal(inside.detach(), fresh)
    turned = base.T.contiguous()  # turned.T is base, in the memory that is written
    noise._perturb_on_gpu(turned.T, turned, KEY, terms, 0)
    assert torch.equal(turned, fresh)
    askew = torch.cat([base.reshape(-1), base[0, :1]])
    noise._perturb_on_gpu(askew[:-1], askew[1:], KEY, terms, 0)
    assert torch.equal(askew[1:], fresh.reshape(-1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_triton_finds_no_gpu_it_says_so_and_the_host_is_used(caplog) -> None:
    noise._triton_starts.cache_clear()
    assert not noise._triton_starts()
    assert "Triton cannot start" in caplog.text and "on the host" in caplog.text
    assert noise.runs_on(torch.device("cpu")) and not noise.runs_on(torch.device("meta"))


# Compiled


def run(script: str, *arguments: str, cache: Path) -> str:
    """What a Python program prints for which Triton compiles instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, script, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    return done.stdout


def test_compiled_for_gpus_it_adds_and_does_not_fuse(tmp_path) -> None:
    found = json.loads(run("tests/unit/triton_targets.py", cache=tmp_path))
    assert {(k["capability"], k["format"]) for k in found} == {(c, d) for c in (80, 90) for d in DTYPES}
    per_thread = SPAN // (32 * triton_kernel.WARPS)
    for kernel in found:
        instructions = kernel["instructions"]
        assert kernel["target"][0].startswith(f"sm_{kernel['capability']}")
        # The float path: one addition per element, in IEEE arithmetic with subnormals.
        floats = [i for i in instructions if ".f32" in i and not i.startswith(("setp", "cvt", "mov", "ld", "st"))]
        assert floats == ["add.rn.f32"] * per_thread
        assert not [i for i in instructions if i.startswith(("fma", "mad.rn")) or ".ftz" in i]
        assert set(kernel["machine"]) <= {"FADD", "HADD2.F32"}  # the latter is how float16 becomes float32
        # One Philox block for 8 elements: two products per round.
        products = [i for i in instructions if i.startswith("mul.wide.u32")]
        assert 0 < len(products) <= 2 * reference.ROUNDS * per_thread // 8
        if kernel["launch"] == "slice":
            continue
        # Base and result pass in 16 bytes at a time, and the L1 cache is left to the table.
        wide = per_thread * (4 if kernel["format"] == "float32" else 2) // 16
        assert instructions.count("ld.global.cg.v4.b32") == instructions.count("st.global.cg.v4.b32") == wide
        assert kernel["shared_bytes"] <= (2048 if kernel["format"] == "float32" else 0)


ON_GPU = """
import torch
from randopt import noise

assert noise.runs_on(torch.device("cuda"))
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for size in (1, 7, 4096, 1_000_003):
        bits = torch.randint(-(2**31), 2**31, (size,), dtype=torch.int64).to(torch.int32)
        base = bits.view(dtype)[:size] if dtype == torch.float32 else bits.to(torch.int16).view(dtype)
        word = torch.int32 if dtype == torch.float32 else torch.int16
        for terms in ([], [(42, 1e-3)], [(0, 2e-3), (2**64 - 1, -1e30), (7, 1e-42)]):
            for start in (0, 5, 2**40 + 8):
                expected = noise.perturb(base, "weight", terms, start=start).view(word)
                gpu = base.cuda()
                out = torch.empty(size, dtype=dtype, device="cuda")
                streamed = noise.perturb(base, "weight", terms, start=start, out=out)
                fresh = noise.perturb(gpu, "weight", terms, start=start)
                in_place = noise.perturb(gpu, "weight", terms, start=start, out=gpu)
                for result in (streamed, fresh, in_place):
                    assert torch.equal(result.cpu().view(word), expected), (dtype, size, terms, start)
print("equal")
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_bits_are_those_of_the_host(tmp_path) -> None:
    program = tmp_path / "on_gpu.py"
    program.write_text(ON_GPU)
    assert run(str(program), cache=tmp_path) == "equal\n"
