"""Quorums in real processes: synchronous DiLoCo to the last bit, and runs that end whatever happens to their ranks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.live.conftest import Outcome
from tests.live.quorum_job import BATCH, LOCAL_STEPS, RANKS, ROUNDS, inner_optimizer, loss_of, network, sample
from tests.processes import jobs

Job = Callable[..., Outcome]


def diloco() -> dict[str, Tensor]:
    """The job's training as one writes synchronous DiLoCo down, in one process and without any of this package."""
    model = network(0)
    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    workers = [network(rank) for rank in range(RANKS)]
    optimizers = [inner_optimizer(worker) for worker in workers]
    for turn in range(ROUNDS):
        for rank, worker in enumerate(workers):
            own = worker.state_dict()
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    own[name].copy_(value)
            optimizer, scheduler = optimizers[rank]
            for step in range(turn * LOCAL_STEPS, (turn + 1) * LOCAL_STEPS):
                batch = torch.stack([sample(rank, step * BATCH + index) for index in range(BATCH)])
                optimizer.zero_grad()
                loss_of(worker, batch).backward()
                optimizer.step()
                scheduler.step()
        trained = [worker.state_dict() for worker in workers]
        for name, parameter in model.named_parameters():
            parameter.grad = sum(parameter.detach() - state[name] for state in trained) / RANKS  # type: ignore[assignment]
        outer.step()
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(sum(state[name] for state in trained) / RANKS)
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}


def ledger(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many as the job's ranks have: sums are split among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_quorum_of_all_is_synchronous_diloco_to_the_last_bit(tmp_path: Path) -> None:
    with jobs() as started:
        script = Path(__file__).with_name("quorum_job.py")
        process = started.start([sys.executable, script, tmp_path, json.dumps({"quorum": "all"})])
        code, text = started.finish(process)
        assert code == 0, text[-6000:]
    wanted = diloco()
    for rank in range(RANKS):
        final = torch.load(tmp_path / f"final_{rank}.pt", weights_only=True)
        for name, value in wanted.items():
            assert torch.equal(final[name], value), (rank, name)
    lines = ledger(tmp_path)
    assert [line["worker"] for line in lines if line["steps"]] == [*range(RANKS)] * ROUNDS
    assert {line["staleness"] for line in lines} == {0}
    assert lines[-1]["version"] == RANKS * ROUNDS


@pytest.mark.parametrize(
    ("strategy", "limit"),
    [
        ({"quorum": 2}, {"max_steps": 40}),
        ({"warmup_steps": 20}, {"max_steps": 40}),
        ({"quorum": "all"}, {"max_epochs": 3}),
    ],
    ids=["two", "warm-up", "all"],
)
def test_unequal_ranks_share_the_budget(job: Job, strategy: dict[str, Any], limit: dict[str, int]) -> None:
    outcome = job(ranks=3, start_method="fork", trainer=limit, strategy=strategy)
    assert len({rank["digest"] for rank in outcome.ranks}) == 1
    assert sum(rank["steps"] for rank in outcome.ranks) == 120
    assert sum(worker["steps"] for worker in outcome.summary["workers"]) == 120
    lines = [line for line in ledger(outcome.out) if line["refused"] is None and line["steps"]]
    assert outcome.summary["version"] == len(lines)


def test_a_synchronous_run_goes_on_without_a_worker_that_dies_and_with_it_again(job: Job) -> None:
    outcome = job(
        ranks=3,
        trainer={"max_steps": 100_000},
        strategy={"quorum": "all"},
        victim=2,
        at_step=12,
        fate="kill",
        until={"worker": 2, "sessions": 2, "rounds": 4},
    )
    assert outcome.summary["workers"][2]["sessions"] == 2
    assert len({rank["digest"] for rank in outcome.ranks}) == 1
    lines = ledger(outcome.out)
    keys = [(line["worker"], line["session"], line["sequence"]) for line in lines]
    assert len(keys) == len(set(keys))
    merged = [line for line in lines if line["refused"] is None]
    assert outcome.summary["version"] == len([line for line in merged if line["steps"]])
    assert sum(worker["steps"] for worker in outcome.summary["workers"]) == sum(line["steps"] for line in merged)
