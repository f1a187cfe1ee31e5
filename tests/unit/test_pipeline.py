"""Tensors made by one core while another loads those before: the same bits, whoever is faster, and no thread lost."""

import itertools
import threading
import time

import pytest
import torch

from randopt import noise
from randopt.engines import pipeline
from randopt.engines.pipeline import Pipeline
from randopt.errors import UserError

SIZES = (40_000, 7, 70_000, 300_000, 0, 33_000, 64, 90_000)  # under and over a strip, and a group


def base() -> dict[str, torch.Tensor]:
    """Floating tensors, one that is not contiguous, one of integers."""
    drawn = torch.Generator().manual_seed(0)
    made = {f"layer.{n}": torch.randn(size, generator=drawn).bfloat16() for n, size in enumerate(SIZES)}
    made["turned"] = torch.randn(300, 70, generator=drawn).bfloat16().T
    return made | {"positions": torch.arange(50), "last": torch.randn(50_000, generator=drawn).bfloat16()}


BASE = base()
PERTURBED = [name for name in BASE if name not in ("layer.3", "positions")]


@pytest.fixture(params=[1, 2, 3])
def threads(request, monkeypatch):
    """As many threads for torch, and groups of few tensors."""
    monkeypatch.setattr(pipeline, "GROUP_BYTES", 150_000)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def wanted(perturbation, law: str = "iid") -> dict[str, torch.Tensor]:
    return {
        name: noise.perturb(tensor, name, perturbation, law=law) if name in PERTURBED else tensor
        for name, tensor in BASE.items()
    }


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("law", noise.LAWS)
def test_the_bits_are_the_same_whoever_is_faster(threads, law) -> None:
    made = Pipeline(BASE, PERTURBED, law)
    for seed, pause in itertools.product(range(5), (0, 0.002)):  # the loader catches up with the helper, or lags
        perturbation = ((seed, 0.3), (seed + 9, -0.1))
        found = {}
        for name, tensor in made.tensors(perturbation):
            assert torch.get_num_threads() in (threads, max(1, threads - 1))
            found[name] = tensor.clone()
            time.sleep(pause)
        assert same(found, wanted(perturbation, law))
        assert torch.get_num_threads() == threads
    if threads == 1:
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("noise")]


def test_the_helper_makes_groups_while_the_loader_is_at_work(threads) -> None:
    made = Pipeline(BASE, PERTURBED, "iid")
    at_work = made.tensors(((1, 0.3),))
    next(at_work)
    while made._running and not made._running.done():
        time.sleep(0.01)
    assert all(group.done or "turned" in names for names, group in made._groups[1:]) == (threads > 1)
    at_work.close()


def test_a_load_that_is_given_up_leaves_nothing_behind(threads) -> None:
    made = Pipeline(BASE, PERTURBED, "iid")
    for stop_after in range(len(BASE)):
        half_way = made.tensors(((stop_after, 0.3),))
        list(itertools.islice(half_way, stop_after))
        half_way.close()
        assert torch.get_num_threads() == threads
        assert same(dict(made.tensors(((stop_after, 0.3),))), wanted(((stop_after, 0.3),)))


def test_what_is_held_is_not_made_anew(threads) -> None:
    made = Pipeline(BASE, PERTURBED, "iid")
    first = dict(made.tensors(((1, 0.3),)))
    first["layer.0"][0] = 7  # would be lost
    assert dict(made.tensors(((1, 0.3),)))["layer.0"][0] == 7
    assert same(dict(made.tensors(((2, 0.3),))), wanted(((2, 0.3),)))
    with pytest.raises(UserError, match="coefficient inf"):
        next(made.tensors(((2, float("inf")),)))
    assert same(dict(made.tensors(((2, 0.3),))), wanted(((2, 0.3),)))
