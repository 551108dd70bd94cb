"""What a user sees on the console in a run."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from lightning_async_localsgd import AsyncLocalSGDStrategy
from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy as Simulated
from tests.unit.lightning.simulated.support import SPEEDS, NoSchedule, StopAt, fit, loader


class Pretrained(NoSchedule):
    """A module whose network says that it was loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.net.name_or_path = "gpt2"


RUNS: list[tuple[Any, dict[str, Any], str]] = [
    (
        lambda: Simulated(SPEEDS, local_steps=5),
        {"max_steps": 10},
        "async_localsgd_simulated: 3 workers train for 30 local steps of all together (max_steps=10, 10 per worker on "
        "average). The run saves itself in {folder}/async_localsgd/{run} (every 10 min).",
    ),
    (
        lambda: Simulated(SPEEDS, local_steps=5, checkpoint_every=None, sync_warmup_steps="auto"),
        {"max_steps": 40, "module": NoSchedule},
        "(max_steps=40, 40 per worker on average). Until step 4, they average gradients (sync_warmup_steps).\n",
    ),
    (
        lambda: Simulated(SPEEDS, local_steps=5, checkpoint_every=None, sync_warmup_steps="auto"),
        {"max_steps": 40, "module": Pretrained},
        "(max_steps=40, 40 per worker on average). sync_warmup_steps='auto' is 0, because net has "
        "name_or_path='gpt2'; give a number if its weights are random.\n",
    ),
    (
        lambda: Simulated(SPEEDS, local_steps=5, checkpoint_every=None),
        {"max_steps": 40, "module": Pretrained},
        "(max_steps=40, 40 per worker on average).\n",
    ),
    (
        lambda: Simulated(SPEEDS, local_steps=5, checkpoint_every=7),
        {"max_steps": -1, "max_epochs": 1},
        "3 workers train for 12 local steps of all together (max_epochs=1, 4 per worker on average). The run saves "
        "itself in {folder}/async_localsgd/{run} (every 7 merged pushes).",
    ),
    (
        lambda: AsyncLocalSGDStrategy(checkpoint_every=timedelta(hours=1)),
        {"max_steps": 4},
        "async_localsgd: 1 worker trains for 4 local steps (max_steps=4). The run saves itself in "
        "{folder}/async_localsgd/{run} (every 60 min).",
    ),
    (
        lambda: AsyncLocalSGDStrategy(checkpoint_every=None),
        {"max_steps": -1, "max_epochs": -1, "module": NoSchedule, "callbacks": [StopAt(2)]},
        "async_localsgd: 1 worker trains until something stops the run.\n",
    ),
]


@pytest.mark.parametrize(("make", "options", "text"), RUNS)
def test_one_line_names_workers_budget_and_folder(
    make: Any, options: dict[str, Any], text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        strategy = make()
        fit(strategy, data=loader(12), default_root_dir=tmp_path, **options)
    assert text.format(folder=tmp_path, run=strategy.run_name) in caplog.text
