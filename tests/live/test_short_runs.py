"""Ordinary short runs in real processes: the strategy by its name, and DDP with the same script.

``tests/unit/lightning/simulated/test_short_runs.py`` has all tasks, clusters and seeds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.live import short_run_job as job
from tests.processes import Jobs
from tests.short_tasks import EPOCHS


def losses(started: Jobs, out: Path, strategy: str, ranks: int, task: str) -> list[float]:
    path = out / f"{strategy}.json"
    code, text = started.finish(started.start([sys.executable, job.__file__, path, strategy, ranks, task, 0]))
    assert code == 0, text
    found: list[float] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize(("task", "ranks"), [("regression", 2), ("regression", 4), ("cnn", 2), ("gru", 2)])
def test_defaults_are_as_good_as_ddp(started: Jobs, tmp_path: Path, task: str, ranks: int) -> None:
    ours, ddp = (losses(started, tmp_path, strategy, ranks, task) for strategy in ("async_localsgd", "ddp"))
    assert len(ours) == len(ddp) == EPOCHS
    assert ours[-1] <= 1.25 * ddp[-1], (ours, ddp)
    assert max(ours[1:]) <= ours[0], ours
