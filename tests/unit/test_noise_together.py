"""Many tensors perturbed by one call, at once or in steps: what each gets alone."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from randopt import noise
from randopt.errors import UserError
from randopt.noise import kernel
from tests.unit.noises import DTYPES, NAME, TERM, bits, random_base


def many_bases() -> dict[str, torch.Tensor]:
    """Tensors that share strips, threads and the kernel's call: small, empty, large, of all dtypes, strided."""
    sizes = [1, 7, 0, kernel.STRIP, 3 * kernel.STRIP + 13, 300, 576, kernel.STRIP + 1]
    bases = {f"{dtype}.{i}": random_base(n, dtype, i) for i, n in enumerate(sizes) for dtype in DTYPES}
    bases["scalar"] = random_base(1, "float32")[0]
    bases["turned"] = random_base(60, "bfloat16").reshape(6, 10).T
    return bases


@pytest.mark.parametrize("law", noise.LAWS)
@pytest.mark.parametrize("terms", [TERM, [(1, 1e-2), (2**64 - 1, -3e-3), (1, 0.5)], []])
def test_many_tensors_at_once_get_what_each_gets_alone(terms, law):
    bases = many_bases()
    alone = {name: noise.perturb(base, name, terms, law=law) for name, base in bases.items()}
    found = noise.perturb_all(bases, terms, law=law)
    assert list(found) == list(bases)
    assert all(np.array_equal(bits(found[name]), bits(alone[name])) for name in bases)
    out = {name: torch.full(base.shape, math.nan, dtype=base.dtype) for name, base in bases.items()}
    found = noise.perturb_all(bases, terms, law=law, out=out)
    assert all(found[name] is out[name] for name in bases)
    assert all(np.array_equal(bits(out[name]), bits(alone[name])) for name in bases)
    own = {name: base.clone(memory_format=torch.contiguous_format) for name, base in bases.items()}
    noise.perturb_all(own, terms, law=law, out=own)
    assert all(np.array_equal(bits(own[name]), bits(alone[name])) for name in bases)


def test_many_tensors_at_once_where_an_out_lies_askew():
    base = random_base(1000, "bfloat16")
    buffer = torch.cat([base, base[:1]])
    noise.perturb_all({NAME: buffer[:-1], "b": base}, TERM, out={NAME: buffer[1:], "b": torch.empty_like(base)})
    assert torch.equal(buffer[1:], noise.perturb(base, NAME, TERM))


@pytest.mark.parametrize("stopped", [False, True])
def test_many_tensors_in_steps(stopped):
    bases = many_bases()
    together = noise.Together(bases, out={name: torch.zeros(b.shape, dtype=b.dtype) for name, b in bases.items()})
    for terms in ([], TERM, [(1, 1e-2), (2, 0.5)], TERM):
        together.begin(terms)
        assert not together.done
        together.run_until(np.array([int(stopped)]))
        found = together.finish()
        assert together.done
        assert all(np.array_equal(bits(found[n]), bits(noise.perturb(bases[n], n, terms))) for n in bases)
    with pytest.raises(UserError, match="seed -1"):
        together.begin([(-1, 0.1)])


def test_a_thread_that_makes_many_tensors_stops_when_it_is_told():
    base = torch.zeros(200 * kernel.STRIP)
    out, stop = torch.zeros_like(base), np.zeros(1, np.int64)
    together = noise.Together({NAME: base}, out={NAME: out})
    together.begin(TERM * 100)  # for seconds
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(together.run_until, stop)
        while not out.any():
            assert not running.done()
        stop[0] = 1
        running.result()
    made = np.flatnonzero(out.numpy())[-1]
    assert made < 200 * kernel.STRIP // 2, "it went on"
    assert not together.done
    assert torch.equal(together.finish()[NAME], noise.perturb(base, NAME, TERM * 100))


def test_of_many_tensors_none_is_written_if_one_is_refused():
    base = torch.zeros(10)
    out = {"a": base.clone(), "b": torch.zeros(11)}
    with pytest.raises(UserError, match=r"out for 'b'"):
        noise.perturb_all({"a": base, "b": base}, TERM, out=out)
    assert not out["a"].any()
    with pytest.raises(UserError, match="seed -1"):
        noise.perturb_all({}, [(-1, 0.1)])
    assert noise.perturb_all({}, TERM) == {}
