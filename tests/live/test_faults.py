"""Ranks that die, fail, do not arrive or have another model, without restarts."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable

import pytest
import torch

from tests.live.conftest import Outcome

Job = Callable[..., Outcome]


@pytest.mark.parametrize("start_method", ["popen", "fork"])
def test_killed_worker_loses_only_its_round(job: Job, start_method: str) -> None:
    outcome = job(ranks=3, victim=1, at_step=13, fate="kill", start_method=start_method, strategy={"max_restarts": 0})
    rank0, rank2 = outcome.rank(0), outcome.rank(2)
    assert rank0["digest"] == rank2["digest"]
    summary = outcome.summary
    # The other workers meet the budget. Steps of the lost round do not count.
    assert sum(worker["steps"] for worker in summary["workers"]) == 180
    assert rank0["steps"] + rank2["steps"] + summary["workers"][1]["steps"] == 180
    assert summary["workers"][1]["steps"] < 13
    assert not (outcome.out / "rank_1.json").exists()
    assert "worker 1 left the run" in outcome.text
    assert "worker 1 was lost 1 time(s)" in outcome.text
    [lost] = summary["lost"]
    assert lost["worker"] == 1
    assert [worker["present"] for worker in summary["workers"]] == [True, False, True]


@pytest.mark.parametrize(
    ("fate", "error"), [("raise", "a fault of this rank's own"), ("run out of memory", "allocate memory")]
)
def test_exception_of_a_worker_ends_only_this_worker(job: Job, fate: str, error: str) -> None:
    outcome = job(ranks=3, victim=2, at_step=5, fate=fate, strategy={"max_restarts": 0})
    assert outcome.rank(0)["digest"] == outcome.rank(1)["digest"]
    assert sum(worker["steps"] for worker in outcome.summary["workers"]) == 180
    assert error in outcome.text
    [lost] = outcome.summary["lost"]
    assert lost["reason"].startswith("it ended with RuntimeError: ")
    assert error in lost["reason"]
    reason = f"worker 2 ({lost['reason']}); the other 2 workers took the remaining steps"
    assert f"1 of 3 workers was lost before the end of training: {reason}" in outcome.text


def test_lost_worker_is_an_error_with_fail_on_lost_workers(job: Job) -> None:
    options = {"max_restarts": 0, "fail_on_lost_workers": True}
    outcome = job(ranks=3, victim=2, at_step=5, fate="kill", start_method="fork", strategy=options, check=False)
    assert outcome.code != 0
    assert "worker(s) 2 were lost and fail_on_lost_workers=True" in outcome.text
    assert sum(worker["steps"] for worker in outcome.summary["workers"]) == 180
    saved = torch.load(outcome.out / "checkpoints" / "last.ckpt", weights_only=True)
    assert 0 < saved["async_localsgd"]["budget"]["done"] <= 180


@pytest.mark.parametrize("start_method", ["popen", "fork"])
def test_exception_of_rank_0_ends_the_job(job: Job, start_method: str) -> None:
    outcome = job(ranks=2, victim=0, at_step=15, fate="raise", start_method=start_method, check=False)
    assert outcome.code != 0
    assert "a fault of this rank's own" in outcome.text
    assert not (outcome.out / "rank_1.json").exists()


def test_death_of_rank_0_ends_all_workers(job: Job) -> None:
    outcome = job(ranks=2, victim=0, at_step=15, fate="kill", check=False, exchange={"silence_timeout": 5.0})
    assert outcome.code != 0
    assert not (outcome.out / "rank_1.json").exists()


def test_rank_that_does_not_arrive_is_named(job: Job) -> None:
    outcome = job(ranks=3, late={"rank": 2, "seconds": 600}, exchange={"start_timeout": 5.0}, check=False)
    assert outcome.code != 0
    # On a busy machine, rank 1 may need more than five seconds, too.
    assert re.search(r"rank\(s\) (1, )?2 of 3 did not arrive", outcome.text)
    assert "start_timeout=5 s" in outcome.text


def test_different_models_of_ranks_are_rejected_with_the_difference(job: Job) -> None:
    outcome = job(ranks=2, unequal_models=True, check=False)
    assert outcome.code != 0
    assert "parameter 0: 'net.0.weight' float32 [33, 8] here, 'net.0.weight' float32 [32, 8] there" in outcome.text
    assert "local rank 1" in outcome.text, "rank 0 names the rank that ended"


def test_port_in_use_is_named(job: Job) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        outcome = job(ranks=2, exchange={"transport": "tcp", "port": port}, check=False)
    assert outcome.code != 0
    assert f"exchange.port={port}" in outcome.text
