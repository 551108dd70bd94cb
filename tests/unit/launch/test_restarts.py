"""Restarts of workers: the schedule alone, and both launchers with processes that only start and die."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_async_localsgd.launch.restarts import JoinTicket, RestartSchedule, describe_exit, restart_delay
from tests.processes import Outcome, jobs

JOB = Path(__file__).with_name("restarts_job.py")

# --------------------------------------------------------------------------------------------------------- schedule


def test_delay_doubles_until_restarts_are_used_up(caplog: pytest.LogCaptureFixture) -> None:
    schedule = RestartSchedule(max_restarts=3)
    now = 100.0
    for restart_count, delay in ((1, 0.5), (2, 1.0), (3, 2.0)):
        assert schedule.on_exit(2, -signal.SIGKILL, now)
        assert schedule.next_due() == now + delay
        assert schedule.pop_due(now + delay - 0.01) == {}
        assert schedule.pop_due(now + delay) == {2: restart_count}
        now += 10.0
    assert "worker 2 ended with signal 9 (SIGKILL); restarting it in 2 s (restart 3 of 3)" in caplog.text
    assert not schedule.on_exit(2, 1, now)
    assert "not restarting it again after 3 restart(s) (max_restarts=3)" in caplog.text
    # Restarts are counted for each worker by itself.
    assert schedule.on_exit(1, 1, now)


@pytest.mark.parametrize("exit_code", [0, -signal.SIGTERM, -signal.SIGINT, 143, 130])
def test_worker_that_left_or_was_stopped_is_not_restarted(exit_code: int, caplog: pytest.LogCaptureFixture) -> None:
    assert not RestartSchedule(max_restarts=3).on_exit(1, exit_code, 0.0)
    assert f"worker 1 left with {describe_exit(exit_code)}; not restarting it" in caplog.text


def test_worker_rejected_by_the_server_is_not_restarted(caplog: pytest.LogCaptureFixture) -> None:
    schedule = RestartSchedule(max_restarts=3, may_restart=lambda worker: worker != 1)
    assert not schedule.on_exit(1, 1, 0.0)
    assert schedule.on_exit(2, 1, 0.0)
    assert "the server rejects its pushes" in caplog.text


def test_failed_start_counts_as_a_restart(caplog: pytest.LogCaptureFixture) -> None:
    schedule = RestartSchedule(max_restarts=1)
    schedule.on_exit(1, 1, 0.0)
    assert schedule.pop_due(1.0) == {1: 1}
    assert not schedule.on_failed_start(1, OSError(12, "Cannot allocate memory"), 1.0)
    assert "worker 1 could not be started ([Errno 12] Cannot allocate memory); not restarting it again" in caplog.text


def test_traceback_is_logged_below_the_decision(caplog: pytest.LogCaptureFixture) -> None:
    RestartSchedule(max_restarts=3).on_exit(1, 1, 0.0, "Traceback\nRuntimeError: a fault\n")
    assert caplog.messages == [
        "worker 1 ended with exit code 1; restarting it in 0.5 s (restart 1 of 3):\nTraceback\nRuntimeError: a fault"
    ]


def test_cancelled_restarts_are_not_due() -> None:
    schedule = RestartSchedule(max_restarts=3)
    schedule.on_exit(1, 1, 0.0)
    schedule.cancel()
    assert schedule.next_due() is None
    assert schedule.pop_due(100.0) == {}


def test_delay_starts_over_after_the_worker_ran_for_a_minute() -> None:
    schedule = RestartSchedule(max_restarts=9)
    now = 0.0
    for delay in (0.5, 1.0, 2.0):
        assert schedule.on_exit(2, -9, now)
        assert schedule.next_due() == now + delay
        now += delay
        schedule.pop_due(now)
        now += 1.0
    now += 60.0
    assert schedule.on_exit(2, -9, now)
    assert schedule.next_due() == now + 0.5


def test_delay_has_a_limit() -> None:
    assert restart_delay(50) == 30.0


def test_exit_codes_are_described() -> None:
    assert describe_exit(3) == "exit code 3"
    assert describe_exit(-11) == "signal 11 (SIGSEGV)"
    assert describe_exit(-99) == "signal 99"


def test_ticket_does_not_show_its_token() -> None:
    ticket = JoinTicket("tcp://10.0.0.1:4000", "0123456789abcdef", encrypted=True, fit=2)
    assert "0123456789abcdef" not in repr(ticket)
    variables = ticket.variables(worker=3, restart_count=1)
    assert variables["ASYNC_LOCALSGD_JOIN"] == "tcp://10.0.0.1:4000"
    assert variables["ASYNC_LOCALSGD_TOKEN"] == "0123456789abcdef"
    settings = {"worker": 3, "fit": 2, "encrypted": True, "restart_count": 1}
    assert json.loads(variables["ASYNC_LOCALSGD_REJOIN"]) == settings


# -------------------------------------------------------------------------------------------------------- launchers

Job = Callable[..., Outcome]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """Run the job to its end."""
    with jobs() as started:

        def run(code: int | None = 0, **options: Any) -> Outcome:
            command = [sys.executable, JOB, tmp_path, json.dumps(options)]
            outcome = Outcome(*started.finish(started.start(command)), tmp_path)
            assert code is None or outcome.code == code, outcome.text[-6000:]
            return outcome

        yield run


@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(name, marks=pytest.mark.slow) for name in ("popen", "spawn", "forkserver"))]
)
def test_dead_ranks_are_restarted(job: Job, method: str) -> None:
    fates = {"1.0": "kill", "1.1": "raise", "2.0": "raise"}
    outcome = job(ranks=3, method=method, fates=fates, until=["1.2", "2.1"])
    assert "worker 1 ended with signal 9 (SIGKILL); restarting it in 0.5 s (restart 1 of 3)" in outcome.text
    assert "restarting it in 1 s (restart 2 of 3)" in outcome.text
    assert outcome.text.count("RuntimeError: a fault of this rank's own") == 2
    assert "the result of rank 0" in outcome.text
    assert "must not be printed" not in outcome.text


@pytest.mark.parametrize("method", ["popen", "fork"])
def test_failed_start_is_tried_again(job: Job, method: str) -> None:
    outcome = job(ranks=2, method=method, fates={"1.0": "kill"}, until=["1.2"], no_memory=True)
    assert "worker 1 could not be started ([Errno 12] Cannot allocate memory); restarting it in 1 s" in outcome.text
    assert not (outcome.out / "1.1").exists()
    assert "the result of rank 0" in outcome.text


def test_ranks_of_a_call_without_training_may_end_in_any_order(job: Job) -> None:
    outcome = job(ranks=3, method="fork", trains=False, first_to_end=2, until=[])
    assert "worker" not in outcome.text
    assert "the result of rank 0" in outcome.text


def test_stopped_rank_0_ends_in_order(job: Job) -> None:
    outcome = job(ranks=2, method="fork", fates={"0.0": "exit 143"}, until=[], code=None)
    assert outcome.code in (0, 143), "the code that Lightning ends with after SIGTERM"
    assert "Traceback" not in outcome.text


def test_training_continues_when_restarts_are_used_up(job: Job) -> None:
    fates = {"1.0": "kill", "1.1": "kill", "2.0": "leave"}
    outcome = job(ranks=3, method="fork", fates=fates, until=["1.1"], more_seconds=2.0, max_restarts=1)
    assert "not restarting it again after 1 restart(s) (max_restarts=1)" in outcome.text
    assert not (outcome.out / "1.2").exists()
    assert "worker 2 left with exit code 0; not restarting it" in outcome.text
    assert not (outcome.out / "2.1").exists()


@pytest.mark.parametrize("method", ["popen", "fork"])
def test_rejected_worker_and_worker_that_joins_too_late(job: Job, method: str) -> None:
    fates = {"1.0": "kill", "1.1": "never joins", "2.0": "kill"}
    outcome = job(ranks=3, method=method, fates=fates, until=["1.1"], banned=[2])
    assert "worker 2 ended with signal 9 (SIGKILL); not restarting it" in outcome.text
    assert not (outcome.out / "2.1").exists()
    assert "local rank 1 was restarted too late to rejoin; stopping its process" in outcome.text


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_all_ranks_are_restarted_when_rank_0_is_killed(job: Job, method: str) -> None:
    outcome = job(ranks=2, method=method, fates={"0.0": "kill"}, until=["1.0.resumed"])
    assert "rank 0 ended with signal 9 (SIGKILL); restarting all ranks in 0.5 s" in outcome.text
    assert "the result of rank 0" in outcome.text
    assert (outcome.out / "0.0.resumed").exists()


def test_exception_of_rank_0_is_final(job: Job) -> None:
    outcome = job(ranks=2, method="fork", fates={"0.0": "raise"}, until=[], code=None)
    assert outcome.code != 0
    assert "a fault of this rank's own" in outcome.text
    assert "restarting" not in outcome.text
