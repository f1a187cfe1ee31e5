"""What the tests of model-written programs share."""

import functools

import pytest

from randopt import sandbox
from randopt.errors import UserError


@functools.cache
def _reason() -> str:
    try:
        sandbox.require("bubblewrap")
    except UserError as error:
        return str(error)
    return ""


def need_bubblewrap() -> None:
    """Skip, with the reason, where bubblewrap cannot run."""
    if _reason():
        pytest.skip(_reason())
