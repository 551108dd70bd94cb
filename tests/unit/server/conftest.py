"""Servers that are closed after each test."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from lightning_async_localsgd.server.server import Server


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    opened: list[Server] = []
    yield opened
    for server in opened:
        server.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("async_localsgd")]
