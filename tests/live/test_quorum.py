"""Quorums in real processes: bit-identical to synchronous DiLoCo, and runs of ranks that are unequal or die."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_async_localsgd.server.event_file import read_pushes
from tests.lightning_models import inverse_time
from tests.live import quorum_job
from tests.live.conftest import Outcome
from tests.live.quorum_job import BATCH, LOCAL_STEPS, RANKS, ROUNDS, loss_of, sample, seeded_network
from tests.processes import Jobs

Job = Callable[..., Outcome]


def diloco() -> dict[str, Tensor]:
    """Compute the run of the job as synchronous DiLoCo, in one process and without this package."""
    model = seeded_network(0)
    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    workers = [seeded_network(rank) for rank in range(RANKS)]
    optimizers = [torch.optim.AdamW(worker.parameters(), lr=1e-2) for worker in workers]
    schedulers = [inverse_time(optimizer, 0) for optimizer in optimizers]
    for turn in range(ROUNDS):
        for rank, worker in enumerate(workers):
            own = worker.state_dict()
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    own[name].copy_(value)
            for step in range(turn * LOCAL_STEPS, (turn + 1) * LOCAL_STEPS):
                batch = torch.stack([sample(rank, step * BATCH + index) for index in range(BATCH)])
                optimizers[rank].zero_grad()
                loss_of(worker, batch).backward()
                optimizers[rank].step()
                schedulers[rank].step()
        trained = [worker.state_dict() for worker in workers]
        for name, parameter in model.named_parameters():
            parameter.grad = sum(parameter.detach() - state[name] for state in trained) / RANKS  # type: ignore[assignment]
        outer.step()
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(sum(state[name] for state in trained) / RANKS)
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}


def ledger(out: Path) -> list[dict[str, Any]]:
    return read_pushes(out / "events.jsonl")


def test_quorum_of_all_workers_equals_synchronous_diloco_bit_for_bit(started: Jobs, tmp_path: Path) -> None:
    started.run(quorum_job.__file__, tmp_path, json.dumps({"quorum": "all"}))
    expected = diloco()
    for rank in range(RANKS):
        final = torch.load(tmp_path / f"final_{rank}.pt", weights_only=True)
        for name, value in expected.items():
            assert torch.equal(final[name], value), (rank, name)
    lines = ledger(tmp_path)
    assert [line["worker"] for line in lines if line["steps"]] == [*range(RANKS)] * ROUNDS
    assert {line["staleness"] for line in lines} == {0}
    assert lines[-1]["version"] == RANKS * ROUNDS


@pytest.mark.parametrize(
    ("strategy", "limit"),
    [
        ({"quorum": 2}, {"max_steps": 40}),
        ({"quorum": "all"}, {"max_epochs": 3}),
    ],
    ids=["two", "all"],
)
def test_ranks_of_unequal_speed_share_the_budget(job: Job, strategy: dict[str, Any], limit: dict[str, int]) -> None:
    outcome = job(ranks=3, start_method="fork", trainer=limit, strategy=strategy)
    assert len({rank["digest"] for rank in outcome.ranks}) == 1
    assert sum(rank["steps"] for rank in outcome.ranks) == 120
    assert sum(worker["steps"] for worker in outcome.summary["workers"]) == 120
    lines = [line for line in ledger(outcome.out) if line["refused"] is None and line["steps"]]
    assert outcome.summary["version"] == len(lines)


def test_synchronous_run_continues_while_a_dead_worker_is_restarted(job: Job) -> None:
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
