"""Replays of a real run, with three ranks of unequal speed, in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_async_localsgd.server.events import read_events
from tests.live import replay_job
from tests.processes import Jobs


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
            {"strategy": {"staleness": {"power": 0.5}, "merge": {"weights": "samples"}, "sync_warmup_steps": 10}},
            marks=pytest.mark.slow,
        ),
        {"strategy": {"local_steps": 1, "overlap": True}},
        pytest.param({"strategy": {"upload": "int8", "download": "bf16"}}, marks=pytest.mark.slow),
        pytest.param(
            {"strategy": {"local_steps": 1, "overlap": True, "upload": "int4", "download": "int8"}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["steps", "epochs", "quorum", "weighed", "overlap", "packed", "packed-overlap"],
)
def test_replay_equals_the_live_run_bit_for_bit(started: Jobs, tmp_path: Path, options: dict[str, Any]) -> None:
    for kind in ("live", "replay"):
        text = started.run(replay_job.__file__, kind, tmp_path, json.dumps(options))
        assert "but the global model is not" not in text
    assert (tmp_path / "replay").read_text() == (tmp_path / "live").read_text()
    events = read_events(tmp_path / "events.jsonl")
    pushes = [event.content["push"] for event in events if event.kind == "push"]
    assert {push.worker for push in pushes} == {0, 1, 2}
    if options.get("strategy", {}).get("overlap"):
        assert any(push.overlap_steps for push in pushes)
    else:
        assert len({push.steps for push in pushes}) > 1, "slower ranks take fewer steps a round"
