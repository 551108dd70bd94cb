"""What takes too long for every run of the tests."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole", action="store_true", help="every fault at every moment, and a storm of fifty: another hour"
    )


@pytest.fixture
def whole(request: pytest.FixtureRequest) -> None:
    """For tests that are left out otherwise."""
    if not request.config.getoption("--whole"):
        pytest.skip("takes long: pytest --whole")
