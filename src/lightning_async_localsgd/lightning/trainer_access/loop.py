"""The training loop: when optimizer steps and epochs end, and the step that loggers get."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.exceptions import SIGTERMException

if TYPE_CHECKING:
    import lightning.pytorch as pl


def can_stop_early(trainer: pl.Trainer) -> bool:
    """Return whether ``min_epochs`` and ``min_steps`` are met. Lightning ignores ``trainer.should_stop`` until then."""
    return bool(trainer.fit_loop._can_stop_early)


def raise_if_sigterm(trainer: pl.Trainer) -> None:
    """Raise if the process has received SIGTERM. Lightning itself looks only at the end of a batch.

    Raises:
        SIGTERMException: The process has received SIGTERM.

    """
    if trainer.received_sigterm:
        raise SIGTERMException


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


def step_progress(trainer: pl.Trainer) -> Any:
    """Return the counts ``ready`` and ``completed`` from which ``trainer.global_step`` follows."""
    loop = trainer.fit_loop.epoch_loop
    if trainer.lightning_module.automatic_optimization:
        return loop.automatic_optimization.optim_progress.optimizer.step.total
    return loop.manual_optimization.optim_step_progress.total


def set_position(trainer: pl.Trainer, step: int, epoch: int) -> None:
    """Set ``trainer.global_step`` and ``trainer.current_epoch``."""
    steps = step_progress(trainer)
    steps.ready = steps.completed = step
    for name in ("ready", "started", "processed", "completed"):
        setattr(trainer.fit_loop.epoch_progress.current, name, epoch)


def logged_step(trainer: pl.Trainer) -> int:
    """Return the step with which the trainer logs metrics now."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def has_validation_batches(trainer: pl.Trainer) -> bool:
    """Return whether the validation loop of ``fit`` has batches. Loads the validation data."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    trainer.validating = True
    try:
        loop.setup_data()
        return not loop.skip
    finally:
        trainer.training = True


def run_validation(trainer: pl.Trainer) -> None:
    """Run the validation loop of ``fit`` once, as Lightning does between two batches."""
    connector = trainer._logger_connector
    trainer.validating = True
    first = connector._first_loop_iter
    try:
        trainer.fit_loop.epoch_loop.val_loop.run()
    finally:
        trainer.training = True
        connector._first_loop_iter = first


def restart_validation_timer(trainer: pl.Trainer) -> None:
    """Begin another interval of time between validations, as Lightning does at the end of a validation."""
    trainer._last_val_time = time.monotonic()  # type: ignore[attr-defined]


def control_validations(
    trainer: pl.Trainer, is_due: Callable[[bool], bool], run: Callable[[Callable[[], Any]], Any]
) -> Callable[[], None]:
    """Decide how the validations of ``fit`` run, until the returned function is called.

    Args:
        trainer: the trainer.
        is_due: whether a validation follows the current batch, given whether Lightning plans one.
        run: called instead of a validation, with the function that runs the validation here.

    """
    loop = trainer.fit_loop.epoch_loop
    should_check, run_here = loop._should_check_val_fx, loop.val_loop.run
    restores = (
        _replace_method(loop, "_should_check_val_fx", lambda fetcher: is_due(should_check(fetcher))),
        _replace_method(loop.val_loop, "run", lambda: run(run_here)),
    )

    def restore() -> None:
        for each in restores:
            each()

    return restore


def control_plateau_schedulers(trainer: pl.Trainer, postpone: Callable[[Any], bool]) -> Callable[[], None]:
    """Let schedulers that follow a metric be stepped later than they are due, until the returned function is called.

    Args:
        trainer: the trainer.
        postpone: returns whether Lightning leaves out a scheduler that is due, given its configuration.

    """
    loop, strategy = trainer.fit_loop.epoch_loop, trainer.strategy
    update = loop._update_learning_rates

    def update_unless_postponed(interval: str, update_plateau_schedulers: bool) -> None:
        configs = strategy.lr_scheduler_configs
        if update_plateau_schedulers and trainer.lightning_module.automatic_optimization:
            count = 1 + (loop.batch_idx if interval == "step" else trainer.current_epoch)
            strategy.lr_scheduler_configs = [
                config
                for config in configs
                if not (
                    config.reduce_on_plateau
                    and config.interval == interval
                    and count % config.frequency == 0
                    and postpone(config)
                )
            ]
        try:
            update(interval, update_plateau_schedulers)
        finally:
            strategy.lr_scheduler_configs = configs

    return _replace_method(loop, "_update_learning_rates", update_unless_postponed)


def step_plateau_scheduler(trainer: pl.Trainer, config: Any) -> None:
    """Step a scheduler that follows a metric as Lightning does when it is due, with the present value of the metric.

    Raises:
        MisconfigurationException: There is no such metric, and the scheduler is ``strict``.

    """
    loop, strategy = trainer.fit_loop.epoch_loop, trainer.strategy
    configs = strategy.lr_scheduler_configs
    strategy.lr_scheduler_configs = [replace(config, frequency=1)]
    try:
        # Not through the loop's attribute: control_plateau_schedulers() has replaced it.
        type(loop)._update_learning_rates(loop, config.interval, update_plateau_schedulers=True)
    finally:
        strategy.lr_scheduler_configs = configs


def _replace_method(instance: Any, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Replace a method of one object, until the returned function is called. Replacements are undone in reverse."""
    assert hasattr(type(instance), name)
    before = vars(instance).get(name)
    setattr(instance, name, method)

    def restore() -> None:
        if before is None:
            vars(instance).pop(name, None)
        else:
            setattr(instance, name, before)

    return restore
