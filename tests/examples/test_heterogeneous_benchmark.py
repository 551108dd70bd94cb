"""The figures that benchmarks/heterogeneous.py computes from the timelines of the ranks."""

from __future__ import annotations

from typing import Any

import pytest
from heterogeneous import EXPECTED_SHARE, Measurement, Plan, compare, measure, table


def _timeline(start: float, seconds: float, count: int, **extra: Any) -> dict[str, Any]:
    steps = [start + seconds * (index + 1) for index in range(count)]
    return {"start": start, "end": steps[-1], "steps": steps, "validations": [], "cpu_seconds": 0.05 * count, **extra}


def test_ranks_that_never_wait_reach_the_ceiling() -> None:
    records = [_timeline(10.0, 0.1, 1000, final_loss=3.0), _timeline(10.5, 0.4, 250)]
    result = measure("async", records, [0.1, 0.4, 9.0], None)
    assert result.local_steps_by_rank == [1000, 250]
    assert result.ceiling_steps_per_second == pytest.approx(12.5)
    assert result.share_of_ceiling == pytest.approx(1.0, abs=0.01)
    assert result.train_seconds == pytest.approx(100.5)
    assert result.cores == pytest.approx(0.05 * 12.5)


def test_validation_time_is_excluded_only_from_the_second_share() -> None:
    # The rank validates for 10 of its 110 seconds.
    record = _timeline(0.0, 0.1, 1000, validations=[[50.0, 60.0, 4.0]], final_loss=3.0)
    record["steps"] = [step if step <= 50 else step + 10 for step in record["steps"]]
    record["end"] += 10
    result = measure("async", [record], [0.1], None)
    assert result.share_of_ceiling == pytest.approx(1 - 10 / 77, abs=0.01)
    assert result.share_without_validation == pytest.approx(1.0, abs=0.01)


def test_time_to_ddp_loss_is_the_first_validation_at_or_below_it() -> None:
    fast = [_timeline(0.0, 0.1, 100, validations=[[2.0, 2.1, 5.0], [4.0, 4.1, 3.4]], final_loss=3.2)]
    slow = [_timeline(0.0, 0.4, 100, validations=[[20.0, 20.1, 4.0]], final_loss=3.5)]
    never = [_timeline(0.0, 0.1, 100, final_loss=3.6)]
    runs = [measure("async", fast, [0.1], {"workers": []}), measure("ddp", slow, [0.4], None)]
    comparison = compare([*runs, measure("single", never, [0.1], None)])
    expected = {"async 0": 4.0, "ddp 0": pytest.approx(40.0), "single 0": None}
    assert comparison["seconds_to_ddp_final_loss"] == expected
    assert comparison["passed"] is True
    lines = table(runs, comparison).splitlines()
    assert lines[1].split()[:3] == ["async", "0", "100"]
    assert "passed; loss 3.2000 ± 0.0000" in lines[-1]


def test_asynchronous_run_below_the_required_share_fails() -> None:
    comparison = compare([measure("async", [_timeline(0.0, 0.11, 100, final_loss=3.0)], [0.1], None)])
    assert comparison["passed"] is False


def test_losses_of_all_seeds_are_averaged_and_the_best_data_parallel_run_counts() -> None:
    def run(name: str, seed: int, loss: float) -> Measurement:
        return measure(name, [_timeline(0.0, 0.1, 100, final_loss=loss)], [0.1], None, seed)

    runs = [run("async", 0, 3.0), run("async", 1, 3.2), run("ddp", 0, 3.3), run("ddp2", 0, 3.1)]
    comparison = compare(runs)
    assert comparison["async_loss"] == pytest.approx(3.1)
    assert comparison["async_loss_deviation"] == pytest.approx(0.1414, abs=1e-3)
    assert comparison["ddp_final_loss"] == 3.1
    assert comparison["seconds_to_ddp_final_loss"]["async 1"] is None


def test_every_run_gets_the_steps_of_its_time() -> None:
    plans = {run: Plan(run, 0, 230.0, None) for run in ("async", "ddp", "ddp2", "diloco", "single")}
    speed = sum(1.0 / seconds for seconds in (0.100, 0.130, 0.260, 0.574))
    assert plans["async"].steps == round(230.0 * EXPECTED_SHARE * speed / 4)
    assert plans["ddp"].steps == plans["ddp2"].steps == 400
    assert plans["single"].steps == 2300
    steps = plans["diloco"].steps
    assert steps is not None
    rounds, rest = divmod(steps, plans["diloco"].config["trainer"]["strategy"]["init_args"]["local_steps"])
    assert (rounds, rest) == (8, 0)
    # With the same number of samples, one device takes the steps of all four.
    assert [Plan(run, 0, None, 100).steps for run in ("async", "single")] == [100, 400]
    assert Plan("async", 0, None, None).steps is None
