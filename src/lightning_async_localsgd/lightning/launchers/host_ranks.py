"""The ranks of this host and their devices.

Lightning takes for granted that all hosts have the same number of devices. Under torchrun and SLURM, the environment
says how many ranks there are on this host and in all, and this may differ from host to host.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from typing_extensions import override

from lightning_async_localsgd.launch.host_ranks import HostRanks, ranks_of_slurm, ranks_of_torchrun
from lightning_async_localsgd.launch.joining import is_evaluator, next_call
from lightning_async_localsgd.launch.rendezvous import end_all_ranks

if TYPE_CHECKING:
    from lightning.pytorch.strategies import DDPStrategy

    from lightning_async_localsgd.launch.joining import JoinGrant


class JoiningEnvironment(LightningEnvironment):
    """Ranks of a process that joins a running training as a worker of its own.

    The rank is above 0 from the beginning. The server decides the number when the process joins.

    Args:
        started_by: environment in which the process was started. It may be a task of SLURM or a process of torchrun,
            which only know the ranks of their own job.
        grant: the server's permission; None before the process has joined.

    """

    def __init__(self, started_by: ClusterEnvironment, grant: JoinGrant | None = None) -> None:
        super().__init__()
        self.started_by = started_by
        self._grant = grant

    @classmethod
    def of(cls, environment: ClusterEnvironment, grant: JoinGrant | None) -> JoiningEnvironment:
        """Return the environment of a process that has joined, or is about to join."""
        return cls(environment.started_by if isinstance(environment, JoiningEnvironment) else environment, grant)

    @property
    @override
    def creates_processes_externally(self) -> bool:
        # One evaluator is enough, however many devices this host has.
        return self.started_by.creates_processes_externally or is_evaluator()

    @override
    def local_rank(self) -> int:
        return self.started_by.local_rank()

    @override
    def node_rank(self) -> int:
        return 0

    @override
    def global_rank(self) -> int:
        if self._grant is None:
            return 1
        return self._grant.info.workers if self._grant.evaluates else self._grant.info.worker

    @override
    def set_global_rank(self, rank: int) -> None:
        """Do nothing: the rank does not follow from the devices of this host."""

    @override
    def world_size(self) -> int:
        return 2 if self._grant is None else self._grant.info.workers

    @override
    def set_world_size(self, size: int) -> None:
        """Do nothing: the number of ranks does not follow from the devices of this host."""


def adopt_ranks(strategy: DDPStrategy, start_method: str, timeout: float) -> Callable[[], None]:
    """Give the strategy a device for each rank of this host, if torchrun or SLURM has started the ranks.

    Args:
        strategy: the strategy, with its accelerator, environment and devices.
        start_method: how the strategy starts ranks. Those that join are started as with ``"popen"``.
        timeout: seconds to reach the other ranks.

    Returns:
        A function that raises ``ValueError`` if the trainer's devices and hosts contradict those of the environment.
        All other ranks of the run then end with the same text.

    Raises:
        ValueError: The strategy would start ranks that something else has started.

    """
    environment, devices = strategy.cluster_environment, strategy.parallel_devices
    assert environment is not None
    assert devices is not None
    assert strategy.accelerator is not None
    joins = isinstance(environment, JoiningEnvironment)
    started_by = environment.started_by if isinstance(environment, JoiningEnvironment) else environment
    if not joins:
        _check_start_method(environment, start_method)
    num_nodes, count = strategy.num_nodes, len(devices)
    try:
        ranks = _ranks_in(started_by)
    except ValueError as error:
        return partial(_end_run, None if joins else started_by, timeout, error)
    if ranks is None:
        return lambda: None if joins else started_by.validate_settings(num_devices=count, num_nodes=num_nodes)
    shared = all(device.type == "cpu" for device in devices)
    try:
        # The script of a job that joins may have the devices and the hosts of the run that it joins.
        usual = count if joins else strategy.accelerator.auto_device_count()
        ranks.check(count, usual, shared, num_nodes if not joins else ranks.hosts or 1)
    except ValueError as error:
        return partial(_end_run, None if joins else started_by, timeout, error)
    strategy.parallel_devices = (devices * ranks.here if count < ranks.here else devices)[: ranks.here]
    return lambda: None


def _check_start_method(environment: ClusterEnvironment, start_method: str) -> None:
    # With "popen", only ranks are started that are not there yet.
    if start_method != "popen" and environment.creates_processes_externally:
        raise ValueError(
            f"start_method={start_method!r} starts ranks, but {_launcher_of(environment)} has started them already; "
            "use strategy='async_localsgd', which is start_method='popen'"
        )


def _launcher_of(environment: ClusterEnvironment) -> str:
    if isinstance(environment, TorchElasticEnvironment):
        return "torchrun"
    if isinstance(environment, SLURMEnvironment):
        return "SLURM"
    if type(environment) is LightningEnvironment:
        return "a launcher that sets LOCAL_RANK"
    return f"the launcher of {type(environment).__name__}"


def _end_run(environment: ClusterEnvironment | None, timeout: float, error: ValueError) -> NoReturn:
    """Raise the error, after the other ranks of the run were told, if there is an environment that knows them."""
    if environment is not None and environment.world_size() > 1:
        address = environment.main_address, environment.main_port
        place = environment.global_rank(), environment.world_size()
        end_all_ranks(*address, *place, timeout, next_call(), str(error))
    raise error


def _ranks_in(environment: ClusterEnvironment) -> HostRanks | None:
    if isinstance(environment, TorchElasticEnvironment):
        return ranks_of_torchrun(os.environ)
    # In an interactive job, the variables are those of the job, not of the processes that the user starts in it.
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if isinstance(environment, SLURMEnvironment) and "SLURM_NTASKS" in os.environ and not interactive:
        return ranks_of_slurm(os.environ)
    return None
