"""A real run of three unequal ranks, logged, and played again in one process: the same model to the last bit."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_async_localsgd.events import read_events
from tests.processes import Jobs, jobs

JOB = Path(__file__).with_name("replay_job.py")


@pytest.fixture
def started() -> Iterator[Jobs]:
    with jobs() as found:
        yield found


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(
            {"trainer": {"max_epochs": 2, "max_steps": -1, "val_check_interval": 0.5, "accumulate_grad_batches": 2}},
            marks=pytest.mark.slow,
        ),
        pytest.param({"strategy": {"quorum": "all"}}, marks=pytest.mark.slow),
        pytest.param(
            {"strategy": {"staleness": {"power": 0.5}, "merge": {"weights": "samples"}, "warmup_steps": 10}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["steps", "epochs", "quorum", "weighed"],
)
def test_a_replay_ends_with_the_very_model_of_the_live_run(
    started: Jobs, tmp_path: Path, options: dict[str, Any]
) -> None:
    for kind in ("live", "replay"):
        code, text = started.finish(started.start([sys.executable, JOB, kind, tmp_path, json.dumps(options)]))
        assert code == 0, text[-4000:]
        assert "not the same to the last bit" not in text
    assert (tmp_path / "replay").read_text() == (tmp_path / "live").read_text()
    events = read_events(tmp_path / "events.jsonl")
    pushes = [event.content["push"] for event in events if event.kind == "push"]
    assert {push.worker for push in pushes} == {0, 1, 2}
    assert len({push.steps for push in pushes}) > 1, "unequal ranks take unequal steps"
