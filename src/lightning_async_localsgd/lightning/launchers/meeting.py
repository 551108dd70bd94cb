"""Where the ranks of a Trainer call meet, and what data libraries are shown of them."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from lightning.fabric.utilities.seed import reset_seed

from lightning_async_localsgd.launch.children import ended_ranks
from lightning_async_localsgd.launch.lost_ranks import raise_if_rank_missing
from lightning_async_localsgd.launch.rank_environment import rank_environment
from lightning_async_localsgd.launch.rendezvous import Rendezvous
from lightning_async_localsgd.lightning.trainer_access.loop import run_validations_in
from lightning_async_localsgd.lightning.trainer_access.metrics import gather_states_of_unequal_dtypes
from lightning_async_localsgd.lightning.trainer_access.strategy import sync_module_states

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DDPStrategy
    from torch import nn

    from lightning_async_localsgd.launch.joining import JoinGrant
    from lightning_async_localsgd.launch.stage_group import StageGroup
    from lightning_async_localsgd.policies.worker_batches import WorkerBatches


def meet_ranks(
    strategy: DDPStrategy,
    grant: JoinGrant | None,
    call: int,
    timeout: float,
    expected_workers: int | None,
    batches: WorkerBatches | None,
) -> Rendezvous | None:
    """Meet the other ranks. A single rank and a late joiner meet no rank.

    Args:
        strategy: the strategy, which knows this rank.
        grant: the server's permission if this process joins a running training; None if it does not.
        call: number of the Trainer call in the script.
        timeout: seconds to wait for other ranks.
        expected_workers: the strategy's option.
        batches: the strategy's option ``batch_size``.

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
        batch_size="" if batches is None else str(batches),
    )


@contextmanager
def shown_ranks(strategy: DDPStrategy, trainer: pl.Trainer, ranks: int, validates_all: bool) -> Iterator[None]:
    """Let data libraries know this rank, for the duration of a ``with`` block.

    Args:
        strategy: the strategy, which knows this rank.
        trainer: the trainer.
        ranks: number of ranks with a share of the data. A late joiner has none of its own.
        validates_all: whether a rank that validates in ``fit`` does so on all data.

    """
    place = strategy.global_rank % ranks, ranks, strategy.local_rank, strategy.num_processes
    with rank_environment(*place), ExitStack() as stack:
        if validates_all:
            stack.callback(run_validations_in(trainer, partial(rank_environment, 0, 1, 0, 1)))
        yield


def share_model(group: StageGroup, module: nn.Module) -> Callable[[], None]:
    """Give all ranks the parameters and buffers of rank 0, and let metrics gather what may differ in its dtype.

    Args:
        group: the open process group of the stage.
        module: the module of this rank.

    Returns:
        Ends what was begun.

    """
    if not group.mixed:
        sync_module_states(module)
        return _nothing
    group.sync_weights(module)
    return gather_states_of_unequal_dtypes(module)


def _nothing() -> None:
    pass
