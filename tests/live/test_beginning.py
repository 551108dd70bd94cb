"""The synchronous beginning in real processes: equal to synchronous training, with deaths and resumes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_async_localsgd.server.event_file import read_pushes
from tests.lightning_models import cosine, digest
from tests.live import beginning_job
from tests.live.beginning_job import BATCH, CLIP, RANKS, loss_of, sample, seeded_network
from tests.live.conftest import Outcome, run_all
from tests.processes import Jobs

STEPS = 6


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


FAULTS = [
    {"kind": "DROP_LINK", "worker": 1, "round": 2, "moment": "mid-push", "seconds": 0.2},
    {"kind": "DROP_LINK", "worker": 1, "round": 3, "moment": "mid-pull", "seconds": 0.2},
    {"kind": "LOSE_REPLY", "worker": 1, "round": 4},
    {"kind": "DUPLICATE", "worker": 1, "round": 5},
]
"""Faults of the connection, after which a gradient still counts once and its mean arrives once."""


def run(started: Jobs, out: Path, **options: Any) -> list[dict[str, Any]]:
    """Run the job, and return the notes of its ranks."""
    out.mkdir(exist_ok=True)
    text = started.run(beginning_job.__file__, out, json.dumps(options))
    assert text.count("injected:") == len(options.get("faults", []))
    return [torch.load(path, weights_only=True) for path in sorted(out.glob("rank_*.pt"))]


def synchronous_steps(steps: int, total: int) -> list[dict[str, Any]]:
    """Compute synchronous training with the batches of all ranks, in one process and without this package."""
    net = seeded_network(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    schedule = cosine(optimizer, total)
    states = []
    for step in range(steps):
        batches = [torch.stack([sample(rank, step * BATCH + index) for index in range(BATCH)]) for rank in range(RANKS)]
        optimizer.zero_grad()
        (sum(loss_of(net, batch) for batch in batches) / RANKS).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        states.append(
            {
                "weights": {name: value.clone() for name, value in net.state_dict().items()},
                "adam": [{key: value.clone() for key, value in state.items()} for state in optimizer.state.values()],
                "lr": optimizer.param_groups[0]["lr"],
            }
        )
    return states


@pytest.mark.usefixtures("one_thread")
def test_first_steps_equal_synchronous_training_in_spite_of_broken_connections(started: Jobs, tmp_path: Path) -> None:
    total = 20
    ranks = run(
        started,
        tmp_path,
        strategy={"sync_warmup_steps": STEPS, "dynamic_local_steps": False},
        faults=FAULTS,
        trainer={"max_steps": total, "val_check_interval": 3, "check_val_every_n_epoch": None},
    )
    expected = synchronous_steps(STEPS, total)
    for number, wanted in enumerate(expected):
        for rank in ranks:
            found = rank["states"][number]
            assert found["synchronous"]
            torch.testing.assert_close(found["weights"], wanted["weights"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found["adam"], wanted["adam"], rtol=1e-4, atol=1e-7)
            assert rank["rates"][number + 1] == pytest.approx(wanted["lr"])
        assert digest(ranks[0]["states"][number]) == digest(ranks[1]["states"][number]), "equal to the last bit"
    # Rank 0 validates the weights that all ranks have reached.
    assert digest(ranks[0]["validated"][0]) == digest(ranks[1]["states"][2]["weights"])
    assert not ranks[0]["states"][STEPS]["synchronous"]
    assert digest(ranks[0]["final"]) == digest(ranks[1]["final"])
    assert {rank["global_step"] for rank in ranks} == {total}
    done = read_pushes(tmp_path / "events.jsonl")
    assert sum(line["steps"] for line in done if line["refused"] is None) == RANKS * total


def ledger(out: Path) -> list[dict[str, Any]]:
    return read_pushes(out / "events.jsonl")


@pytest.mark.slow
def test_ranks_of_unequal_speed(tmp_path: Path) -> None:
    common = {"ranks": 3, "start_method": "fork", "local_steps": 5}
    runs: dict[str, dict[str, Any]] = {
        "steps": {"trainer": {"max_steps": 40}, "strategy": {"sync_warmup_steps": 20}},
        "epochs": {
            "trainer": {"max_epochs": 2, "accumulate_grad_batches": 2},
            "strategy": {"sync_warmup_steps": 1000},
        },
        "stop": {
            "trainer": {"max_steps": 100_000},
            "strategy": {"sync_warmup_steps": 1000},
            "victim": 0,
            "at_step": 15,
            "fate": "stop",
        },
    }
    outcomes = run_all(tmp_path, {name: {**common, **options} for name, options in runs.items()})
    for name, outcome in outcomes.items():
        assert len({rank["digest"] for rank in outcome.ranks}) == 1, name
        assert all(line["refused"] is None for line in ledger(outcome.out)), name
    lines = ledger(outcomes["steps"].out)
    assert {rank["global_step"] for rank in outcomes["steps"].ranks} == {40}
    assert sum(line["steps"] for line in lines) == 120
    first = {rank: [line["steps"] for line in lines if line["worker"] == rank and line["steps"]] for rank in range(3)}
    assert all(steps[0] == 1 for steps in first.values()), "until speeds are known"
    assert max(first[0][:6]) > max(first[2][:6]) == 1
    # 40 batches of 16 samples in an epoch, two in a local step.
    assert sum(worker["samples"] for worker in outcomes["epochs"].summary["workers"]) == 2 * 640


@pytest.mark.slow
def test_dead_worker_is_not_waited_for(job: Callable[..., Outcome]) -> None:
    outcome = job(
        ranks=3,
        trainer={"max_steps": 100_000},
        strategy={"sync_warmup_steps": 40},
        victim=2,
        at_step=6,
        fate="kill",
        until={"worker": 2, "sessions": 2, "rounds": 12},
    )
    assert outcome.summary["workers"][2]["sessions"] == 2
    assert len({rank["digest"] for rank in outcome.ranks}) == 1
    lines = ledger(outcome.out)
    counted = [(line["worker"], line["session"], line["sequence"]) for line in lines if line["refused"] is None]
    assert len(counted) == len(set(counted))
    total = sum(line["steps"] for line in lines if line["refused"] is None)
    assert sum(worker["steps"] for worker in outcome.summary["workers"]) == total


@pytest.mark.slow
def test_run_resumes_within_its_beginning(started: Jobs, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "strategy": {"sync_warmup_steps": 8, "dynamic_local_steps": False},
        "trainer": {"max_steps": 16},
        "own": False,
        "save": 4,
    }
    run(started, tmp_path / "whole", **options)
    path = str(tmp_path / "whole" / "step=4.ckpt")
    resumed = run(started, tmp_path / "resumed", **options, ckpt_path=path)
    # All ranks continue from the states of rank 0, and with the same weights.
    assert [state["synchronous"] for state in resumed[0]["states"][:5]] == [True] * 4 + [False]
    for number in range(4):
        assert digest(resumed[0]["states"][number]) == digest(resumed[1]["states"][number])
    taken = [int(rank["states"][0]["adam"][0]["step"]) for rank in resumed]
    assert taken == [5, 5]
    assert {rank["global_step"] for rank in resumed} == {16}
    assert digest(resumed[0]["final"]) == digest(resumed[1]["final"])
