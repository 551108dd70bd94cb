"""How many ranks torchrun or SLURM has started on this host, which may differ from host to host."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")
"""A number of tasks in ``SLURM_TASKS_PER_NODE``, and for how many nodes in a row it holds: ``3(x2)``."""

_PER_NODE = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
"""Variables with the number of tasks on each node, of the job step and of the job. The first one that is set counts."""


@dataclass(frozen=True)
class HostRanks:
    """The ranks on this host, as reported by the launcher.

    Args:
        launcher: name of the launcher, and its variables.
        here: number of ranks on this host.
        hosts: number of hosts; None if it is unknown.
        local_rank: number of this rank among the ranks on this host.

    """

    launcher: str
    here: int
    hosts: int | None
    local_rank: int = 0

    def check(self, devices: int, auto_devices: int, shared: bool, num_nodes: int) -> None:
        """Check that this rank has a device, and that the trainer's devices are those of the ranks on this host.

        A host may have more ranks than devices of one kind: the scripts of the others then choose another accelerator.

        Args:
            devices: number of devices that the trainer of this rank has.
            auto_devices: number of devices that ``devices="auto"`` means on this host.
            shared: whether ranks may share a device, as they do with a CPU.
            num_nodes: number of hosts that the trainer was given.

        Raises:
            ValueError: They contradict each other. The text names the host.

        """
        host = socket.gethostname()
        has_device = shared or self.local_rank < devices
        if devices != self.here and (devices != auto_devices or not has_device):
            raise ValueError(
                f"host {host} has {self.here} rank(s) ({self.launcher}), but its Trainer has {devices} device(s); use "
                "Trainer(devices='auto'), and start at most as many ranks on a host as it has devices, or let the "
                "script choose accelerator='cpu' for the others"
            )
        if self.hosts is not None and num_nodes != self.hosts:
            raise ValueError(
                f"host {host} is one of {self.hosts} host(s) ({self.launcher}), but its Trainer has num_nodes="
                f"{num_nodes}; use Trainer(num_nodes={self.hosts})"
            )


def ranks_of_torchrun(environment: Mapping[str, str]) -> HostRanks | None:
    """Return the ranks on this host of a process of torchrun; None if its environment does not say.

    Args:
        environment: environment variables of the process.

    """
    here, hosts = environment.get("LOCAL_WORLD_SIZE"), environment.get("GROUP_WORLD_SIZE")
    if here is None:
        return None
    launcher = f"torchrun with LOCAL_WORLD_SIZE={here} and WORLD_SIZE={environment.get('WORLD_SIZE')}"
    local_rank = int(environment.get("LOCAL_RANK", "0"))
    return HostRanks(launcher, int(here), None if hosts is None else int(hosts), local_rank)


def ranks_of_slurm(environment: Mapping[str, str]) -> HostRanks | None:
    """Return the ranks on this host of a task of SLURM; None if its environment does not say.

    Args:
        environment: environment variables of the task.

    Raises:
        ValueError: The variables contradict each other. The text names the host.

    """
    total, node = int(environment["SLURM_NTASKS"]), int(environment.get("SLURM_NODEID", "0"))
    local_rank = int(environment.get("SLURM_LOCALID", "0"))
    # A job step may have fewer tasks than its job.
    name = next((name for name in _PER_NODE if environment.get(name)), None)
    if name is None:
        here, hosts = environment.get("SLURM_NTASKS_PER_NODE"), environment.get("SLURM_NNODES")
        if here is None or hosts is None or int(here) * int(hosts) != total:
            return None
        return HostRanks(f"SLURM with SLURM_NTASKS_PER_NODE={here}", int(here), int(hosts), local_rank)
    text = environment[name]
    tasks = _tasks_per_node(text)
    launcher = f"SLURM with {name}={text} and SLURM_NTASKS={total}"
    if sum(tasks) != total or node >= len(tasks):
        raise ValueError(
            f"host {socket.gethostname()} is node {node} of {len(tasks)} with {sum(tasks)} task(s) in all, which "
            f"contradicts {launcher}; start the job with srun, and leave these variables as they are"
        )
    return HostRanks(launcher, tasks[node], len(tasks), local_rank)


def _tasks_per_node(text: str) -> list[int]:
    """Return the number of tasks on each node: ``2(x3),1`` is [2, 2, 2, 1]. Unreadable text has no nodes."""
    matches = [_TASKS.fullmatch(part) for part in text.split(",")]
    return [int(match[1]) for match in matches if match is not None for _ in range(int(match[2] or 1))]
