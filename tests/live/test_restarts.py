"""Restarts of dead workers, and of a job whose rank 0 was killed."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_async_localsgd.server.event_file import read_pushes
from tests.live.conftest import JOB, Outcome
from tests.processes import Jobs

Job = Callable[..., Outcome]

ENDLESS = {"max_steps": 1_000_000}


def ledger(outcome: Outcome) -> list[dict[str, Any]]:
    return read_pushes(outcome.out / "events.jsonl")


def assert_each_round_counts_once(outcome: Outcome) -> None:
    applied = [push for push in ledger(outcome) if push["refused"] is None and push["steps"] > 0]
    assert max(Counter((push["session"], push["sequence"]) for push in applied).values()) == 1
    steps = Counter[int]()
    for push in applied:
        steps[push["worker"]] += push["steps"]
    assert {worker["worker"]: worker["steps"] for worker in outcome.summary["workers"]} == dict(steps)


@pytest.mark.parametrize("start_method", ["popen", pytest.param("spawn", marks=pytest.mark.slow)])
def test_worker_that_dies_repeatedly_is_restarted(job: Job, start_method: str) -> None:
    moments = ("computing", "mid-push", "mid-pull")
    outcome = job(
        ranks=3,
        faults=[
            {"kind": "KILL", "worker": 1, "round": 2, "moment": moment, "life": restart_count}
            for restart_count, moment in enumerate(moments)
        ],
        # The worker joins four times, and merges at least three rounds after its last restart.
        until={"worker": 1, "sessions": 4, "rounds": 7},
        trainer=ENDLESS,
        local_steps=5,
        start_method=start_method,
        # A restarted worker is not lost, even if it reaches the end long after the others.
        strategy={"fail_on_lost_workers": True},
        slow_end=True,
    )
    for restart in (1, 2, 3):
        assert f"(restart {restart} of 3)" in outcome.text
    workers = outcome.summary["workers"]
    assert workers[1]["sessions"] == 4
    assert workers[1]["departures"] == 3
    assert [loss["worker"] for loss in outcome.summary["lost"]] == [1, 1, 1]
    assert all(worker["present"] for worker in workers)
    assert "it rejoined 3 time(s) and was present at the end" in outcome.text
    sessions = [push["session"] for push in ledger(outcome) if push["worker"] == 1 and push["refused"] is None]
    assert len(dict.fromkeys(sessions)) >= 3
    assert sessions[-2:] == sessions[-1:] * 2, "rounds were merged after the last restart"
    assert_each_round_counts_once(outcome)
    assert len({rank["digest"] for rank in outcome.ranks}) == 1
    assert len(outcome.ranks) == 3, "the restarted worker reached the end of fit"


def test_training_continues_without_a_worker_that_dies_too_often(job: Job) -> None:
    outcome = job(
        ranks=3,
        start_method="fork",
        victim=1,
        at_step=3,
        fate="kill",
        lives=9,
        until={"worker": 1, "departures": 2},
        trainer=ENDLESS,
        strategy={"max_restarts": 1},
    )
    assert "worker 1 ended with signal 9 (SIGKILL); restarting it in 0.5 s (restart 1 of 1)" in outcome.text
    assert [worker["present"] for worker in outcome.summary["workers"]] == [True, False, True]
    assert "and was not present at the end" in outcome.text
    assert outcome.rank(0)["digest"] == outcome.rank(2)["digest"]


def assert_resumed(outcome: Outcome, steps: int) -> None:
    """Check that the job met its budget before and after its restart together."""
    summary = outcome.summary
    assert sum(worker["steps"] for worker in summary["workers"]) == steps
    assert sum(worker["rounds"] for worker in summary["workers"]) == summary["version"]
    assert 0 < sum(rank["steps"] for rank in outcome.ranks) < steps, "the restarted job continued the first part"
    assert len({rank["digest"] for rank in outcome.ranks}) == 1
    incarnations = dict.fromkeys(push["incarnation"] for push in ledger(outcome) if push["refused"] is None)
    assert len(incarnations) == 2
    assert "resuming the run from" in outcome.text


KILLED = {"victim": 0, "at_step": 40, "fate": "kill", "local_steps": 5, "strategy": {"checkpoint_every": 3}}


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_launching_process_restarts_all_ranks(job: Job, start_method: str) -> None:
    outcome = job(ranks=2, start_method=start_method, trainer={"max_steps": 80}, **KILLED)
    assert "rank 0 ended with signal 9 (SIGKILL); restarting all ranks" in outcome.text
    assert_resumed(outcome, 160)


def test_supervisor_restarts_the_script(started: Jobs, tmp_path: Path) -> None:
    options = {"ranks": 2, "trainer": {"max_steps": 80}, **KILLED}
    line = [sys.executable, "-m", "lightning_async_localsgd", JOB, tmp_path, json.dumps(options)]
    outcome = Outcome(*started.finish(started.start(line)), tmp_path)
    assert outcome.code == 0, outcome.text[-6000:]
    assert "the script ended with signal 9 (SIGKILL); restarting it" in outcome.text
    assert_resumed(outcome, 160)
