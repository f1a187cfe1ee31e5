"""Noise version 1: the contract's known answers, and the kernel against the plain reference, bit for bit."""

import hashlib
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from randopt import noise
from randopt.errors import UserError
from randopt.noise import kernel, quantiles, reference
from tests.unit.noises import DTYPES, KEY, NAME, TERM, bits, expected, random_base, tensor

quick = settings(max_examples=60, deadline=None)  # the first example may wait for the compiler
seeds = st.integers(0, 2**64 - 1)
coefficients = st.floats(-10, 10) | st.sampled_from([0.0, -0.0, 1e-45, 3e38, -1e300, 5e-4])
term_lists = st.lists(st.tuples(seeds, coefficients), min_size=1, max_size=4)


# Philox


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # kat_vectors of Random123, "philox4x32 10"
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, answer):
    c, k, r = ([int(word, 16) for word in text.split()] for text in (counter, key, answer))
    assert reference.philox4x32(np.array([c], dtype=np.uint64), (k[0], k[1])).tolist() == [r]
    words = np.empty(4, dtype=np.uint32)
    tensor_key, seed, block = (np.uint64(a | b << 32) for a, b in ((c[2], c[3]), k, c[:2]))
    kernel.blocks(words, tensor_key, seed, block)
    assert words.tolist() == r


@given(seeds, seeds, st.integers(0, 2**61 - 40) | st.integers(2**32 - 20, 2**32 + 20))
@quick
def test_kernel_blocks_equal_reference_beyond_32_bits(key, seed, first):
    words = np.empty(4 * 33, dtype=np.uint32)
    kernel.blocks(words, np.uint64(key), np.uint64(seed), np.uint64(first))
    assert np.array_equal(words.view(np.uint16), reference.halfwords(key, seed, 8 * first, 8 * 33))


# The quantile table


def test_quantile_file_is_what_the_formula_gives():
    content = quantiles.PATH.read_bytes()
    assert len(content) == 4 * quantiles.SIZE
    assert (
        hashlib.sha256(content).hexdigest()
        == quantiles.SHA256
        == "e230179c3827e615b4f063e99741aa697a3a8925635cf89f6dddf2f8182450ef"
    )
    assert content == quantiles.compute()


def test_quantile_moments():
    half = quantiles.table().astype(np.float64)
    z = np.concatenate([-half[::-1], half])
    assert math.fsum(z) == 0
    assert np.mean(z**2) == pytest.approx(1, abs=1e-8)
    assert np.mean(z**4) == pytest.approx(2.9992, abs=5e-5)
    assert z.max() == pytest.approx(4.325, abs=5e-5)
    assert (np.diff(z) > 0).all() and half[0] > 0


@pytest.mark.parametrize("damage", ["flipped", "short", "missing"])
def test_damaged_quantile_file_is_refused(tmp_path, damage):
    path = tmp_path / "quantiles.f32"
    content = bytearray(quantiles.PATH.read_bytes())
    content[1000] ^= 1
    if damage != "missing":
        path.write_bytes(content if damage == "flipped" else content[:-4])
    with pytest.raises(UserError, match=r"quantiles\.f32.*Install the package again"):
        quantiles.load(path)


# The reference against the contract, written a third time with Python's integers


def scalar_z(name: str, seed: int, index: int) -> float:
    key = int.from_bytes(hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest(), "little")
    c = [index // 8 & 0xFFFFFFFF, index // 8 >> 32, key & 0xFFFFFFFF, key >> 32]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    j = index % 8
    h = c[j // 2] >> 16 * (j % 2) & 0xFFFF
    magnitude = float(quantiles.table()[h & 0x7FFF])
    return -magnitude if h >> 15 else magnitude


@given(st.text(max_size=20), seeds, st.integers(0, 2**40), st.integers(0, 20))
@quick
def test_reference_noise_follows_the_contract(name, seed, start, count):
    z = reference.noise(noise.tensor_key(name), seed, start, count)
    assert z.dtype == np.float32
    assert z.tolist() == [scalar_z(name, seed, start + i) for i in range(count)]


# The kernel against the reference


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.integers(0, 400), st.integers(0, 2**36) | st.integers(0, 20), term_lists, st.data())
@quick
def test_kernel_equals_reference(dtype, size, start, terms, data):
    width = 4 if dtype == "float32" else 2
    content = data.draw(st.binary(min_size=width * size, max_size=width * size))
    base = tensor(np.frombuffer(content, dtype=f"<u{width}"), dtype)
    before = bits(base).copy()
    result = noise.perturb(base, NAME, terms, start=start)
    assert np.array_equal(bits(result), expected(base, terms, start))
    assert np.array_equal(bits(base), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 8, 9, kernel.STRIP - 1, kernel.STRIP + 3, 3 * kernel.STRIP + 13])
@pytest.mark.parametrize("start", [0, 5, 8 * 2**32 - 11])
def test_kernel_equals_reference_at_odd_sizes_and_offsets(dtype, size, start):
    base = random_base(size, dtype)
    terms = [(1, 2e-3), (2**64 - 1, -1e-3), (7, 0.3)]
    assert np.array_equal(bits(noise.perturb(base, NAME, terms, start=start)), expected(base, terms, start))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("sigma", [0.0, 1e-45, 1e-8, 1e-3, -1.0, 1e4, 1e38, 1e308])
def test_every_16_bit_pattern(dtype, sigma):
    base = tensor(np.arange(65536, dtype=np.uint16), dtype)
    result = noise.perturb(base, NAME, [(3, sigma)])
    assert np.array_equal(bits(result), expected(base, [(3, sigma)]))
    # torch's own addition and rounding, which share no code with the reference
    with np.errstate(over="ignore"):
        scaled = (np.float64(sigma) * reference.noise(KEY, 3, 0, 65536).astype(np.float64)).astype(np.float32)
    total = base.to(torch.float32) + torch.from_numpy(scaled)
    rounded = total.to(base.dtype)
    nan = torch.isnan(total)
    assert torch.equal(torch.isnan(result), nan)
    assert np.array_equal(bits(result)[~nan.numpy()], bits(rounded)[~nan.numpy()])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_agrees_with_torch_over_the_whole_range_of_float32(dtype):
    # Random exponents for base and σ, so that sums meet every binade, ties, subnormals and overflow.
    patterns = np.random.default_rng(1).integers(0, 2**32, 20_000, dtype=np.uint32)
    values = torch.from_numpy(patterns.view(np.float32).copy()).to(getattr(torch, dtype))
    for sigma in (1e-44, 1e-40, 1e-30, 1e-7, 6e-5, 1.0, 1e4, 1e36):
        result = noise.perturb(values, NAME, [(9, sigma)])
        scaled = (sigma * reference.noise(KEY, 9, 0, 20_000).astype(np.float64)).astype(np.float32)
        total = values.to(torch.float32) + torch.from_numpy(scaled)
        finite = ~torch.isnan(total).numpy()
        assert np.array_equal(bits(result)[finite], bits(total.to(values.dtype))[finite])


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_nan_and_overflow(dtype):
    inf = math.inf
    base = torch.tensor([inf, -inf, math.nan, 0.0] * 16, dtype=getattr(torch, dtype))
    result = noise.perturb(base, NAME, TERM)
    assert torch.equal(result[0::4], base[0::4]) and torch.equal(result[1::4], base[1::4])
    quiet = {"bfloat16": 0x7FC0, "float16": 0x7E00, "float32": 0x7FC00000}[dtype]
    assert set(bits(result[2::4]).tolist()) == {quiet}
    assert torch.isfinite(result[3::4]).all()
    huge = noise.perturb(base[3::4], NAME, [(42, 1e300)])
    signs = np.sign(reference.noise(KEY, 42, 0, 16))
    assert torch.equal(huge, torch.from_numpy(signs).to(base.dtype) * inf)


def test_terms_are_added_in_their_order():
    base = torch.ones(4096)
    up_down = noise.perturb(base, NAME, [(1, 1e8), (1, -1e8), (2, 1e-3)])
    down_last = noise.perturb(base, NAME, [(2, 1e-3), (1, 1e8), (1, -1e8)])
    assert not torch.equal(up_down, down_last)
    assert np.array_equal(bits(up_down), expected(base, [(1, 1e8), (1, -1e8), (2, 1e-3)]))


def test_negative_coefficient_is_the_mirror_image():
    base = torch.zeros(1000)
    plus, minus = (noise.perturb(base, NAME, [(5, sigma)]) for sigma in (2e-3, -2e-3))
    assert torch.equal(plus, -minus)


@given(st.lists(st.integers(0, 300), max_size=4), st.integers(0, 100), st.sampled_from(DTYPES))
@quick
def test_any_split_gives_the_same_bytes(cuts, start, dtype):
    base = random_base(300, dtype)
    terms = [(11, 1e-2), (12, -3e-3)]
    whole = noise.perturb(base, NAME, terms, start=start)
    edges = [0, *sorted(cuts), 300]
    parts = [noise.perturb(base[low:high], NAME, terms, start=start + low) for low, high in pairwise(edges)]
    assert torch.equal(torch.cat(parts), whole)


def test_threads_change_nothing():
    base = random_base(5 * kernel.STRIP + 77, "bfloat16")
    available = numba.get_num_threads()
    results = [noise.perturb(base, NAME, TERM, threads=threads) for threads in (None, 1, 2, 10_000)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        results.append(noise.perturb(base, NAME, TERM))
    finally:
        torch.set_num_threads(before)
    with ThreadPoolExecutor(4) as pool:
        results += pool.map(lambda _: noise.perturb(base, NAME, TERM), range(8))
    assert all(torch.equal(result, results[0]) for result in results)
    assert numba.get_num_threads() == available


def test_torch_keeps_the_threads_it_was_told_to_use():
    """In a process of its own: Numba starts its threads once, and then sets OpenMP's number for all."""
    script = f"""
import torch
from randopt import noise
torch.set_num_threads(1)
torch.set_num_threads = None  # vLLM replaces it
noise.perturb(torch.zeros({3 * kernel.STRIP}), "a", [(1, 0.1)])
print(torch.get_num_threads())
"""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["1"]


# What a seed means, for ever


@pytest.mark.parametrize(
    ("dtype", "digest"),
    [
        ("bfloat16", "eacf855e191c6adb247950daeae5a2ce11877a0c6a98dc3766ab0e24d58bbf3a"),
        ("float16", "043b2a6db5b5ce9234803578e77e2be49dfd2a104afea824a0d00d3baae0e60b"),
        ("float32", "4d1f275d69a93ee04474aaac53ec198f9374a2175047b94e9f5b34bcb4917864"),
    ],
)
def test_golden(dtype, digest):
    base = (torch.arange(-500, 501, dtype=torch.float32) / 4096).to(getattr(torch, dtype))
    result = noise.perturb(base, "model.embed_tokens.weight", [(42, 1e-3), (2**64 - 1, -2.5e-3)])
    little_endian = bits(result).astype("<u4" if dtype == "float32" else "<u2").tobytes()
    assert hashlib.sha256(little_endian).hexdigest() == digest


def test_golden_keys():
    assert noise.tensor_key("model.embed_tokens.weight") == 0xF64261A496B5D16A
    assert noise.shape_key((576, 1536)) == 0x6EA2E0FD8C6FE5E5
    assert (noise.NOISE_VERSION, noise.LAWS) == (1, ("iid", "tied"))


# Statistics; the seeds are fixed, and the bounds are five standard errors of n independent draws

COUNT = 2**20


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.dot(a.astype(np.float64), b.astype(np.float64)) / len(a))


def test_draws_have_the_moments_of_a_normal():
    z = reference.noise(KEY, 42, 0, COUNT).astype(np.float64)
    assert abs(z.mean()) < 5 / math.sqrt(COUNT)
    assert abs((z**2).mean() - 1) < 5 * math.sqrt(2 / COUNT)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / COUNT)
    assert abs((z**4).mean() - 2.9992) < 5 * math.sqrt(96 / COUNT)


def test_tensors_seeds_and_neighbours_are_uncorrelated():
    z = reference.noise(KEY, 42, 0, COUNT)
    bound = 5 / math.sqrt(COUNT)
    others = [
        reference.noise(noise.tensor_key(NAME.replace("0", "1")), 42, 0, COUNT),
        reference.noise(noise.tensor_key(NAME.replace("q_proj", "k_proj")), 42, 0, COUNT),
        reference.noise(KEY, 43, 0, COUNT),
        reference.noise(KEY, 42 + 2**32, 0, COUNT),
        reference.noise(KEY, 42, 8 * 2**32, COUNT),
    ]
    for other in others:
        assert abs(correlation(z, other)) < bound
        assert abs(correlation(z**2 - 1, other**2 - 1)) < 2 * bound  # the variance of z² is 2
    for lag in (*range(1, 17), 576, 4096):
        n = COUNT - lag
        assert abs(correlation(z[:n], z[lag:])) < 5 / math.sqrt(n)
        assert abs(correlation(z[:n] ** 2 - 1, z[lag:] ** 2 - 1)) < 10 / math.sqrt(n)


def test_perturbation_has_the_size_of_sigma():
    base = torch.zeros(COUNT)
    moved = noise.perturb(base, NAME, [(1, 2e-3)]).numpy().astype(np.float64)
    assert moved.std() == pytest.approx(2e-3, rel=5 / math.sqrt(2 * COUNT))


# The entry


def test_law_tied_gives_tensors_of_one_shape_the_same_noise():
    base = torch.zeros(6, 10)
    a, b = (noise.perturb(base, name, TERM, law="tied") for name in ("a", "b"))
    assert torch.equal(a, b)
    assert not torch.equal(*(noise.perturb(base, name, TERM) for name in ("a", "b")))
    assert not torch.equal(a.reshape(-1), noise.perturb(base.reshape(-1), "a", TERM, law="tied"))
    key = int.from_bytes(hashlib.blake2b(b"shape:6x10", digest_size=8).digest(), "little")
    assert np.array_equal(bits(a), expected(base, TERM, key=key))
    rows = noise.perturb(base[2:4], "a", TERM, law="tied", start=20, shape=base.shape)
    assert torch.equal(rows, a[2:4])


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_terms_copy_every_bit(dtype):
    width = 4 if dtype == "float32" else 2
    patterns = np.random.default_rng(2).integers(0, 2 ** (8 * width), 70_000).astype(f"<u{width}")
    base = tensor(patterns, dtype)
    result = noise.perturb(base, NAME, [])
    assert np.array_equal(bits(result), patterns)
    assert result.data_ptr() != base.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(dtype):
    flat = random_base(24, dtype)
    whole = noise.perturb(flat, NAME, TERM)
    for shape in [(24,), (4, 6), (2, 3, 4), (24, 1, 1)]:
        result = noise.perturb(flat.reshape(shape), NAME, TERM)
        assert result.shape == shape and result.dtype == flat.dtype
        assert torch.equal(result.reshape(-1), whole)
    scalar = noise.perturb(flat[0], NAME, TERM)
    assert scalar.shape == () and torch.equal(scalar, whole[0])
    for shape in [(0,), (3, 0, 2)]:
        empty = torch.empty(shape, dtype=flat.dtype)
        assert noise.perturb(empty, NAME, TERM).shape == shape
        assert noise.perturb(empty, NAME, TERM, out=empty) is empty


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_base_counts_in_c_order(dtype):
    base = random_base(60, dtype).reshape(6, 10)
    for view in (base.T, base[:, ::2], base[::3], base[1, ::2], base[:1].expand(4, 10)):
        dense = view.contiguous().clone()
        assert torch.equal(noise.perturb(view, NAME, TERM), noise.perturb(dense, NAME, TERM))


@pytest.mark.parametrize("dtype", DTYPES)
def test_out(dtype):
    base = random_base(1000, dtype)
    fresh = noise.perturb(base, NAME, TERM)
    out = torch.full_like(base, math.nan)
    assert noise.perturb(base, NAME, TERM, out=out) is out
    assert torch.equal(out, fresh)
    parameter = torch.nn.Parameter(base.clone())
    assert noise.perturb(parameter, NAME, TERM, out=parameter) is parameter
    assert torch.equal(parameter.detach(), fresh)
    buffer = torch.cat([base, base[:1]])
    noise.perturb(buffer[:-1], NAME, TERM, out=buffer[1:])
    assert torch.equal(buffer[1:], fresh)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_numpy_arrays(dtype):
    base = np.random.default_rng(3).standard_normal((50, 7)).astype(dtype)
    result = noise.perturb(base, NAME, TERM)
    assert isinstance(result, np.ndarray) and result.dtype == dtype and result.shape == (50, 7)
    assert np.array_equal(result, noise.perturb(torch.from_numpy(base), NAME, TERM).numpy())
    assert np.array_equal(noise.perturb(np.asfortranarray(base), NAME, TERM), result)
    locked = np.frombuffer(base.tobytes(), dtype=dtype).reshape(base.shape)
    assert np.array_equal(noise.perturb(locked, NAME, TERM), result)
    askew = np.frombuffer(b"x" + base.tobytes(), dtype=dtype, offset=1).reshape(base.shape)
    assert np.array_equal(noise.perturb(askew, NAME, TERM), result)
    assert noise.perturb(base, NAME, TERM, out=base) is base
    assert np.array_equal(base, result)
    scalar = noise.perturb(np.zeros((), dtype), NAME, TERM)
    assert isinstance(scalar, np.ndarray) and scalar.shape == ()


def test_a_device_gets_the_host_result(monkeypatch):
    base = random_base(100, "bfloat16")
    fresh = noise.perturb(base, NAME, TERM)
    monkeypatch.setattr(noise, "_on_host", lambda array: False)
    assert torch.equal(noise.perturb(base, NAME, TERM), fresh)
    assert noise.perturb(base, NAME, TERM, out=base) is base
    assert torch.equal(base, fresh)


def test_numpy_numbers_are_accepted_as_terms():
    base = torch.zeros(100)
    as_numpy = noise.perturb(base, NAME, [(np.uint64(2**64 - 1), np.float64(1e-3))])
    assert torch.equal(as_numpy, noise.perturb(base, NAME, [(2**64 - 1, 1e-3)]))


def test_zero_coefficients_of_both_signs_are_told_apart():
    base = torch.full((64,), -0.0)
    for sigma in (0.0, -0.0, 0.0):
        assert np.array_equal(bits(noise.perturb(base, NAME, [(1, sigma)])), expected(base, [(1, sigma)]))


X = torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X.to(torch.int8), NAME, TERM), {}, r"dtype int8; only bfloat16, float16, float32.*unquantised"),
        ((X.to(torch.float8_e4m3fn), NAME, TERM), {}, "dtype float8_e4m3fn"),
        ((X.double(), NAME, []), {}, "dtype float64"),
        ((np.zeros(3, np.uint16), NAME, TERM), {}, "dtype uint16"),
        ((np.zeros(3, ">f4"), NAME, TERM), {}, "dtype >f4"),
        (([0.0], NAME, TERM), {}, "given as list; expected a torch tensor"),
        ((X, 7, TERM), {}, "tensor name is 7"),
        (
            (X, NAME, [(1, 0.1), (-1, 0.1)]),
            {},
            r"Term 2 .* seed -1; expected an integer from 0 to 2\*\*64 - 1",
        ),
        ((X, NAME, [(2**64, 0.1)]), {}, "seed 18446744073709551616"),
        ((X, NAME, [(1.0, 0.1)]), {}, r"seed 1\.0"),
        (
            (X, NAME, [(1, math.nan)]),
            {},
            r"Term 1 .*\(seed 1\) has the coefficient nan; expected a finite number",
        ),
        ((X, NAME, [(1, math.inf)]), {}, "coefficient inf"),
        ((X, NAME, [(1, "0.1")]), {}, "coefficient '0.1'"),
        ((X, NAME, [5]), {}, r"Term 1 .* is 5; expected a pair \(seed, coefficient\)"),
        ((X, NAME, TERM), {"law": "gaussian"}, "law is 'gaussian'; expected one of iid, tied"),
        ((X, NAME, TERM), {"law": "tied", "start": 4}, "Pass it as shape="),
        ((X, NAME, TERM), {"start": -1}, "starts at -1"),
        ((X, NAME, TERM), {"start": 2**64 - 23}, r"at most 2\*\*64"),
        ((X, NAME, TERM), {"start": 1, "shape": (4, 6)}, r"at most 24, the size of shape \(4, 6\)"),
        ((X, NAME, TERM), {"out": X.T}, r"float32 \(6, 4\); expected that of base, float32 \(4, 6\)"),
        ((X, NAME, TERM), {"out": X.half()}, "out for .* is float16"),
        ((X, NAME, TERM), {"out": torch.zeros(6, 4).T}, "not contiguous"),
        ((X, NAME, TERM), {"out": X.numpy()}, r"is a numpy.ndarray; expected the type of base, Tensor"),
        ((X.numpy(), NAME, TERM), {"out": X}, r"is a torch.Tensor; expected the type of base, ndarray"),
        ((X.numpy(), NAME, TERM), {"out": np.broadcast_to(np.float32(0), (4, 6))}, "not contiguous"),
    ],
)
def test_errors_say_what_was_given_and_expected(arguments, options, message):
    with pytest.raises(UserError, match=message):
        noise.perturb(*arguments, **options)


def test_importing_the_entry_loads_no_heavy_package():
    code = (
        "import sys; from randopt.noise import LAWS, NOISE_VERSION, tensor_key; "
        "sys.exit(bool({'numpy', 'numba', 'torch', 'triton'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
