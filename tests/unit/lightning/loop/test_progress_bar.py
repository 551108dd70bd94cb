"""The progress bar counts the local steps of all workers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import ProgressBar

from lightning_async_localsgd.lightning.loop.progress_bar import GlobalProgressBar
from lightning_async_localsgd.policies.plan import EpochSteps, RunBudget
from lightning_async_localsgd.runtime.base import Runtime


class EndedRuntime:
    """Rank 0's part of a run that has ended."""

    local_steps = Runtime.local_steps
    workers = 4

    def __init__(self, budget: RunBudget, step_offset: int) -> None:
        self.budget = budget
        self.step_offset = step_offset
        assert budget.steps_per_rank is not None
        self.global_steps = budget.steps_per_rank + step_offset


@pytest.mark.parametrize(
    ("budget", "step_offset"),
    [
        (RunBudget(320, 80, "max_steps"), 0),
        (RunBudget.of_epochs([EpochSteps(79, 20)] * 4), 0),
        (RunBudget.of_epochs([EpochSteps(79, 20)] * 4), 7),
    ],
)
def test_bar_ends_at_its_total(budget: RunBudget, step_offset: int) -> None:
    bar: Any = ProgressBar()
    trainer: Any = SimpleNamespace(progress_bar_callback=bar)
    shown = GlobalProgressBar(trainer, EndedRuntime(budget, step_offset))  # type: ignore[arg-type]
    assert bar._position == bar.total_train_batches == budget.total
    shown.restore()
    assert not hasattr(bar, "_position")
