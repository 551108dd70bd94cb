"""Budgets, intervals and schedules follow the progress of all workers, whether rank 0 or rank 1 is slow."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.processes import jobs

JOB = Path(__file__).with_name("progress_job.py")


@dataclass
class Case:
    """Notes of two ranks, one of which takes five times as long for a batch, and files of rank 0."""

    ranks: list[dict[str, Any]]
    logged: list[dict[str, str]]
    checkpoints: list[int]

    def column(self, name: str) -> dict[int, float]:
        """Return a metric by the steps at which it was logged."""
        return {int(row["step"]): float(row[name]) for row in self.logged if row.get(name)}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("progress")
    with jobs() as started:
        started.run(JOB, folder, timeout=240)
    found = {}
    for path in folder.glob("*_0.json"):
        name = path.stem[:-2]
        with (folder / name / "metrics.csv").open() as table:
            logged = list(csv.DictReader(table))
        saved = (folder / f"{name}_checkpoints").glob("step=*.ckpt")
        found[name] = Case(
            [json.loads((folder / f"{name}_{rank}.json").read_text()) for rank in (0, 1)],
            logged,
            sorted(int(checkpoint.stem[5:]) for checkpoint in saved),
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
def test_all_workers_share_the_budget(cases: dict[str, Case], name: str, steps: int, batches: int) -> None:
    ranks = cases[name].ranks
    assert [rank["global_step"] for rank in ranks] == [steps] * 2
    assert sum(len(rank["shown"]) for rank in ranks) == batches
    # Like in Lightning, a run that meets its limits does not set should_stop.
    assert [rank["should_stop"] for rank in ranks] == [False] * 2
    slow = 0 if name.endswith("slow_zero") else 1
    assert len(ranks[slow]["shown"]) < len(ranks[1 - slow]["shown"])


def test_global_step_never_decreases_on_any_rank(cases: dict[str, Case]) -> None:
    for case in cases.values():
        for rank in case.ranks:
            assert rank["shown"] == sorted(rank["shown"])


@pytest.mark.parametrize("name", ["steps", "steps_slow_zero", "epochs", "epochs_slow_zero", "warm_cosine"])
def test_metrics_are_logged_at_the_steps_of_ddp(cases: dict[str, Case], name: str) -> None:
    last = cases[name].ranks[0]["global_step"]
    logged, multiples = list(cases[name].column("loss")), list(range(4, last, 5))
    if name.endswith("slow_zero"):
        # During one step of a slow rank 0, the run usually takes three; on a busy machine, a whole interval or more.
        assert logged == sorted(set(logged) & set(multiples))
        assert logged[-1] == last - 1
        assert len(logged) > len(multiples) // 2
    else:
        assert logged == multiples


@pytest.mark.parametrize("name", ["steps", "steps_slow_zero", "epochs", "epochs_slow_zero", "busy_zero", "by_epoch"])
def test_checkpoint_is_saved_after_each_interval(cases: dict[str, Case], name: str) -> None:
    last = cases[name].ranks[0]["global_step"]
    assert cases[name].checkpoints == list(range(10, last + 1, 10))


def test_validation_follows_each_kind_of_interval(cases: dict[str, Case]) -> None:
    def validated(name: str) -> list[int]:
        sanity, *steps = cases[name].ranks[0]["validated"]
        assert sanity == -1
        return steps

    assert validated("steps") == [10, 20, 30, 40]
    assert validated("steps_slow_zero") == [10, 20, 30, 40]
    for name in ("epochs", "epochs_slow_zero"):
        assert validated(name) == [20, 40, 60]
    assert validated("every_second_epoch") == [40, 80]
    for name in ("quarters", "within_epoch"):
        assert validated(name) == list(range(5, 45, 5))
    assert cases["limited_validation"].ranks[0]["validated"] == [20]
    for case in cases.values():
        assert set(case.ranks[1]["validated"]) <= {-1}


def test_rank_zero_that_validates_while_epochs_end_misses_no_step(cases: dict[str, Case]) -> None:
    busy = cases["busy_zero"].ranks[0]
    assert busy["validated"] == [10, 20, 30, 40, 50, 60, 70, 80]
    assert (busy["global_step"], busy["epochs"]) == (80, 4)


def test_epochs_are_counted_over_all_workers(cases: dict[str, Case]) -> None:
    for name, epochs in (("epochs", 3), ("epochs_slow_zero", 3), ("every_second_epoch", 4), ("anomaly", 1)):
        for rank in cases[name].ranks:
            assert (rank["epochs"], rank["current_epoch"]) == (epochs, epochs)


def test_stop_on_any_rank_ends_all_ranks(cases: dict[str, Case]) -> None:
    for name in ("stopped", "stopped_elsewhere", "time"):
        ranks = cases[name].ranks
        assert [rank["should_stop"] for rank in ranks] == [True] * 2
        assert ranks[0]["global_step"] == ranks[1]["global_step"]
        # Steps of other ranks are estimates until they are pushed.
        assert ranks[0]["global_step"] == pytest.approx(sum(len(r["shown"]) for r in ranks) / 2, abs=5)
    for name in ("stopped", "stopped_elsewhere"):
        assert sum(len(rank["shown"]) for rank in cases[name].ranks) < 200


def test_min_steps_and_min_epochs_count_all_workers(cases: dict[str, Case]) -> None:
    assert 30 <= cases["min_steps"].ranks[0]["global_step"] < 60
    assert 40 - 5 <= cases["min_epochs"].ranks[0]["global_step"] < 80
    assert cases["min_epochs"].ranks[0]["epochs"] >= 2


def test_min_steps_and_min_epochs_hold_if_another_rank_stops(cases: dict[str, Case]) -> None:
    ranks = cases["min_steps_elsewhere"].ranks
    assert 30 <= sum(len(rank["shown"]) for rank in ranks) / 2 < 60
    assert 30 <= ranks[0]["global_step"] < 60
    assert 2 <= cases["min_epochs_elsewhere"].ranks[0]["epochs"] < 4
    for name in ("min_steps_elsewhere", "min_epochs_elsewhere"):
        assert [rank["should_stop"] for rank in cases[name].ranks] == [True] * 2


def test_intervals_of_the_trainer_are_restored(cases: dict[str, Case]) -> None:
    assert cases["steps"].ranks[0]["intervals"] == [5, 40, -1]
    assert cases["epochs"].ranks[1]["intervals"] == [5, -1, 3]


@pytest.mark.parametrize("name", ["one_cycle", "one_cycle_slow_zero", "warm_cosine", "every_five"])
def test_learning_rate_depends_only_on_the_global_step(cases: dict[str, Case], name: str) -> None:
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
        # The schedule has reached its end. Another step would have raised an error.
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


def test_learning_rate_monitor_logs_the_rates(cases: dict[str, Case]) -> None:
    logged = cases["warm_cosine"].column("lr-SGD")
    # The last multiple is missing if rank 0 began its last batch before the run reached it.
    assert list(logged) in ([*range(4, 60, 5)], [*range(4, 55, 5)])
    for step, rate in logged.items():
        # The rate is logged before the step, whose number is larger by one.
        assert rate == pytest.approx(min(1, (step + 1) / 10) * (0.55 + 0.45 * math.cos(math.pi * step / 60)), abs=0.1)
