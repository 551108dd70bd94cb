"""Budgets, intervals and schedules follow the progress of all workers, whichever rank is the slow one."""

from __future__ import annotations

import csv
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.processes import jobs

JOB = Path(__file__).with_name("progress_job.py")


@dataclass
class Case:
    """What the two ranks noted, of which one takes five times as long for a batch, and what rank 0 wrote."""

    ranks: list[dict[str, Any]]
    logged: list[dict[str, str]]
    checkpoints: list[int]

    def column(self, name: str) -> dict[int, float]:
        """A metric by the step it was logged at."""
        return {int(row["step"]): float(row[name]) for row in self.logged if row.get(name)}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("progress")
    with jobs() as started:
        code, text = started.finish(started.start([sys.executable, JOB, folder, "{}"]), timeout=240)
    assert code == 0, text[-6000:]
    found = {}
    for path in folder.glob("*_0.json"):
        name = path.stem[:-2]
        with (folder / name / "metrics.csv").open() as table:
            logged = list(csv.DictReader(table))
        saved = (folder / f"{name}_checkpoints").glob("step=*.ckpt")
        found[name] = Case(
            [json.loads((folder / f"{name}_{rank}.json").read_text()) for rank in (0, 1)],
            logged,
            sorted(int(one.stem[5:]) for one in saved),
        )
    return found


@pytest.mark.parametrize(
    ("name", "steps", "batches"),
    [
        ("steps", 40, 80),
        ("steps_slow_zero", 40, 80),
        ("epochs", 60, 120),
        ("epochs_slow_zero", 60, 120),
        ("accumulated", 10, 80),
        ("anomaly", 20, 40),
        ("one_cycle", 50, 100),
    ],
)
def test_a_budget_is_of_all_workers(cases: dict[str, Case], name: str, steps: int, batches: int) -> None:
    ranks = cases[name].ranks
    assert [rank["global_step"] for rank in ranks] == [steps] * 2
    assert sum(len(rank["shown"]) for rank in ranks) == batches
    # It ended as Lightning ends a run whose limits are met.
    assert [rank["should_stop"] for rank in ranks] == [False] * 2
    slow = 0 if name.endswith("slow_zero") else 1
    assert len(ranks[slow]["shown"]) < len(ranks[1 - slow]["shown"])


def test_the_counts_on_every_rank_are_global_and_never_go_back(cases: dict[str, Case]) -> None:
    for case in cases.values():
        for rank in case.ranks:
            assert rank["shown"] == sorted(rank["shown"])


@pytest.mark.parametrize("name", ["steps", "steps_slow_zero", "epochs", "epochs_slow_zero", "warm_cosine"])
def test_the_loggers_axis_is_that_of_ddp(cases: dict[str, Case], name: str) -> None:
    last = cases[name].ranks[0]["global_step"]
    logged, multiples = list(cases[name].column("loss")), list(range(4, last, 5))
    if name.endswith("slow_zero"):
        # In a step of a slow rank 0 the others take three as a rule; on a busy machine they may pass a whole interval.
        assert logged == sorted(set(logged) & set(multiples))
        assert logged[-1] == last - 1
        assert len(logged) > len(multiples) // 2
    else:
        assert logged == multiples


@pytest.mark.parametrize("name", ["steps", "steps_slow_zero", "epochs", "epochs_slow_zero", "by_epoch"])
def test_checkpoints_are_saved_as_multiples_are_passed(cases: dict[str, Case], name: str) -> None:
    last = cases[name].ranks[0]["global_step"]
    # Rank 0 saves at its first step past a multiple, which is the multiple itself unless it is slower than the others.
    assert [step // 10 * 10 for step in cases[name].checkpoints] == list(range(10, last + 1, 10))
    assert cases[name].checkpoints[-1] == last


def test_validation_intervals(cases: dict[str, Case]) -> None:
    def validated(name: str) -> list[int]:
        sanity, *steps = cases[name].ranks[0]["validated"]
        assert sanity == -1
        return steps

    assert validated("steps") == [10, 20, 30, 40]
    assert [step // 10 * 10 for step in validated("steps_slow_zero")] == [10, 20, 30, 40]
    # At the end of an epoch, and in quarters of it; rank 0's epoch ends when nothing is left to lease.
    assert len(validated("epochs")) == 3
    assert validated("epochs")[-1] == 60
    assert len(validated("every_second_epoch")) == 2
    for name in ("quarters", "within_epoch"):
        first, second = validated(name)[:4], validated(name)[4:]
        assert [step // 5 for step in first[:3]] == [1, 2, 3]
        assert [step // 5 for step in second] == [5, 6, 7, 8]
    assert cases["limited_validation"].ranks[0]["validated"] == [20]
    for case in cases.values():
        assert set(case.ranks[1]["validated"]) <= {-1}


def test_epochs_are_those_of_the_run(cases: dict[str, Case]) -> None:
    for name, epochs in (("epochs", 3), ("epochs_slow_zero", 3), ("every_second_epoch", 4), ("anomaly", 1)):
        for rank in cases[name].ranks:
            assert (rank["epochs"], rank["current_epoch"]) == (epochs, epochs)


def test_whoever_stops_ends_all(cases: dict[str, Case]) -> None:
    for name in ("stopped", "stopped_elsewhere", "time"):
        ranks = cases[name].ranks
        assert [rank["should_stop"] for rank in ranks] == [True] * 2
        assert ranks[0]["global_step"] == ranks[1]["global_step"]
        # What the others take in the meantime is an estimate until it is handed in.
        assert ranks[0]["global_step"] == pytest.approx(sum(len(r["shown"]) for r in ranks) / 2, abs=5)
    for name in ("stopped", "stopped_elsewhere"):
        assert sum(len(rank["shown"]) for rank in cases[name].ranks) < 200


def test_minima_are_of_all_workers(cases: dict[str, Case]) -> None:
    assert 30 <= cases["min_steps"].ranks[0]["global_step"] < 60
    assert 40 - 5 <= cases["min_epochs"].ranks[0]["global_step"] < 80
    assert cases["min_epochs"].ranks[0]["epochs"] >= 2


def test_minima_hold_whoever_asks_to_stop(cases: dict[str, Case]) -> None:
    ranks = cases["min_steps_elsewhere"].ranks
    assert 30 <= sum(len(rank["shown"]) for rank in ranks) / 2 < 60
    assert 30 <= ranks[0]["global_step"] < 60
    assert 2 <= cases["min_epochs_elsewhere"].ranks[0]["epochs"] < 4
    for name in ("min_steps_elsewhere", "min_epochs_elsewhere"):
        assert [rank["should_stop"] for rank in cases[name].ranks] == [True] * 2


def test_the_trainer_gets_its_intervals_back(cases: dict[str, Case]) -> None:
    assert cases["steps"].ranks[0]["intervals"] == [5, 40, -1]
    assert cases["epochs"].ranks[1]["intervals"] == [5, -1, 3]


@pytest.mark.parametrize("name", ["one_cycle", "one_cycle_slow_zero", "warm_cosine", "every_five"])
def test_a_learning_rate_is_a_function_of_the_global_step(cases: dict[str, Case], name: str) -> None:
    by_step: dict[int, float] = {}
    for rank in cases[name].ranks:
        for step, (rate,) in zip(rank["shown"], rank["rates"], strict=True):
            if step in by_step:
                assert rate == by_step[step], f"step {step}"
            by_step[step] = rate
    total = cases[name].ranks[0]["global_step"]
    if name == "warm_cosine":
        for step, rate in by_step.items():
            assert rate == pytest.approx(
                min(1.0, (step + 1) / 10) * (0.55 + 0.45 * math.cos(math.pi * step / total)), rel=1e-6
            )
        assert by_step[total] == pytest.approx(0.1)
    if name == "every_five":
        assert by_step[total] == pytest.approx(0.9 ** (total // 5))
    if name.startswith("one_cycle"):
        # At its end, and not past it, which would have raised an error.
        assert by_step[total] == pytest.approx(4e-6)
        assert max(by_step.values()) > 0.95


def test_epoch_schedules_follow_epochs_of_all_workers(cases: dict[str, Case]) -> None:
    for rank in cases["by_epoch"].ranks:
        for step, (rate,) in zip(rank["shown"], rank["rates"], strict=True):
            assert rate == 0.5 ** (step // 20)


def test_several_schedules_of_one_optimizer(cases: dict[str, Case]) -> None:
    for rank in cases["several"].ranks:
        for step, (rate,) in zip(rank["shown"], rank["rates"], strict=True):
            assert rate == pytest.approx(0.99**step * 0.5 ** (step // 20))


def test_the_monitor_logs_the_rates(cases: dict[str, Case]) -> None:
    logged = cases["warm_cosine"].column("lr-SGD")
    # The last multiple is not there if rank 0 had begun its last batch before the others came so far.
    assert list(logged) in ([*range(4, 60, 5)], [*range(4, 55, 5)])
    for step, rate in logged.items():
        # Logged before the step whose number is one more than the axis says.
        assert rate == pytest.approx(min(1, (step + 1) / 10) * (0.55 + 0.45 * math.cos(math.pi * step / 60)), abs=0.1)
