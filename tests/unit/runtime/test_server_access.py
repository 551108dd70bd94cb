"""Rank 0 waits for the workers that the run begins with, and says who is missing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from lightning_async_localsgd import ExchangeOptions
from lightning_async_localsgd.launch.rendezvous import RendezvousError
from lightning_async_localsgd.protocol.exchange import ExchangeError
from lightning_async_localsgd.protocol.layout import Binding, Layout
from lightning_async_localsgd.runtime.server_access import ServerAccess
from tests.unit.runtime.test_assembly import settings


def nothing() -> None:
    pass


def access(workers: int, ranks: int, evaluator: Any = None, timeout: float = 0.01, **server: Any) -> ServerAccess:
    module = nn.Linear(3, 2)
    options = settings(exchange=ExchangeOptions(start_timeout=timeout), evaluator=evaluator)
    made = ServerAccess(options, Binding(Layout.of(module), module), workers, ranks, lambda: False)
    made.server = SimpleNamespace(**{  # type: ignore[assignment]
        "raise_failure": nothing, "evaluations": SimpleNamespace(present=False), **server,
    })  # fmt: skip
    made.join_address = "tcp://host:29600"
    return made


def test_rank_0_names_the_ranks_and_counts_the_others_that_are_missing(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RendezvousError, match=r"^worker 2, 3 worker\(s\) that join did not join within"):
        access(6, 3, missing=[0, 2], missing_joiners=3).wait_for_workers()
    assert "waiting for 3 worker(s) to join at tcp://host:29600" in caplog.text


def test_rank_0_waits_for_no_worker_but_its_own(caplog: pytest.LogCaptureFixture) -> None:
    access(3, 2, missing=[0], missing_joiners=0).wait_for_workers()
    assert not caplog.text


def test_rank_0_names_an_evaluator_that_is_missing() -> None:
    running = SimpleNamespace(raise_if_ended=nothing)
    with pytest.raises(RendezvousError, match=r"^the evaluator did not join within"):
        access(3, 3, running, missing=[0], missing_joiners=0).wait_for_workers()


def test_evaluator_that_has_ended_is_reported_while_workers_are_missing() -> None:
    def fail() -> None:
        raise RuntimeError("the evaluator ended")

    ended = SimpleNamespace(raise_if_ended=fail)
    with pytest.raises(RuntimeError, match="the evaluator ended"):
        access(3, 2, ended, timeout=60.0, missing=[0], missing_joiners=1).wait_for_workers()


def test_evaluator_that_cannot_validate_is_reported_while_workers_are_missing() -> None:
    def fail() -> None:
        raise ExchangeError("the evaluator has no validation data")

    running = SimpleNamespace(raise_if_ended=nothing)
    with pytest.raises(ExchangeError, match="has no validation data"):
        access(3, 2, running, timeout=60.0, missing=[0], missing_joiners=1, raise_failure=fail).wait_for_workers()
