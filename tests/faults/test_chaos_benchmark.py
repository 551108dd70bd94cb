"""The benchmark of the storm: its figures from made-up notes, and a small storm with real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import ROOT
from tests.processes import Jobs

sys.path.append(str(ROOT / "benchmarks"))

import chaos
from step_notes import Life


def life(worker: int, number: int, steps: list[float], **more: Any) -> Life:
    return Life(worker, number, session=f"{worker}.{number}", steps=steps, **more)


def push(worker: int, number: int, sequence: int, steps: int, refused: str | None = None) -> dict[str, Any]:
    session = f"{worker}.{number}"
    return {"worker": worker, "session": session, "sequence": sequence, "steps": steps, "refused": refused}


def test_who_was_frozen_neither_lives_nor_stalls() -> None:
    events = [chaos.Event("stop", 1, 0, at=2.5, until=6.0)]
    # Its first push since then is answered at 8.3: the step at 8.4 is the first in which it is back.
    lives = {(1, 0): life(1, 0, [1.0, 2.0, 6.5, 8.4, 9.7], answers=[(1.5, 1, 4, None), (8.3, 2, 9, None)])}
    assert chaos.living_seconds(lives, 0.0, 10.0, events) == {1: pytest.approx(8.7 - 4.0)}
    assert chaos.longest_stall(lives, 0.0, 10.0, events) == pytest.approx(1.3)
    assert chaos.longest_stall(lives, 0.0, 10.0, []) == pytest.approx(4.5)
    chaos.judge_events(events, {**lives, (0, 0): life(0, 0, [])}, [push(1, 0, 2, 2)])
    assert (events[0].counted, events[0].back) == (True, pytest.approx(2.4))


def test_who_is_frozen_twice_before_it_is_back_tells_nothing_of_its_way() -> None:
    events = [chaos.Event("stop", 1, 0, at=2.5, until=6.0), chaos.Event("stop", 1, 0, at=6.2, until=7.0)]
    lives = {(0, 0): life(0, 0, []), (1, 0): life(1, 0, [1.0, 6.1, 7.5, 8.0], answers=[(7.2, 1, 4, None)])}
    chaos.judge_events(events, lives, [push(1, 0, 1, 2)])
    assert (events[0].back, events[1].back) == (None, pytest.approx(0.5))


def test_only_steps_in_merged_pushes_are_useful() -> None:
    # Two pushes of two steps, the second one refused, answered twice, and a step that died with its worker.
    lives = {(1, 0): life(1, 0, [1.0, 2.0, 3.0, 4.0, 5.0]), (1, 1): life(1, 1, [7.0, 8.0])}
    ledger = [
        push(1, 0, 1, 2),
        push(1, 0, 1, 2, refused="already applied"),
        push(1, 0, 2, 2, refused="holds NaN or infinite values"),
        push(1, 1, 1, 2),
    ]
    assert chaos.merged_steps(lives, ledger, 0.0, 7.5) == {1: 3}


def test_pushes_that_are_lost_or_applied_twice_are_counted() -> None:
    lives = {(1, 0): life(1, 0, [], answers=[(1.0, 1, 1, None), (2.0, 2, 2, None), (3.0, 3, 2, "holds NaN")])}
    ledger = [push(1, 0, 1, 2), push(1, 0, 1, 2), push(1, 0, 3, 2, refused="holds NaN")]
    assert chaos.exactly_once(lives, ledger) == (1, 1)


def test_what_follows_a_kill_is_timed_from_it() -> None:
    event = chaos.Event("kill", 1, 0, at=10.0, until=10.0)
    lives = {
        (0, 0): life(0, 0, [], answers=[(10.5, 4, 9, None)], log=[(10.1, "worker 1 left the run (it ended)")]),
        (1, 0): life(1, 0, [], answers=[(9.0, 1, 5, None)]),
        (1, 1): life(1, 1, [], answers=[(18.0, 1, 20, None)]),
    }
    chaos.judge_events([event], lives, [])
    assert (event.detect, event.resume, event.rejoin) == pytest.approx((0.1, 0.5, 8.0))


@pytest.mark.slow
def weather(started: Jobs, out: Path, timeout: float, *options: str) -> tuple[int, dict[str, Any]]:
    """Runs the benchmark; returns its exit code and its figures."""
    command: list[str | Path] = [sys.executable, ROOT / "benchmarks" / "chaos.py", *options]
    process: subprocess.Popen[str] = started.start([*command, "--directory", out])
    code, text = started.finish(process, timeout)
    found: dict[str, Any] = next(json.loads(line) for line in text.splitlines() if line.startswith('{"ranks"'))
    return code, found


@pytest.mark.usefixtures("whole")
@pytest.mark.timeout(2400)
def test_the_whole_storm_keeps_within_all_bounds(started: Jobs, tmp_path: Path) -> None:
    code, found = weather(started, tmp_path / "out", 2300.0)
    assert found["events"] >= 50
    assert code == 0, found


def test_a_small_storm(started: Jobs, tmp_path: Path) -> None:
    code, found = weather(started, tmp_path / "out", 250.0, "--quick")
    assert found["kills"] + found["stops"] == found["events"] == 4
    assert found["T_detect"]["count"] == found["T_rejoin"]["count"] == found["kills"]
    # What does not depend on how busy this machine is.
    assert found["acknowledged_and_lost"] == found["applied_twice"] == 0
    assert found["identical_weights"]
    assert found["ranks_at_the_end"] == 3
    assert (code == 0) == all(found["passed"].values())
