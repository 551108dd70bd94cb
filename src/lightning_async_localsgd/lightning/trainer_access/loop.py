"""The training loop: when optimizer steps and epochs end, and the step that loggers get."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.trainer import call

if TYPE_CHECKING:
    import lightning.pytorch as pl


def can_stop_early(trainer: pl.Trainer) -> bool:
    """Return whether ``min_epochs`` and ``min_steps`` are met. Lightning ignores ``trainer.should_stop`` until then."""
    return bool(trainer.fit_loop._can_stop_early)


def should_accumulate(trainer: pl.Trainer) -> bool:
    """Return whether the current batch only accumulates gradients, so that no optimizer step follows it."""
    return bool(trainer.fit_loop._should_accumulate())


def set_logged_step(trainer: pl.Trainer, step: int) -> None:
    """Set the step with which the trainer logs training metrics. Lightning adds 1 after each optimizer step."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def end_epochs_with_data(trainer: pl.Trainer) -> Callable[[], None]:
    """Let an epoch end with the last batch that the data fetcher gives, until the returned function is called.

    Lightning would also end the epoch after ``trainer.num_training_batches`` batches.
    """
    loop = trainer.fit_loop.epoch_loop
    progress = loop.batch_progress
    return _replace_method(loop, "_num_ready_batches_reached", lambda: progress.is_last_batch)


def control_steps(trainer: pl.Trainer, begins: Callable[[], bool], ends: Callable[[], bool]) -> Callable[[], None]:
    """Decide at which batches an optimizer step begins and ends, until the returned function is called.

    Lightning would begin and end a step after every ``accumulate_grad_batches`` batches of an epoch.

    Args:
        trainer: the trainer.
        begins: whether the current batch is the first of an optimizer step. Gradients are set to zero before it.
        ends: whether the current batch is the last of an optimizer step.

    """
    loop = trainer.fit_loop.epoch_loop
    optimization = loop.automatic_optimization
    make_zero_grad = optimization._make_zero_grad_fn

    def make_zero_grad_if_step_begins(_: int, optimizer: Any) -> Callable[[], None] | None:
        # Lightning sets gradients to zero if the batch index is a multiple of accumulate_grad_batches.
        return make_zero_grad(0, optimizer) if begins() else None

    restores = (
        _replace_method(loop, "_should_accumulate", lambda: not ends()),
        _replace_method(optimization, "_make_zero_grad_fn", make_zero_grad_if_step_begins),
    )

    def restore() -> None:
        for each in restores:
            each()

    return restore


def run_validations_in(trainer: pl.Trainer, context: Callable[[], AbstractContextManager[None]]) -> Callable[[], None]:
    """Run the validations of ``fit`` within a context, sanity check included, until the returned function is called.

    The context also holds while the loop asks for the loaders, and starts their worker processes.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    run = loop.run

    def run_in_context() -> Any:
        with context():
            return run()

    return _replace_method(loop, "run", run_in_context)


def step_scheduler(trainer: pl.Trainer, scheduler: Any) -> None:
    """Step a learning-rate scheduler as Lightning does: with the module's ``lr_scheduler_step``, without a metric."""
    call._call_lightning_module_hook(trainer, "lr_scheduler_step", scheduler, None)


def _replace_method(instance: Any, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Replace a method of one object, until the returned function is called."""
    assert hasattr(type(instance), name)
    setattr(instance, name, method)
    return lambda: vars(instance).pop(name, None)
