"""Rank 0 waits for the workers that the run begins with, and says who is missing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from lightning_async_localsgd import ExchangeOptions
from lightning_async_localsgd.launch.rendezvous import RendezvousError
from lightning_async_localsgd.protocol.layout import Binding, Layout
from lightning_async_localsgd.runtime.server_access import ServerAccess
from tests.unit.runtime.test_assembly import settings


def access(workers: int, ranks: int, **server: Any) -> ServerAccess:
    module = nn.Linear(3, 2)
    options = settings(exchange=ExchangeOptions(start_timeout=0.01))
    made = ServerAccess(options, Binding(Layout.of(module), module), workers, ranks, lambda: False)
    made.server = SimpleNamespace(**server)  # type: ignore[assignment]
    made.join_address = "tcp://host:29600"
    return made


def test_rank_0_names_the_ranks_and_counts_the_others_that_are_missing(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RendezvousError, match=r"^worker 2, 3 worker\(s\) that join of 6 did not join within"):
        access(6, 3, missing_workers=5, missing=[0, 2], missing_joiners=3).wait_for_workers()
    assert "waiting for 3 worker(s) to join at tcp://host:29600" in caplog.text


def test_rank_0_waits_for_no_worker_but_its_own(caplog: pytest.LogCaptureFixture) -> None:
    access(3, 2, missing_workers=1, missing=[0], missing_joiners=0).wait_for_workers()
    assert not caplog.text
