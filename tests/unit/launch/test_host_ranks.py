"""How many ranks torchrun and SLURM have started on a host, and what of the trainer's devices contradicts that."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from lightning_async_localsgd.launch.host_ranks import HostRanks, ranks_of_slurm, ranks_of_torchrun

HOST = socket.gethostname()


def slurm(**variables: Any) -> dict[str, str]:
    given = {"SLURM_NTASKS": 5, "SLURM_NODEID": 1, "SLURM_TASKS_PER_NODE": "2,3", **variables}
    return {name: str(value) for name, value in given.items() if value is not None}


def test_torchrun_says_how_many_ranks_are_here() -> None:
    ranks = ranks_of_torchrun({"LOCAL_WORLD_SIZE": "3", "GROUP_WORLD_SIZE": "2", "WORLD_SIZE": "5"})
    assert ranks is not None
    assert (ranks.here, ranks.hosts) == (3, 2)
    assert ranks_of_torchrun({"WORLD_SIZE": "5"}) is None


@pytest.mark.parametrize(
    ("text", "tasks", "total"),
    [("2,3", [2, 3], 5), ("2(x3),1", [2, 2, 2, 1], 7), ("4", [4], 4), ("1(x2),3(x2)", [1, 1, 3, 3], 8)],
)
def test_slurm_says_how_many_tasks_are_here(text: str, tasks: list[int], total: int) -> None:
    for node, here in enumerate(tasks):
        ranks = ranks_of_slurm(slurm(SLURM_TASKS_PER_NODE=text, SLURM_NTASKS=total, SLURM_NODEID=node))
        assert ranks is not None
        assert (ranks.here, ranks.hosts) == (here, len(tasks))


def test_job_step_has_tasks_of_its_own() -> None:
    ranks = ranks_of_slurm(slurm(SLURM_STEP_TASKS_PER_NODE="1,2", SLURM_NTASKS=3))
    assert ranks is not None
    assert ranks.here == 2


def test_equal_nodes_need_no_list_of_tasks() -> None:
    equal = slurm(SLURM_TASKS_PER_NODE=None, SLURM_NTASKS_PER_NODE=2, SLURM_NNODES=2, SLURM_NTASKS=4)
    assert ranks_of_slurm(equal) == HostRanks("SLURM with SLURM_NTASKS_PER_NODE=2", 2, 2)
    # With fewer tasks, it is not known which node has fewer.
    assert ranks_of_slurm({**equal, "SLURM_NTASKS": "3"}) is None


@pytest.mark.parametrize("wrong", [{"SLURM_NTASKS": 6}, {"SLURM_NODEID": 2}, {"SLURM_TASKS_PER_NODE": "two"}])
def test_contradiction_within_slurm_names_the_host(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"host {HOST} is node .* contradicts SLURM with SLURM_TASKS_PER_NODE="):
        ranks_of_slurm(slurm(**wrong))


@pytest.mark.parametrize(
    ("devices", "auto", "shared"),
    [
        (3, 8, False),  # as many devices as ranks
        (8, 8, False),  # devices="auto" on a host with more GPUs
        (1, 1, True),  # devices="auto" on a CPU
    ],
)
def test_devices_that_fit_the_ranks(devices: int, auto: int, shared: bool) -> None:
    HostRanks("torchrun", 3, 2).check(devices, auto, shared, num_nodes=2)


@pytest.mark.parametrize(
    ("devices", "auto", "shared", "num_nodes", "words"),
    [
        (2, 8, False, 2, r"has 3 rank\(s\) \(torchrun\), but its Trainer has 2 device\(s\)"),
        (2, 2, False, 2, r"has 3 rank\(s\) .* at most as many ranks on a host as it has devices"),
        (4, 8, False, 2, r"has 3 rank\(s\) .* has 4 device\(s\)"),
        (2, 1, True, 2, r"has 3 rank\(s\) .* has 2 device\(s\)"),
        (3, 8, False, 1, r"is one of 2 host\(s\) .* num_nodes=1; use Trainer\(num_nodes=2\)"),
    ],
)
def test_devices_that_contradict_the_ranks(devices: int, auto: int, shared: bool, num_nodes: int, words: str) -> None:
    with pytest.raises(ValueError, match=rf"host {HOST} {words}"):
        HostRanks("torchrun", 3, 2, local_rank=2).check(devices, auto, shared, num_nodes)


def test_rank_on_the_cpu_beside_two_that_have_a_gpu_each() -> None:
    for local_rank in (0, 1):
        HostRanks("torchrun", 3, 2, local_rank).check(devices=2, auto_devices=2, shared=False, num_nodes=2)
    HostRanks("torchrun", 3, 2, local_rank=2).check(devices=1, auto_devices=1, shared=True, num_nodes=2)
