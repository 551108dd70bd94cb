"""What the trainer was given besides the strategy and cannot work with it: refused by name, with the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.callbacks import LearningRateFinder, ModelPruning
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, FSDPPrecision, XLAPrecision

from lightning_async_localsgd.trainer_parts import callbacks_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.strategy import AsyncLocalSGDStrategy


def refuse_plugins(strategy: AsyncLocalSGDStrategy, start_method: str) -> None:
    """Looks at what the trainer has just given the strategy, the earliest moment to refuse.

    Args:
        strategy: the strategy.
        start_method: how its ranks are to be started.

    Raises:
        ValueError: an accelerator, a plugin or an option does not go together with the strategy.
        MisconfigurationException: nor does the interactive session.

    """
    name = strategy.strategy_name
    if isinstance(strategy.accelerator, MPSAccelerator):
        raise ValueError(
            f"accelerator={strategy.accelerator.name()!r} does not go together with strategy={name!r}: ranks have CPUs "
            "or CUDA devices; choose accelerator='cpu', or another strategy"
        )
    if _IS_INTERACTIVE and start_method == "popen":
        raise MisconfigurationException(
            f"strategy={name!r} runs the script again for every rank, and an interactive session has none; use "
            "strategy='async_localsgd_notebook'"
        )
    if strategy._layer_sync is not None and strategy.num_nodes * strategy.num_processes > 1:
        raise ValueError(
            "sync_batchnorm=True needs all ranks in every forward pass, but with async_localsgd ranks run at their "
            "own speed; use sync_batchnorm=False: running statistics are merged with the model"
        )
    if isinstance(strategy.precision_plugin, (FSDPPrecision, DeepSpeedPrecision, XLAPrecision)):
        plugin = type(strategy.precision_plugin).__name__
        raise ValueError(
            f"plugins={plugin} belongs to another strategy; with async_localsgd every rank holds the whole model: "
            "leave the plugin out and choose Trainer(precision=...)"
        )


def refuse_process_group() -> None:
    """Looks for a process group that another strategy's run in this process has left behind.

    Raises:
        RuntimeError: there is one.

    """
    if torch.distributed.is_initialized():
        raise RuntimeError(
            "there is a default process group already, and Lightning would put all ranks in lock-step with it; where "
            "it is from another strategy's run, call torch.distributed.destroy_process_group() before this fit"
        )


def refuse_callbacks(trainer: pl.Trainer) -> None:
    """Looks at the trainer's callbacks.

    Raises:
        ValueError: one of them cannot work.

    """
    if any(isinstance(callback, ModelPruning) for callback in callbacks_of(trainer)):
        raise ValueError(
            "ModelPruning puts other parameters into the module while it trains, as each rank's local weights suggest, "
            "and the global model would not follow; with async_localsgd train first and prune the trained model in a "
            "fit with another strategy"
        )


def refuse_search(trainer: pl.Trainer) -> None:
    """Looks at the callbacks of a worker that joins a training which runs already.

    Raises:
        ValueError: one of them has done, before training, what this worker had no part in.

    """
    if any(isinstance(callback, LearningRateFinder) for callback in callbacks_of(trainer)):
        raise ValueError(
            "LearningRateFinder has found this run's learning rate before a worker that joins later was there to learn "
            "it; to let workers rejoin, take the callback away and set the learning rate that it has found"
        )
