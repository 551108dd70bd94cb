"""Who is started again: the rules by themselves, and both launchers with processes that only start and die."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_async_localsgd.restarts import JoinTicket, Restarts, in_words, pause_before
from tests.processes import Outcome, jobs

JOB = Path(__file__).with_name("restarts_job.py")

# ------------------------------------------------------------------------------------------------------------ rules


def test_a_worker_comes_back_after_a_pause_that_doubles(caplog: pytest.LogCaptureFixture) -> None:
    restarts = Restarts(most=3)
    now = 100.0
    for life, pause in ((1, 0.5), (2, 1.0), (3, 2.0)):
        assert restarts.died(2, -signal.SIGKILL, now)
        assert restarts.next_due() == now + pause
        assert restarts.take_due(now + pause - 0.01) == {}
        assert restarts.take_due(now + pause) == {2: life}
        now += 10.0
    assert "worker 2 ended with signal 9 (SIGKILL); it is started again in 2 s (restart 3 of 3)" in caplog.text
    assert not restarts.died(2, 1, now)
    assert "has been started again 3 time(s) (max_restarts=3)" in caplog.text
    # Every worker has restarts of its own.
    assert restarts.died(1, 1, now)


@pytest.mark.parametrize("code", [0, -signal.SIGTERM, -signal.SIGINT])
def test_who_leaves_or_is_asked_to_does_not_come_back(code: int, caplog: pytest.LogCaptureFixture) -> None:
    assert not Restarts(most=3).died(1, code, 0.0)
    assert f"worker 1 has left, with {in_words(code)}" in caplog.text


def test_who_is_not_wanted_does_not_come_back(caplog: pytest.LogCaptureFixture) -> None:
    restarts = Restarts(most=3, allowed=lambda worker: worker != 1)
    assert not restarts.died(1, 1, 0.0)
    assert restarts.died(2, 1, 0.0)
    assert "the server takes no more of it" in caplog.text


def test_nobody_comes_back_after_the_end() -> None:
    restarts = Restarts(most=3)
    restarts.died(1, 1, 0.0)
    restarts.cancel()
    assert restarts.next_due() is None
    assert restarts.take_due(100.0) == {}


def test_after_a_good_life_the_pause_is_short_again() -> None:
    restarts = Restarts(most=9)
    now = 0.0
    for pause in (0.5, 1.0, 2.0):
        assert restarts.died(2, -9, now)
        assert restarts.next_due() == now + pause
        now += pause
        restarts.take_due(now)
        now += 1.0
    now += 60.0
    assert restarts.died(2, -9, now)
    assert restarts.next_due() == now + 0.5


def test_a_pause_has_a_limit() -> None:
    assert pause_before(50) == 30.0


def test_exit_codes_in_words() -> None:
    assert in_words(3) == "exit code 3"
    assert in_words(-11) == "signal 11 (SIGSEGV)"
    assert in_words(-99) == "signal 99"


def test_a_ticket_does_not_show_its_token(caplog: pytest.LogCaptureFixture) -> None:
    ticket = JoinTicket("tcp://10.0.0.1:4000", "0123456789abcdef", encrypted=True, fit=2)
    assert "0123456789abcdef" not in repr(ticket)
    variables = ticket.variables(worker=3, life=1)
    assert variables["ASYNC_LOCALSGD_JOIN"] == "tcp://10.0.0.1:4000"
    assert variables["ASYNC_LOCALSGD_TOKEN"] == "0123456789abcdef"
    told = {"worker": 3, "fit": 2, "encrypted": True, "life": 1}
    assert json.loads(variables["ASYNC_LOCALSGD_REJOIN"]) == told


# -------------------------------------------------------------------------------------------------------- launchers

Job = Callable[..., Outcome]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """Starts the job and waits for its end."""
    with jobs() as started:

        def run(code: int | None = 0, **options: Any) -> Outcome:
            command = [sys.executable, JOB, tmp_path, json.dumps(options)]
            outcome = Outcome(*started.finish(started.start(command), 60), tmp_path)
            assert code is None or outcome.code == code, outcome.text[-6000:]
            return outcome

        yield run


@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(name, marks=pytest.mark.slow) for name in ("popen", "spawn", "forkserver"))]
)
def test_dead_ranks_are_started_again(job: Job, method: str) -> None:
    fates = {"1.0": "kill", "1.1": "raise", "2.0": "raise"}
    outcome = job(ranks=3, method=method, fates=fates, until=["1.2", "2.1"])
    assert "worker 1 ended with signal 9 (SIGKILL); it is started again in 0.5 s (restart 1 of 3)" in outcome.text
    assert "it is started again in 1 s (restart 2 of 3)" in outcome.text
    assert outcome.text.count("RuntimeError: a fault of this rank's own") == 2
    assert "the result of rank 0" in outcome.text
    assert "nobody must see" not in outcome.text


@pytest.mark.parametrize("method", ["popen", "fork"])
def test_a_restart_that_cannot_start_a_process_is_tried_again(job: Job, method: str) -> None:
    outcome = job(ranks=2, method=method, fates={"1.0": "kill"}, until=["1.2"], no_memory=True)
    assert "it could not be started: [Errno 12] Cannot allocate memory; it is started again in 1 s" in outcome.text
    assert not (outcome.out / "1.1").exists()
    assert "the result of rank 0" in outcome.text


def test_who_has_used_up_its_restarts_stays_away(job: Job) -> None:
    fates = {"1.0": "kill", "1.1": "kill", "2.0": "leave"}
    outcome = job(ranks=3, method="fork", fates=fates, until=["1.1"], more=2.0, max_restarts=1)
    assert "has been started again 1 time(s) (max_restarts=1)" in outcome.text
    assert not (outcome.out / "1.2").exists()
    assert "worker 2 has left, with exit code 0" in outcome.text
    assert not (outcome.out / "2.1").exists()


@pytest.mark.parametrize("method", ["popen", "fork"])
def test_who_may_not_come_back_or_comes_too_late(job: Job, method: str) -> None:
    fates = {"1.0": "kill", "1.1": "never joins", "2.0": "kill"}
    outcome = job(ranks=3, method=method, fates=fates, until=["1.1"], banned=[2])
    assert "worker 2 ended with signal 9 (SIGKILL); it is not started again" in outcome.text
    assert not (outcome.out / "2.1").exists()
    assert "local rank 1 was started again too late to join; it is ended" in outcome.text


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_all_ranks_are_started_again_when_rank_0_is_killed(job: Job, method: str) -> None:
    outcome = job(ranks=2, method=method, fates={"0.0": "kill"}, until=["1.0.resumed"])
    assert "rank 0 ended with signal 9 (SIGKILL); all ranks are started again in 0.5 s" in outcome.text
    assert "the result of rank 0" in outcome.text
    assert (outcome.out / "0.0.resumed").exists()


def test_an_error_of_rank_0_would_only_come_again(job: Job) -> None:
    outcome = job(ranks=2, method="fork", fates={"0.0": "raise"}, until=[], code=None)
    assert outcome.code != 0
    assert "a fault of this rank's own" in outcome.text
    assert "started again" not in outcome.text
