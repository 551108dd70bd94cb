"""What concerns all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.processes import OF_A_LAUNCHER

_BEFORE = frozenset(os.environ)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole", action="store_true", help="every fault at every moment, and a storm of fifty: another hour"
    )


@pytest.fixture
def whole(request: pytest.FixtureRequest) -> None:
    """For tests that are left out otherwise."""
    if not request.config.getoption("--whole"):
        pytest.skip("takes long: pytest --whole")


@pytest.fixture(autouse=True)
def _no_rank() -> Iterator[None]:
    """A fit in this process leaves variables behind that make ranks of the processes which later tests start."""
    yield
    for name in set(os.environ) - _BEFORE:
        if name.startswith(OF_A_LAUNCHER):
            del os.environ[name]
