"""Where the ranks of a Trainer call meet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.fabric.utilities.seed import reset_seed

from lightning_async_localsgd.launch.children import ended_ranks
from lightning_async_localsgd.launch.lost_ranks import raise_if_rank_missing
from lightning_async_localsgd.launch.rendezvous import Rendezvous

if TYPE_CHECKING:
    from lightning.pytorch.strategies import DDPStrategy

    from lightning_async_localsgd.launch.joining import JoinGrant


def meet_ranks(
    strategy: DDPStrategy, grant: JoinGrant | None, call: int, timeout: float, expected_workers: int | None
) -> Rendezvous | None:
    """Meet the other ranks. A single rank and a late joiner meet no rank.

    Args:
        strategy: the strategy, which knows this rank.
        grant: the server's permission if this process joins a running training; None if it does not.
        call: number of the Trainer call in the script.
        timeout: seconds to wait for other ranks.
        expected_workers: the strategy's option.

    """
    if strategy.world_size == 1 or (grant is not None and grant.late_joiner):
        return None
    reset_seed()  # All ranks must build the same model and agree on permutations.
    environment = strategy.cluster_environment
    assert environment is not None
    return Rendezvous(
        environment.main_address,
        environment.main_port,
        strategy.global_rank,
        strategy.world_size,
        timeout,
        raise_if_rank_missing,
        ended_ranks,
        call=call,
        rejoins=grant is not None,
        expected_workers=expected_workers,
    )
