"""The chaos benchmark: its metrics on hand-written notes, and a short run with real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ROOT, Jobs

sys.path.append(str(ROOT / "benchmarks"))

import chaos_metrics
from chaos_runs import Event
from step_notes import Life


def life(worker: int, number: int, steps: list[float], **more: Any) -> Life:
    return Life(worker, number, session=f"{worker}.{number}", steps=steps, **more)


def push(worker: int, number: int, sequence: int, steps: int, refused: str | None = None) -> dict[str, Any]:
    session = f"{worker}.{number}"
    return {"worker": worker, "session": session, "sequence": sequence, "steps": steps, "refused": refused}


def test_frozen_worker_counts_neither_as_living_nor_as_stalled() -> None:
    events = [Event("stop", 1, 0, at=2.5, until=6.0)]
    # The first push after waking up is answered at 8.3, so the worker has recovered at the step at 8.4.
    lives = {(1, 0): life(1, 0, [1.0, 2.0, 6.5, 8.4, 9.7], answers=[(1.5, 1, 4, None), (8.3, 2, 9, None)])}
    assert chaos_metrics.living_seconds(lives, 0.0, 10.0, events) == {1: pytest.approx(8.7 - 4.0)}
    assert chaos_metrics.longest_stall(lives, 0.0, 10.0, events) == pytest.approx(1.3)
    assert chaos_metrics.longest_stall(lives, 0.0, 10.0, []) == pytest.approx(4.5)
    chaos_metrics.measure_events(events, {**lives, (0, 0): life(0, 0, [])}, [push(1, 0, 2, 2)])
    assert (events[0].counted, events[0].recover) == (True, pytest.approx(2.4))


def test_recovery_is_not_measured_if_worker_is_frozen_again_before() -> None:
    events = [Event("stop", 1, 0, at=2.5, until=6.0), Event("stop", 1, 0, at=6.2, until=7.0)]
    lives = {(0, 0): life(0, 0, []), (1, 0): life(1, 0, [1.0, 6.1, 7.5, 8.0], answers=[(7.2, 1, 4, None)])}
    chaos_metrics.measure_events(events, lives, [push(1, 0, 1, 2)])
    assert (events[0].recover, events[1].recover) == (None, pytest.approx(0.5))


def test_only_steps_in_merged_pushes_count() -> None:
    # Two pushes of two steps each: the first sent twice, the second refused. The fifth step was lost with its process.
    lives = {(1, 0): life(1, 0, [1.0, 2.0, 3.0, 4.0, 5.0]), (1, 1): life(1, 1, [7.0, 8.0])}
    ledger = [
        push(1, 0, 1, 2),
        push(1, 0, 1, 2, refused="already applied"),
        push(1, 0, 2, 2, refused="holds NaN or infinite values"),
        push(1, 1, 1, 2),
    ]
    assert chaos_metrics.merged_steps(lives, ledger, 0.0, 7.5) == {1: 3}


def test_lost_pushes_and_pushes_applied_twice_are_counted() -> None:
    lives = {(1, 0): life(1, 0, [], answers=[(1.0, 1, 1, None), (2.0, 2, 2, None), (3.0, 3, 2, "holds NaN")])}
    ledger = [push(1, 0, 1, 2), push(1, 0, 1, 2), push(1, 0, 3, 2, refused="holds NaN")]
    assert chaos_metrics.count_delivery_errors(lives, ledger) == (1, 1)


def test_seconds_after_a_kill_are_measured() -> None:
    event = Event("kill", 1, 0, at=10.0, until=10.0)
    lives = {
        (0, 0): life(0, 0, [], answers=[(10.5, 4, 9, None)], log=[(10.1, "worker 1 left the run (it ended)")]),
        (1, 0): life(1, 0, [], answers=[(9.0, 1, 5, None)]),
        (1, 1): life(1, 1, [], answers=[(18.0, 1, 20, None)]),
    }
    chaos_metrics.measure_events([event], lives, [])
    assert (event.detect, event.resume, event.rejoin) == pytest.approx((0.1, 0.5, 8.0))


def run_benchmark(started: Jobs, out: Path, timeout: float, *options: str) -> tuple[int, dict[str, Any]]:
    """Run the benchmark, and return its exit code and its result."""
    command: list[str | Path] = [sys.executable, ROOT / "benchmarks" / "chaos.py", *options]
    process: subprocess.Popen[str] = started.start([*command, "--directory", out])
    code, text = started.finish(process, timeout)
    result: dict[str, Any] = next(json.loads(line) for line in text.splitlines() if line.startswith('{"ranks"'))
    return code, result


@pytest.mark.usefixtures("whole")
@pytest.mark.timeout(2400)
def test_full_benchmark_meets_all_bars(started: Jobs, tmp_path: Path) -> None:
    code, result = run_benchmark(started, tmp_path / "out", 2300.0)
    assert result["events"] >= 50
    assert code == 0, result


@pytest.mark.slow
def test_quick_benchmark_delivers_exactly_once(started: Jobs, tmp_path: Path) -> None:
    code, result = run_benchmark(started, tmp_path / "out", 250.0, "--quick")
    assert result["kills"] + result["stops"] == result["events"] == 4
    assert result["T_detect"]["count"] == result["T_rejoin"]["count"] == result["kills"]
    # Only results that do not depend on the load of this machine.
    assert result["acknowledged_and_lost"] == result["applied_twice"] == 0
    assert result["identical_weights"]
    assert result["ranks_at_the_end"] == 3
    assert (code == 0) == all(result["passed"].values())
