"""What a resumed run continues with: the steps done so far, and the trainer's own step count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_async_localsgd.lightning.loop.limits import steps_of_an_optimizer
from lightning_async_localsgd.policies.plan import step_offset_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.policies.plan import Position, RunBudget


def log_resumed_state(state: Mapping[str, Any] | None, workers: int, strategy_name: str) -> None:
    """Log what a resumed run's checkpoint lacks, and whether the number of workers has changed.

    Args:
        state: the server's state in the checkpoint; None if the checkpoint has no such state.
        workers: number of workers that the run is started with.
        strategy_name: name of the strategy.

    """
    if state is None:
        rank_zero_info(
            f"The checkpoint has no state of an {strategy_name} run: the global model starts from its weights, and the "
            "outer optimizer starts fresh."
        )
    elif state["initial_workers"] != workers:
        rank_zero_info(
            f"The checkpoint was written with {state['initial_workers']} workers; this run continues with {workers}."
        )


def counted_step_offset(trainer: pl.Trainer, position: Position | None, budget: RunBudget) -> int:
    """Return how many global steps the trainer has counted beyond the steps of this run.

    Args:
        trainer: the trainer, resumed from a checkpoint.
        position: the position in the data that the checkpoint holds.
        budget: budget of this run.

    """
    counted = steps_of_an_optimizer(trainer)
    offset = step_offset_of(position, budget, counted)
    if offset:
        assert position is not None
        rank_zero_warn(
            f"The checkpoint's epochs had {position.steps_per_rank} optimizer steps per rank; with this run's ranks "
            f"and batches they have {counted - offset}. As under DDP, global_step continues from {counted} and ends at "
            f"{(budget.steps_per_rank or 0) + offset}, so a learning-rate schedule over {budget.steps_per_rank} steps "
            "(trainer.estimated_stepping_batches) does not end with training."
        )
    return offset
