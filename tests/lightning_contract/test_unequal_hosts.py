"""Hosts with unequal numbers of ranks: under torchrun, under SLURM, and by hand."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from tests.lightning_contract.launching import Notes, assert_trained, command, free_port, notes, succeed
from tests.processes import Jobs

pytestmark = pytest.mark.slow

TOKEN = "of-a-laptop-and-a-big-machine"

STEPS = 60
"""``max_steps``, which each of the three ranks counts for."""

TRAINER = {"devices": "auto", "num_nodes": 2, "max_steps": STEPS}


def slurm_task(rank: int, port: int) -> dict[str, str]:
    """Return the variables of a task of a job with one task on its first node and two on its second."""
    node = min(rank, 1)
    return {
        "SLURM_JOB_ID": "123456", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "3", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "2", "SLURM_NODELIST": "127.0.0.1", "SLURM_TASKS_PER_NODE": "1,2", "MASTER_PORT": str(port),
        "SLURM_PROCID": str(rank), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(rank - node),
    }  # fmt: skip


def assert_places(seen: Notes) -> None:
    """Check that the first host has one rank and the second two, also for data libraries."""
    places = [[int(value or -1) for value in seen["fit", rank][0]["env"]] for rank in range(3)]
    assert [place[3:] for place in places] == [[0, 1], [0, 2], [1, 2]]
    assert [seen["fit", rank][0]["local_rank"] for rank in range(3)] == [0, 0, 1]


def test_torchrun(started: Jobs, out: Path) -> None:
    line = command(out, calls=[["fit", "validate"]], trainer=TRAINER)[1:]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--rdzv-backend=static"]
    agent += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    hosts = [started.start([*agent, f"--node-rank={n}", f"--nproc-per-node={n + 1}", *line]) for n in (0, 1)]
    succeed(started, *hosts)
    seen = assert_trained(out, ranks=3, budget=3 * STEPS)
    assert_places(seen)
    validated = [seen["validate", rank][0] for rank in range(3)]
    assert all(note["group"] and note["rank_metric"] == 1.0 for note in validated), "the mean over three ranks"


def test_slurm(started: Jobs, out: Path) -> None:
    port = free_port()
    line = command(out, trainer=TRAINER)
    succeed(started, *(started.start(line, **slurm_task(rank, port)) for rank in range(3)))
    assert_places(assert_trained(out, ranks=3, budget=3 * STEPS))


def test_contradiction_on_one_host_ends_the_ranks_of_all_hosts(started: Jobs, out: Path) -> None:
    port = free_port()
    devices = [1, 4, 4]  # There are two ranks on the second host.
    tasks = [
        started.start(command(out, trainer={**TRAINER, "devices": count}), **slurm_task(rank, port))
        for rank, count in enumerate(devices)
    ]
    for task in tasks:
        code, text = started.finish(task, 60)
        assert code == 1
        assert f"host {socket.gethostname()} has 2 rank(s) (SLURM with SLURM_TASKS_PER_NODE=1,2" in text
        assert "its Trainer has 4 device(s)" in text


def test_run_waits_for_its_expected_workers_and_a_host_joins_with_all_devices(started: Jobs, out: Path) -> None:
    port = free_port()
    own = {"expected_workers": 3, "local_steps": 5, "fail_on_lost_workers": True}

    def line(devices: int) -> list[str | Path]:
        trainer = {"devices": devices, "max_steps": STEPS}
        return command(out, own_strategy=own, exchange={"port": port}, trainer=trainer)

    address = f"tcp://127.0.0.1:{port}"
    joins = started.start(line(2), ASYNC_LOCALSGD_TOKEN=TOKEN, ASYNC_LOCALSGD_JOIN=address)
    rank_0 = started.start(line(1), ASYNC_LOCALSGD_TOKEN=TOKEN)
    text = succeed(started, rank_0, joins)
    assert "waiting for 2 worker(s) to join at tcp://" in text
    assert f"3 workers train for {3 * STEPS} local steps of all together (max_steps={STEPS}" in text
    assert text.count("joining the run at") == 2
    assert "lost before the end" not in text
    workers = [notes(out)["fit", worker][0] for worker in range(3)]
    assert len({worker["digest"] for worker in workers}) == len({worker["pid"] for worker in workers[1:]}) - 1 == 1
    assert sum(worker["steps"] for worker in workers) == 3 * STEPS
    assert all(worker["steps"] > 0 for worker in workers)
    assert sorted(worker["local_rank"] for worker in workers[1:]) == [0, 1]
    # Data libraries split data among all workers of the beginning. The server chooses who is worker 1.
    variables = [[int(value or -1) for value in worker["env"]] for worker in workers]
    assert [(rank, size, here) for rank, _, size, _, here in variables] == [(0, 3, 1), (1, 3, 2), (2, 3, 2)]
