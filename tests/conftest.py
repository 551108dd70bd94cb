"""Options and fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests.processes import OF_A_LAUNCHER, Jobs, jobs

# Failed assertions in these modules show their values, like in test files.
pytest.register_assert_rewrite("tests.faults.runs", "tests.lightning_contract.launching")

# The same examples in every run, however slow the machine: a failure belongs to the change that was made.
# `--hypothesis-profile search` tries new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("search", derandomize=False, deadline=None, print_blob=True)
settings.load_profile("repeatable")

_BEFORE = frozenset(os.environ)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole", action="store_true", help="also inject each fault at each moment, and 50 faults in one run: an hour"
    )


@pytest.fixture
def whole(request: pytest.FixtureRequest) -> None:
    """Skip the test unless the option ``--whole`` is given."""
    if not request.config.getoption("--whole"):
        pytest.skip("takes long: pytest --whole")


@pytest.fixture
def started() -> Iterator[Jobs]:
    """Start processes. At the end of the test, fail if anything of them is left."""
    with jobs() as started:
        yield started


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Use one thread, like the ranks that tests start. Two that wait for each other beside other programs are slow."""
    torch.set_num_threads(1)  # A launcher of an earlier test may have chosen another number.


@pytest.fixture(autouse=True)
def _no_rank() -> Iterator[None]:
    """Remove what a fit in this process has set: processes started later would take it as their rank."""
    yield
    for name in set(os.environ) - _BEFORE:
        if name.startswith(OF_A_LAUNCHER):
            del os.environ[name]
