"""A run that needs all of its workers, one of which dies: it comes back, or it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_async_localsgd.server.event_file import read_pushes
from tests.faults.conftest import command
from tests.faults.runs import Run
from tests.processes import Jobs

pytestmark = pytest.mark.slow

DEATH = {"kind": "KILL", "worker": 1, "round": 3, "moment": "computing"}


def test_training_is_paused_until_the_dead_worker_is_back(job: Callable[..., Run], normal: Run) -> None:
    run = job(ranks=2, until={"1_1": 4}, faults=[DEATH], strategy={"min_workers": 2})
    run.assert_exactly_once()
    run.assert_one_model({0, 1})
    run.assert_learned(normal)
    assert run.text.count("training is paused: 1 worker(s) take part, and min_workers=2") == 1
    assert run.text.count("training goes on with 2 workers") == 1
    [summary] = [json.loads(path.read_text()) for path in run.out.rglob("async_localsgd_summary.json")]
    assert summary["pauses"] == 1
    # Rank 0 ends the round that it is in, and begins no other.
    longest = max(after - before for before, after in run.lives[0, 0].gaps)
    assert longest > summary["paused_seconds"] - 2.0
    assert summary["workers"][0]["wait_seconds"] > longest - 1.0


def test_too_long_a_pause_ends_the_run_with_an_error_and_a_checkpoint(started: Jobs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    strategy = {"min_workers": 2, "max_restarts": 0}
    line = command(out, ranks=2, faults=[DEATH], strategy=strategy, exchange={"pause_timeout": 1.0})
    code, text = started.finish(started.start(line))
    assert code == 1
    assert "rank 0 ended with TooFewWorkersError: training was paused for exchange.pause_timeout=1 s" in text
    [checkpoint] = out.glob("async_localsgd/*/rounds=*.ckpt")
    assert f'trainer.fit(ckpt_path="last") resumes from {checkpoint}' in text
    # Every round that was answered is in the checkpoint. Rank 0's last round waits for its answer.
    ledger = read_pushes(out / "events.jsonl")
    assert f"rounds={len(ledger):06d}" in checkpoint.name
