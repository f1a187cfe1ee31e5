"""Tensors made ahead of time: those made in time, whatever was expected."""

import threading

import pytest
import torch

from randopt import noise
from randopt.engines.ahead import Ahead
from randopt.errors import UserError

BASE = {f"layer.{n}": torch.randn(300, 70, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(6)}
NAMES = list(BASE)[:5]  # the last one is excluded


def same(made: Ahead, perturbation) -> bool:
    found = {name: tensor.clone() for name, tensor in made.tensors(perturbation)}
    wanted = {name: noise.perturb(BASE[name], name, perturbation) for name in NAMES}
    return list(found) == NAMES and all(torch.equal(found[name], wanted[name]) for name in NAMES)


def test_a_hint_changes_no_bit() -> None:
    made = Ahead(BASE, NAMES, "iid")
    right, wrong = ((1, 0.3),), ((2, 0.3),)
    assert same(made, right)
    for hint in (right, wrong, ((3, -0.1), (4, 0.2))):
        made.expect(hint)
        assert same(made, right)
        assert same(made, right)  # what was given away is not taken for the next
    made.expect(wrong)
    made.expect(right)
    assert same(made, right)
    assert not [thread for thread in threading.enumerate() if thread.name == "next weights"]


def test_a_hint_is_used() -> None:
    made = Ahead(BASE, NAMES, "iid")
    made.expect(((1, 0.3),))
    made._thread.join()
    made._base = {}  # nothing can be made any more
    assert [name for name, _ in made.tensors(((1, 0.3),))] == NAMES


def test_what_fails_ahead_is_told_when_the_tensors_are_wanted() -> None:
    made = Ahead(BASE, NAMES, "iid")
    made.expect(((2, float("inf")),))
    made._thread.join()
    with pytest.raises(UserError, match="coefficient inf"):
        next(made.tensors(((2, 0.1),)))
    assert same(made, ((2, 0.1),))
