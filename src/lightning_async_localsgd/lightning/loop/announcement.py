"""What the console says when training begins: who trains, how much, and where files go."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_async_localsgd.lightning.checkpoints.run_folder import folder_of
from lightning_async_localsgd.lightning.loop.beginning import pretrained_text
from lightning_async_localsgd.lightning.trainer_access.strategy import strategy_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.runtime.settings import RuntimeSettings


def announce(trainer: pl.Trainer, settings: RuntimeSettings, workers: int, name: str) -> None:
    """Log on rank 0 how many workers train, how the budget is counted, and where the run's files go.

    Args:
        trainer: the trainer.
        settings: settings of the run, with its budget and its synchronous beginning.
        workers: number of workers that the run is started with.
        name: name of the strategy.

    """
    every = strategy_of(trainer).checkpoint_every
    folder = folder_of(trainer) if trainer.is_global_zero and every is not None else None
    text = f"{name}: {_budget_text(settings, workers, trainer)}."
    if settings.sync_warmup_steps > 0 and workers > 1:
        text += f" Until step {settings.sync_warmup_steps}, they average gradients (sync_warmup_steps)."
    elif workers > 1 and (part := pretrained_text(trainer, settings)) is not None:
        text += f" sync_warmup_steps='auto' is 0, because {part}; give a number if its weights are random."
    if folder is not None:
        text += f" The run saves itself in {folder} ({_interval_text(every)})."
    rank_zero_info(text)


def _budget_text(settings: RuntimeSettings, workers: int, trainer: pl.Trainer) -> str:
    budget = settings.budget
    train = "1 worker trains" if workers == 1 else f"{workers} workers train"
    if budget.total is None:
        return f"{train} until something stops the run"
    limit = f"{budget.limit}={int((trainer.max_steps if budget.limit == 'max_steps' else trainer.max_epochs) or 0)}"
    steps = f"{train} for {budget.total} local steps"
    if settings.step_samples:
        rest = f"{budget.steps_per_rank} steps of {settings.step_samples} samples per worker on average"
        return f"{train} for {budget.total} samples of all together ({limit}, {rest})"
    if workers == 1:
        return f"{steps} ({limit})"
    return f"{steps} of all together ({limit}, {budget.steps_per_rank} per worker on average)"


def _interval_text(every: int | timedelta | None) -> str:
    if isinstance(every, timedelta):
        minutes = every.total_seconds() / 60
        return f"every {minutes:g} min"
    return f"every {every} merged pushes"
