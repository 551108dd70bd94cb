"""Checks of what the strategy cannot work with: plugins, callbacks, processes. Each text says what to do instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.callbacks import Callback, LearningRateFinder, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, FSDPPrecision, XLAPrecision
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_async_localsgd.lightning.trainer_access.callbacks import callbacks_of, may_unfreeze
from lightning_async_localsgd.lightning.trainer_access.strategy import is_interactive, remove_batch_norm_sync
from lightning_async_localsgd.outer import Nesterov
from lightning_async_localsgd.protocol.checks import check_bool
from lightning_async_localsgd.protocol.options import ExchangeOptions

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DDPStrategy

    from lightning_async_localsgd.protocol.layout import Layout

_STEPS_WITH_QUORUM = 50
"""Local steps of a round with ``local_steps="auto"`` and a quorum, where the outer optimizer has momentum."""

START_METHODS = ("popen", "spawn", "fork", "forkserver")
"""Ways of starting ranks."""

_HOW_OTHERS_JOIN = "set ASYNC_LOCALSGD_TOKEN to the same secret on every host and use transport='auto' or 'tcp'"


def defaults_with_quorum(
    quorum: int | Literal["all"], local_steps: int | Literal["auto"], outer_optimizer: Any
) -> tuple[int | Literal["auto"], Any]:
    """Return the length of rounds and the outer optimizer, with other defaults if pushes are merged in groups.

    Args:
        quorum: the strategy's option.
        local_steps: the strategy's option.
        outer_optimizer: the strategy's option; None for the default.

    """
    if quorum == 1:
        return local_steps, outer_optimizer
    steps = _STEPS_WITH_QUORUM if local_steps == "auto" else local_steps
    return steps, Nesterov(lr=0.7, momentum=0.9) if outer_optimizer is None else outer_optimizer


def check_processes(start_method: str, max_restarts: int, expected_workers: int | None, evaluator: bool) -> None:
    """Check how ranks and the evaluator are started, how ranks are restarted, and how many workers are expected.

    Raises:
        ValueError: An option is outside its range.
        MisconfigurationException: The session is interactive, and the evaluator needs a script.

    """
    if check_bool("evaluator", evaluator) and is_interactive():
        raise MisconfigurationException(
            "evaluator=True runs the script again for the evaluator, but an interactive session has no script; use "
            "evaluator=False, or let an evaluator join from a script with ASYNC_LOCALSGD_ROLE=evaluator"
        )
    if start_method not in START_METHODS:
        raise ValueError(f"start_method={start_method!r} is unknown; use one of {', '.join(START_METHODS)}")
    if type(max_restarts) is not int or max_restarts < 0:
        raise ValueError(f"max_restarts={max_restarts!r} must be a number of restarts per worker, 0 or more")
    if expected_workers is not None and (type(expected_workers) is not int or expected_workers < 1):
        raise ValueError(
            f"expected_workers={expected_workers!r} must be a number of workers >= 1; None begins with the ranks that "
            "are started together"
        )


def check_plugins(strategy: DDPStrategy, name: str, start_method: str) -> None:
    """Check what the trainer has just given the strategy. This is the earliest moment to refuse it.

    Synchronization of BatchNorm is removed, with a warning.

    Args:
        strategy: the strategy.
        name: name of the strategy.
        start_method: how ranks are started; empty if they are not.

    Raises:
        ValueError: An accelerator, plugin or option does not work with the strategy.
        MisconfigurationException: The session is interactive, and the start method needs a script.

    """
    if isinstance(strategy.accelerator, MPSAccelerator):
        raise ValueError(
            f"accelerator={strategy.accelerator.name()!r} does not work with strategy={name!r}, which trains on CPUs "
            "or CUDA devices; use accelerator='cpu', or another strategy"
        )
    if is_interactive() and start_method == "popen":
        raise MisconfigurationException(
            f"strategy={name!r} runs the script again for every rank, but an interactive session has no script; use "
            "strategy='async_localsgd_notebook'"
        )
    if remove_batch_norm_sync(strategy) and strategy.world_size > 1:
        rank_zero_warn(
            f"sync_batchnorm=True has no effect with {name}, because ranks do not wait for each other in a forward "
            "pass: BatchNorm uses the statistics of each rank's own batches, and the running statistics are merged "
            "with the model. Leave the option out, or use larger batches if these are too small for BatchNorm."
        )
    if isinstance(strategy.precision_plugin, (FSDPPrecision, DeepSpeedPrecision, XLAPrecision)):
        plugin = type(strategy.precision_plugin).__name__
        raise ValueError(
            f"plugins={plugin} belongs to another strategy, but with async_localsgd every rank holds the whole model; "
            "leave the plugin out and use Trainer(precision=...)"
        )


def check_workers(expected_workers: int | None, min_workers: int, ranks: int, others_may_join: bool) -> None:
    """Check that the workers can come that a live run needs.

    Args:
        expected_workers: number of workers with which the run begins; None if these are the ranks.
        min_workers: fewest live workers with which training goes on.
        ranks: number of ranks that are started together.
        others_may_join: whether other workers may join.

    Raises:
        ValueError: There are more ranks than expected workers, or other workers are needed and none may join.

    """
    if not others_may_join:
        check_minimum(min_workers, ranks, f"{_HOW_OTHERS_JOIN}, so that others may join")
    if expected_workers is None:
        return
    if expected_workers < ranks:
        raise ValueError(
            f"expected_workers={expected_workers}, but {ranks} ranks are started together; use at least {ranks}, or "
            "fewer devices"
        )
    if expected_workers > ranks and not others_may_join:
        raise ValueError(
            f"expected_workers={expected_workers} waits for {expected_workers - ranks} worker(s) that join, but "
            f"none can; {_HOW_OTHERS_JOIN}"
        )


def check_minimum(min_workers: int, workers: int, advice: str) -> None:
    """Check that as many workers can take part as training needs.

    Args:
        min_workers: fewest live workers with which training goes on.
        workers: most workers that can take part.
        advice: how more workers can take part.

    Raises:
        ValueError: ``min_workers`` is larger.

    """
    if min_workers > workers:
        raise ValueError(
            f"min_workers={min_workers} is larger than the {workers} worker(s) that can take part, so training would "
            f"be paused for ever; use at most {workers}, or {advice}"
        )


def check_no_process_group() -> None:
    """Check that no process group is left from another strategy's run in this process.

    Raises:
        RuntimeError: A default process group is open.

    """
    if torch.distributed.is_initialized():
        raise RuntimeError(
            "A default process group is already open, which makes Lightning run all ranks in lock-step. If the group "
            "is left from another strategy's run, call torch.distributed.destroy_process_group() before this fit."
        )


def check_callbacks(trainer: pl.Trainer, joins: bool = False) -> None:
    """Check the trainer's callbacks.

    Args:
        trainer: the trainer.
        joins: whether this worker joins a running training.

    Raises:
        ValueError: A callback cannot work with the strategy.

    """
    callbacks: list[object] = list(callbacks_of(trainer))
    for callback in callbacks:
        kind = type(callback)
        if kind.__module__.startswith("lightning_async_localsgd") and not isinstance(callback, Callback):
            package = "lightning_async_localsgd"
            path = package if Callback.__module__.startswith("lightning.pytorch") else f"{package}.pytorch_lightning"
            raise ValueError(
                f"{kind.__name__} is imported from {kind.__module__}, which belongs to Lightning's other package, so "
                f"this Trainer would ignore it; import {path}.{kind.__name__}"
            )
    if any(isinstance(callback, ModelPruning) for callback in callbacks):
        raise ValueError(
            "ModelPruning replaces the module's parameters during training, as each rank's local weights suggest, and "
            "the global model would not follow; with async_localsgd train first, then prune the trained model in a fit "
            "with another strategy"
        )
    if joins and any(isinstance(callback, LearningRateFinder) for callback in callbacks):
        raise ValueError(
            "LearningRateFinder has chosen this run's learning rate before this worker joined, so the worker cannot "
            "know it; to let workers rejoin, remove the callback and set the learning rate that it has found"
        )


def warn_if_rounded(layout: Layout, name: str) -> None:
    """Warn if parameters or buffers of the global model have more digits than an exchange transfers.

    Args:
        layout: the exchanged tensors.
        name: name of the strategy.

    """
    if any(spec.dtype == "torch.float64" for spec in layout.entries):
        rank_zero_warn(
            f"The global model of {name} is kept in fp32: fp64 parameters and buffers are rounded to fp32 at every "
            "exchange. Within a round they are trained in fp64."
        )


def check_simulated_callbacks(trainer: pl.Trainer) -> None:
    """Check the callbacks of a simulated run.

    Raises:
        ValueError: A callback would act on a single virtual worker.

    """
    if any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks_of(trainer)):
        raise ValueError(
            "StochasticWeightAveraging replaces the scheduler, but a simulated cluster has one scheduler for each "
            "worker; average with WeightAveraging, and set the schedule in configure_optimizers"
        )


def exchanges_frozen(trainer: pl.Trainer, options: ExchangeOptions) -> bool:
    """Return whether frozen parameters are exchanged like trainable ones, because they may become trainable."""
    return may_unfreeze(trainer) if options.frozen == "auto" else options.frozen
