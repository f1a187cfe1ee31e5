"""A finished run of the tiny model, and copies of it to break."""

import pytest

from tests.conftest import Checkout
from tests.workflow.tools import copy_of, new_checkout


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, tiny_model) -> Checkout:
    """A finished run; tests work on copies of it."""
    checkout = new_checkout(tmp_path_factory.mktemp("undisturbed"), tiny_model)
    checkout.snakemake()
    return checkout


@pytest.fixture
def finished(tmp_path, tiny_model, undisturbed) -> Checkout:
    """A copy of the finished run, with Snakemake's records of it."""
    return copy_of(undisturbed, tmp_path, tiny_model)
