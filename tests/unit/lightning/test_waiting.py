"""What ends a wait for the server or for other workers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_async_localsgd.launch.uncaught import FollowingError
from lightning_async_localsgd.lightning import waiting
from lightning_async_localsgd.lightning.waiting import WaitCheck


def trainer(received_sigterm: bool = False) -> Any:
    return SimpleNamespace(received_sigterm=received_sigterm)


@pytest.fixture
def _rank_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise FollowingError("rank 1 has ended")

    monkeypatch.setattr(waiting, "raise_if_rank_missing", fail)


@pytest.mark.usefixtures("_rank_has_ended")
def test_rank_that_has_ended_matters_only_before_training() -> None:
    check = WaitCheck(trainer(), needs_ranks=True)
    with pytest.raises(FollowingError, match="rank 1 has ended"):
        check()
    check.begin_training()
    check()


@pytest.mark.usefixtures("_rank_has_ended")
def test_process_that_joins_needs_no_rank() -> None:
    WaitCheck(trainer(), needs_ranks=False)()


def test_sigterm_ends_every_wait() -> None:
    check = WaitCheck(trainer(received_sigterm=True), needs_ranks=True)
    check.begin_training()
    with pytest.raises(SIGTERMException):
        check()
