"""Where the ranks of a run meet in a call of the Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from lightning.fabric.utilities.seed import reset_seed

from lightning_async_localsgd.launch.children import ended_ranks
from lightning_async_localsgd.launch.lost_ranks import raise_if_rank_missing
from lightning_async_localsgd.launch.rendezvous import Rendezvous, open_group_of_one

if TYPE_CHECKING:
    from datetime import timedelta

    import torch
    from lightning.fabric.plugins import ClusterEnvironment

    from lightning_async_localsgd.policies.worker_batches import WorkerBatches
    from lightning_async_localsgd.protocol.options import ExchangeOptions


class _Ranks(Protocol):
    """The strategy, as far as ranks meet with what it has."""

    cluster_environment: ClusterEnvironment | None
    exchange: ExchangeOptions
    expected_workers: int | None
    batches: WorkerBatches | None

    @property
    def global_rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...


def meet(strategy: _Ranks, call: int, rejoins: bool) -> Rendezvous:
    """Meet the other ranks.

    Args:
        strategy: has the ranks and the options that must be the same on all hosts.
        call: number of the Trainer call in the script.
        rejoins: whether this rank was restarted during training.

    Raises:
        RendezvousError: The other ranks cannot be reached.
        HostsDifferError: The hosts contradict each other.

    """
    reset_seed()  # All ranks must build the same model and agree on permutations.
    environment = strategy.cluster_environment
    assert environment is not None
    return Rendezvous(
        environment.main_address,
        environment.main_port,
        strategy.global_rank,
        strategy.world_size,
        strategy.exchange.start_timeout,
        raise_if_rank_missing,
        ended_ranks,
        call=call,
        rejoins=rejoins,
        expected_workers=strategy.expected_workers,
        batch_size="" if strategy.batches is None else str(strategy.batches),
    )


def open_group(backend: str, timeout: timedelta | None, device: torch.device, rendezvous: Rendezvous | None) -> bool:
    """Open the process group of ``validate``, ``test`` and ``predict``, as DDP does.

    Args:
        backend: backend of the group.
        timeout: limit for each operation.
        device: this rank's device.
        rendezvous: where the ranks meet; None for a single rank and for a late joiner.

    Returns:
        Whether this process must destroy the group itself, because no rendezvous does.

    """
    options: dict[str, Any] = {"device_id": None if device.type == "cpu" else device}
    if rendezvous is None:
        return open_group_of_one(backend, timeout, **options)
    rendezvous.barrier("process group")
    rendezvous.open_group(backend, timeout, **options)
    return False
