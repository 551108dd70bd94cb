"""How benchmarks/heterogeneous.py works out its figures from the ranks' timelines."""

from __future__ import annotations

from typing import Any

import pytest
from heterogeneous import compare, measure, table


def _timeline(start: float, seconds: float, count: int, **extra: Any) -> dict[str, Any]:
    steps = [start + seconds * (index + 1) for index in range(count)]
    return {"start": start, "end": steps[-1], "steps": steps, "validations": [], "cpu_seconds": 0.05 * count, **extra}


def test_ranks_that_never_wait_reach_the_ceiling() -> None:
    records = [_timeline(10.0, 0.1, 1000, final_loss=3.0), _timeline(10.5, 0.4, 250)]
    found = measure("async", records, [0.1, 0.4, 9.0], None)
    assert found.local_steps_by_rank == [1000, 250]
    assert found.ceiling_steps_per_second == pytest.approx(12.5)
    assert found.share_of_ceiling == pytest.approx(1.0, abs=0.01)
    assert found.train_seconds == pytest.approx(100.5)
    assert found.cores == pytest.approx(0.05 * 12.5)


def test_validation_counts_against_the_run_and_is_named() -> None:
    # The rank stands still for 10 of its 110 seconds.
    record = _timeline(0.0, 0.1, 1000, validations=[[50.0, 60.0, 4.0]], final_loss=3.0)
    record["steps"] = [step if step <= 50 else step + 10 for step in record["steps"]]
    record["end"] += 10
    found = measure("async", [record], [0.1], None)
    assert found.share_of_ceiling == pytest.approx(1 - 10 / 77, abs=0.01)
    assert found.share_without_validation == pytest.approx(1.0, abs=0.01)


def test_time_to_ddps_loss_is_that_of_the_first_validation_at_or_below_it() -> None:
    fast = [_timeline(0.0, 0.1, 100, validations=[[2.0, 2.1, 5.0], [4.0, 4.1, 3.4]], final_loss=3.2)]
    slow = [_timeline(0.0, 0.4, 100, validations=[[20.0, 20.1, 4.0]], final_loss=3.5)]
    never = [_timeline(0.0, 0.1, 100, final_loss=3.6)]
    runs = [measure("async", fast, [0.1], {"workers": []}), measure("ddp", slow, [0.4], None)]
    comparison = compare([*runs, measure("single", never, [0.1], None)])
    assert comparison["seconds_to_ddp_final_loss"] == {"async": 4.0, "ddp": pytest.approx(40.0), "single": None}
    assert comparison["passed"] is True
    lines = table(runs, comparison).splitlines()
    assert lines[1].split()[:2] == ["async", "100"]
    assert lines[-1].endswith("passed")


def test_a_slow_asynchronous_run_fails() -> None:
    comparison = compare([measure("async", [_timeline(0.0, 0.11, 100, final_loss=3.0)], [0.1], None)])
    assert comparison["passed"] is False
