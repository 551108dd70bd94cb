"""What does not go together, with the strategy or among its options: refused by name, with the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.callbacks import Callback, LearningRateFinder, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, FSDPPrecision, XLAPrecision

from lightning_async_localsgd.merging import MergeOptions
from lightning_async_localsgd.staleness import Staleness
from lightning_async_localsgd.trainer_parts import callbacks_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.grace import GraceWindow
    from lightning_async_localsgd.outer import OuterOptimizer
    from lightning_async_localsgd.strategy import AsyncLocalSGDStrategy


def refuse_merging(
    quorum: int | Literal["all"],
    warmup_steps: int,
    staleness: Staleness | None,
    merge: MergeOptions,
    rule: OuterOptimizer,
    grace: GraceWindow,
    largest: float | Literal["auto"] | None,
) -> None:
    """Looks at how pushes are to be merged, as far as that can be told without the number of workers.

    Args:
        quorum: see :class:`.AsyncLocalSGDStrategy`, as the others.
        warmup_steps: likewise.
        staleness: likewise.
        merge: likewise.
        rule: its ``outer_optimizer``.
        grace: likewise.
        largest: its ``max_update_norm``.

    Raises:
        ValueError: an option is outside its range, does nothing, or does not go together with another one.
        TypeError: an option is something else than it must be.

    """
    if quorum != "all" and (type(quorum) is not int or quorum < 1):
        raise ValueError(
            f"quorum={quorum!r} must be a number of workers >= 1, or 'all'; 1 merges each push as it comes, 'all' is "
            "synchronous"
        )
    if type(warmup_steps) is not int or warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps!r} must be a number of steps per worker, 0 or more")
    if staleness is not None and not isinstance(staleness, Staleness):
        raise TypeError(
            f"staleness={staleness!r} is no staleness stage; use one of lightning_async_localsgd.staleness, such as "
            "Polynomial(power=0.5), or None"
        )
    if not isinstance(merge, MergeOptions):
        raise TypeError(f"merge={merge!r} must be a MergeOptions, such as MergeOptions(weights='samples'), or None")
    groups = quorum != 1
    if groups and rule.collects:
        raise ValueError(
            f"quorum={quorum!r} averages the pushes of a group, and outer_optimizer={rule!r} averages N pushes itself; "
            "use quorum=1 (warmup_steps gives it a synchronous beginning), or a rule that needs no N, such as "
            "lightning_async_localsgd.outer.Nesterov(lr=0.7, momentum=0.9)"
        )
    if warmup_steps and quorum == "all":
        raise ValueError(
            f"warmup_steps={warmup_steps} lets the quorum down from all workers, and with quorum='all' it stays there; "
            "use a smaller quorum, or warmup_steps=0"
        )
    if merge.quorum_seconds is not None and not (groups or warmup_steps):
        raise ValueError(
            f"merge.quorum_seconds={merge.quorum_seconds:g} limits how long pushes wait for a quorum, and with "
            "quorum=1 none waits; use quorum >= 2, quorum='all' or warmup_steps, or leave it out"
        )
    if merge.average != "mean" and (rule.collects or not (groups or warmup_steps)):
        reason = f"outer_optimizer={rule!r} averages pushes itself" if rule.collects else "with quorum=1 there are none"
        raise ValueError(
            f"merge.average={merge.average!r} averages the pushes of a group, but {reason}; use quorum >= 2 and a rule "
            "such as lightning_async_localsgd.outer.Nesterov(lr=0.7, momentum=0.9), or leave it out"
        )
    # Weights and stages may lengthen a push; what is as it was formed and that long is refused.
    as_formed = merge.weights == "equal" and staleness is None
    if merge.clip_norm is not None and isinstance(largest, float | int) and as_formed and merge.clip_norm >= largest:
        raise ValueError(
            f"merge.clip_norm={merge.clip_norm:g} shortens longer pushes, which max_update_norm={largest:g} refuses "
            "before; use a smaller clip_norm, or a larger max_update_norm"
        )
    if quorum == "all":
        _refuse_grace(grace, "quorum='all'")
    if quorum == "all" and merge.quorum_seconds is None:
        _refuse_staleness(staleness, "with quorum='all' and no merge.quorum_seconds")


def refuse_workers(
    workers: int,
    joinable: bool,
    quorum: int | Literal["all"],
    warmup_steps: int,
    staleness: Staleness | None,
    merge: MergeOptions,
    rule: OuterOptimizer,
    grace: GraceWindow,
) -> None:
    """Looks whether options fit the number of workers: the outer optimizer's, and how pushes are merged.

    Args:
        workers: that the run is started with.
        joinable: others may join while it goes on.
        quorum: see :func:`refuse_merging`, as the others.
        warmup_steps: likewise.
        staleness: likewise.
        merge: likewise.
        rule: likewise; of no use afterwards.
        grace: likewise.

    Raises:
        ValueError: they don't.

    """
    # Tried on a model of one parameter.
    rule.setup(torch.zeros(1), {"": torch.zeros(1)}, workers)
    if staleness is not None and staleness.needs_momentum and not _has_momentum(rule):
        raise ValueError(
            f"staleness={staleness!r} compares pushes with the outer momentum, and outer_optimizer={rule!r} has "
            "none; use a rule with a momentum > 0, such as DelayedNesterov(momentum=0.9), or another stage"
        )
    if quorum != "all" and quorum > workers:
        raise ValueError(
            f"quorum={quorum} is more than the {workers} worker(s) of this run; use at most {workers}, or 'all'"
        )
    alone = workers == 1 and not joinable
    if warmup_steps and (alone or quorum == workers > 1):
        raise ValueError(
            f"warmup_steps={warmup_steps} lets the quorum down from all {workers} worker(s) to {quorum}, which is no "
            "way down; use more workers, a smaller quorum, or warmup_steps=0"
        )
    if alone:
        _refuse_staleness(staleness, "with a single worker")
        if merge.weights != "equal":
            raise ValueError(
                f"merge.weights={merge.weights!r} weighs the pushes of workers against each other, and with a single "
                "worker there is nothing to weigh them against; leave it out, or use more workers"
            )
    if quorum == workers > 1 and not joinable:
        _refuse_grace(grace, f"quorum={quorum} of {workers} workers")
    if quorum == workers and merge.quorum_seconds is None and not joinable:
        _refuse_staleness(staleness, f"with quorum={quorum} of {workers} worker(s) and no merge.quorum_seconds")


def _has_momentum(rule: OuterOptimizer) -> bool:
    """Whether a rule that has been set up, and is of no use afterwards, uses a momentum."""
    try:
        rule.restart_momentum()
    except ValueError:
        return False
    return rule.momentum_buffer is not None


def _refuse_grace(grace: GraceWindow, quorum: str) -> None:
    if isinstance(grace.grace, float | int) and grace.grace > 0:
        raise ValueError(
            f"grace={grace.grace!r} waits for more workers than the quorum, and {quorum} waits for all of them; use a "
            "smaller quorum, or leave grace out"
        )


def _refuse_staleness(staleness: Staleness | None, reason: str) -> None:
    if staleness is not None:
        raise ValueError(
            f"staleness={staleness!r} is about pushes from older models, and {reason} there are none; leave it out"
        )


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
    callbacks: list[object] = list(callbacks_of(trainer))
    for callback in callbacks:
        kind = type(callback)
        if kind.__module__.startswith("lightning_async_localsgd") and not isinstance(callback, Callback):
            mine = "lightning_async_localsgd"
            path = mine if Callback.__module__.startswith("lightning.pytorch") else f"{mine}.pytorch_lightning"
            raise ValueError(
                f"{kind.__name__} is one of the callbacks of {kind.__module__}, which are not those of this Trainer's "
                f"package and would do nothing; import {path}.{kind.__name__}"
            )
    if any(isinstance(callback, ModelPruning) for callback in callbacks_of(trainer)):
        raise ValueError(
            "ModelPruning puts other parameters into the module while it trains, as each rank's local weights suggest, "
            "and the global model would not follow; with async_localsgd train first and prune the trained model in a "
            "fit with another strategy"
        )


def refuse_callbacks_of_one_worker(trainer: pl.Trainer) -> None:
    """Looks at the callbacks of a simulated run.

    Raises:
        ValueError: one of them would act on the worker alone whose turn it is.

    """
    if any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks_of(trainer)):
        raise ValueError(
            "StochasticWeightAveraging puts a scheduler of its own in the place of each worker's, which a simulated "
            "cluster has one of for each; average with WeightAveraging, and give the schedule in configure_optimizers"
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
