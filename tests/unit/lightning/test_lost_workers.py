"""Which workers were lost by the end of a run, and the line about them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lightning_async_localsgd.launch.restarts import WorkersLostError
from lightning_async_localsgd.lightning.fit_state import FitState
from lightning_async_localsgd.lightning.lost_workers import (
    agree_after_training,
    lost_text,
    lost_workers,
    raise_if_lost,
)
from lightning_async_localsgd.server.run_stats import FORMER

FAULT = "it ended with AttributeError: no folder"


def summary(initial: int, present: list[bool], reasons: dict[int, list[str]], quarantined: int = -1) -> dict[str, Any]:
    return {
        "initial_workers": initial,
        "workers": [
            {"worker": number, "present": there, "quarantined": number == quarantined}
            for number, there in enumerate(present)
        ],
        "lost": [
            {"worker": worker, "seconds": 1.0, "reason": reason}
            for worker, texts in reasons.items()
            for reason in texts
        ],
    }


def test_nothing_is_said_if_all_initial_workers_are_there_at_the_end() -> None:
    assert lost_text(summary(2, [True, True], {1: [FAULT]})) == "", "a worker that came back is not lost"
    assert lost_text(summary(2, [True, True, False], {2: ["it said goodbye"]})) == "", "a late joiner may leave"


@pytest.mark.parametrize("then", [[], ["its connection ended"]])
def test_same_reason_is_said_once(then: list[str]) -> None:
    lost = summary(4, [True, False, False, False], {worker: [FAULT, *then] for worker in (1, 2, 3)})
    assert lost_text(lost) == (
        f"3 of 4 workers were lost before the end of training: workers 1, 2, 3 ({FAULT}); a single worker was left, "
        "which took the remaining steps"
    )


def test_each_reason_is_said() -> None:
    lost = summary(4, [True, False, False, True, True], {1: [FAULT], 2: ["it was silent for 60 s"]}, quarantined=3)
    assert lost_text(lost) == (
        f"3 of 4 workers were lost before the end of training: worker 1 ({FAULT}); worker 2 (it was silent for 60 s); "
        "worker 3 (quarantined: the server refused its pushes); the other 2 workers took the remaining steps"
    )


@pytest.mark.parametrize(
    ("live", "stayed", "quarantined", "lost"),
    [
        ({0, 1}, {2}, set(), []),  # Worker 2 joined by hand, and left with the final model.
        ({0, 1}, set(), set(), [2]),
        ({0}, {1, 2}, set(), [1]),  # A rank has to be there when all ranks meet.
        ({0, 1, 2, 4}, set(), {2, 4}, [2]),  # Worker 4 is a late joiner, and no worker has ever had the number 3.
    ],
)
def test_workers_of_the_beginning_that_joined_by_hand_are_missed_like_ranks(
    live: set[int], stayed: set[int], quarantined: set[int], lost: list[int]
) -> None:
    runtime: Any = SimpleNamespace(
        server=SimpleNamespace(quarantined=quarantined),
        live_workers=lambda: live,
        present_workers=lambda: live | stayed,
        totals=lambda: dict.fromkeys((FORMER, 0, 1, 2, 4)),
    )
    assert lost_workers(runtime, live, ranks=2, workers=4) == lost


def test_single_rank_misses_workers_that_joined_by_hand() -> None:
    server = SimpleNamespace(quarantined=set())
    totals = dict.fromkeys(range(3))
    runtime = SimpleNamespace(
        server=server, live_workers=lambda: {0}, present_workers=lambda: {0, 2}, totals=lambda: totals
    )
    controller: Any = SimpleNamespace(runtime=runtime)
    fit = FitState(1, 0)
    agree_after_training(None, controller, fit, ranks=1, workers=3)
    with pytest.raises(WorkersLostError, match=r"worker\(s\) 1 were lost"):
        raise_if_lost(fit.lost_workers)
    runtime.server, fit.lost_workers = None, []
    agree_after_training(None, controller, fit, ranks=1, workers=3)
    assert fit.lost_workers == [], "a late joiner knows of no worker"
