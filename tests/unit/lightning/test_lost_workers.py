"""The line about lost workers at the end of a run."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_async_localsgd.lightning.lost_workers import lost_text

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
