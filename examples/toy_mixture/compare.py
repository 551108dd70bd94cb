"""Train the classifier with each method on a simulated cluster, and print the results.

The cluster has the four devices of arXiv 2401.09135, with 0.58, 0.75, 1.51 and 3.33 seconds per step. All methods take
the same number of local steps, summed over the workers, with the same data and the same initial weights::

    python examples/toy_mixture/compare.py                                  # all methods, two seeds
    python examples/toy_mixture/compare.py --outer-lrs 0.2 0.4 0.7 1.0      # all methods with each learning rate
    python examples/toy_mixture/compare.py --figure toy.png                 # plots the curves, too

The output is one JSON line for each run, and a table of means and standard deviations over the seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from classifier import Classifier
from mixture import MixtureData

from lightning_async_localsgd import AsyncLocalSGDCallback, SimulatedAsyncLocalSGDStrategy
from lightning_async_localsgd.outer import SGD, DelayedNesterov, Nesterov, OuterOptimizer
from lightning_async_localsgd.simulation.runtime import SimulatedRuntime

SECONDS_PER_STEP = (0.58, 0.75, 1.51, 3.33)
MOMENTUM = 0.9


@dataclass(frozen=True)
class Method:
    """An outer optimizer and options of the strategy.

    Args:
        outer_optimizer: function that makes the outer optimizer from its learning rate.
        outer_lr: learning rate of the outer optimizer, the best value of the grid in the README.
        options: further options of the strategy.

    """

    outer_optimizer: Callable[[float], OuterOptimizer]
    outer_lr: float
    options: dict[str, Any]


def _nesterov(lr: float) -> OuterOptimizer:
    return Nesterov(lr=lr, momentum=MOMENTUM)


def _delayed_nesterov(lr: float) -> OuterOptimizer:
    return DelayedNesterov(lr=lr, momentum=MOMENTUM)


_SYNC: dict[str, Any] = {"quorum": "all", "dynamic_local_steps": False, "grace": 0.0}
_ASYNC: dict[str, Any] = {"dynamic_local_steps": False, "grace": 0.0}

METHODS = {
    "sync Nesterov": Method(_nesterov, 0.7, _SYNC),
    "async Nesterov": Method(_nesterov, 0.05, _ASYNC),
    "sync SGD": Method(SGD, 1.0, _SYNC),
    "async SGD": Method(SGD, 0.4, _ASYNC),
    "DN": Method(_delayed_nesterov, 0.7, _ASYNC),
    "DN+DyLU+grace": Method(_delayed_nesterov, 0.7, {"dynamic_local_steps": True, "grace": "auto"}),
}


@dataclass(frozen=True)
class Settings:
    """Settings that all runs share.

    Args:
        max_steps: local steps per worker. The budget of the run is this number times the number of workers.
        local_steps: H, the local steps in a round of the fastest worker.
        width: size of the classifier's hidden layers.
        validations: number of validations of the global model, at equal distances and the last one at the end.

    """

    max_steps: int = 1200
    local_steps: int = 20
    width: int = 32
    validations: int = 20


@dataclass(frozen=True)
class Run:
    """Results of one run.

    Args:
        method: name of the method.
        outer_lr: learning rate of the outer optimizer.
        seed: seed of the data, the weights and the order of the batches.
        curve: local steps of all workers, virtual seconds and validation loss, for each validation.
        final_loss: last loss of the curve.
        mean_loss: mean of the losses of the curve. It is lower if the model learns faster.
        accuracy: accuracy of the final model.
        best_loss: loss of the optimal classifier.
        virtual_seconds: duration of the training.
        staleness: mean over all pushes.

    """

    method: str
    outer_lr: float
    seed: int
    curve: list[tuple[int, float, float]]
    final_loss: float
    mean_loss: float
    accuracy: float
    best_loss: float
    virtual_seconds: float
    staleness: float


class Curve(pl.Callback):
    """Records every validation of the global model, the last of which is that of the final model."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float, float]] = []
        self.seconds = 0.0
        self.staleness = 0.0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        runtime = _runtime_of(trainer)
        steps = trainer.global_step * runtime.workers
        self.points.append((steps, runtime.virtual_seconds, float(trainer.callback_metrics["val/loss"])))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        runtime = _runtime_of(trainer)
        totals = runtime.totals().values()
        self.seconds = runtime.virtual_seconds
        self.staleness = sum(worker.staleness for worker in totals) / sum(worker.rounds for worker in totals)


def _runtime_of(trainer: pl.Trainer) -> SimulatedRuntime:
    strategy = trainer.strategy
    assert isinstance(strategy, SimulatedAsyncLocalSGDStrategy)
    runtime = strategy.runtime
    assert isinstance(runtime, SimulatedRuntime)
    return runtime


def train(name: str, outer_lr: float, seed: int, settings: Settings) -> Run:
    """Train the classifier with one method."""
    pl.seed_everything(seed, verbose=False)
    workers = len(SECONDS_PER_STEP)
    method = METHODS[name]
    strategy = SimulatedAsyncLocalSGDStrategy(
        seconds_per_step=SECONDS_PER_STEP,
        local_steps=settings.local_steps,
        outer_optimizer=method.outer_optimizer(outer_lr),
        checkpoint_every=None,
        **method.options,
    )
    curve = Curve()
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_steps=settings.max_steps,
        val_check_interval=settings.max_steps // settings.validations,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[AsyncLocalSGDCallback(table=False), curve],
    )
    data = MixtureData(train_batches=settings.max_steps * workers, seed=seed)
    trainer.fit(Classifier(width=settings.width), data)
    losses = [loss for _, _, loss in curve.points]
    return Run(
        method=name,
        outer_lr=outer_lr,
        seed=seed,
        curve=curve.points,
        final_loss=losses[-1],
        mean_loss=statistics.fmean(losses),
        accuracy=float(trainer.callback_metrics["val/accuracy"]),
        best_loss=data.best_loss,
        virtual_seconds=curve.seconds,
        staleness=curve.staleness,
    )


def _prepare() -> None:
    """Set up a process for many short runs in parallel with other processes."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")


def compare(
    methods: Iterable[str], seeds: Iterable[int], settings: Settings, outer_lrs: Iterable[float] | None, jobs: int
) -> Iterator[Run]:
    """Train with each method, learning rate and seed, and yield the results in this order.

    Args:
        methods: names of methods.
        seeds: seeds of the runs.
        settings: settings of all runs.
        outer_lrs: learning rates for each method, or None for the method's own.
        jobs: number of processes.

    """
    seeds = list(seeds)
    runs = [
        (name, lr, seed)
        for name in methods
        for lr in ([METHODS[name].outer_lr] if outer_lrs is None else outer_lrs)
        for seed in seeds
    ]
    with ProcessPoolExecutor(jobs, get_context("spawn"), _prepare) as pool:
        yield from pool.map(train, *zip(*runs, strict=True), itertools.repeat(settings))


def table(runs: Iterable[Run]) -> str:
    """Return a table with means and standard deviations over the seeds, for each method and learning rate."""
    groups: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.method, run.outer_lr), []).append(run)
    lines = [
        f"{'method':16}{'outer lr':>9}{'seeds':>7}{'mean loss':>17}{'final loss':>17}{'accuracy':>10}{'staleness':>11}"
        f"{'virtual s':>11}"
    ]
    for (method, lr), group in groups.items():
        lines.append(
            f"{method:16}{lr:9g}{len(group):7}{_spread([run.mean_loss for run in group]):>17}"
            f"{_spread([run.final_loss for run in group]):>17}"
            f"{statistics.fmean(run.accuracy for run in group):10.1%}"
            f"{statistics.fmean(run.staleness for run in group):11.2f}"
            f"{statistics.fmean(run.virtual_seconds for run in group):11.0f}"
        )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    deviation = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, train, and print and plot the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all methods")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="seeds of data, weights and batch order")
    parser.add_argument("--outer-lrs", nargs="+", type=float, help="learning rates instead of each method's own")
    parser.add_argument("--max-steps", type=int, default=Settings.max_steps, help="local steps per worker")
    parser.add_argument("--local-steps", type=int, default=Settings.local_steps, help="H, steps of the longest round")
    parser.add_argument("--width", type=int, default=Settings.width, help="size of the classifier's hidden layers")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="number of runs in parallel")
    parser.add_argument("--figure", type=Path, help="image file for a plot of the curves; needs matplotlib")
    args = parser.parse_args(arguments)
    settings = Settings(args.max_steps, args.local_steps, args.width)
    if settings.max_steps < 1 or settings.max_steps % settings.validations:
        parser.error(
            f"--max-steps {settings.max_steps} must be a multiple of {settings.validations}, the number of validations"
        )
    for option, value in (("--local-steps", args.local_steps), ("--width", args.width), ("--jobs", args.jobs)):
        if value < 1:
            parser.error(f"{option} {value} must be at least 1")
    if args.figure is not None:
        from figure import draw  # Imported here, so that a missing matplotlib is reported before the runs.
    runs = []
    for run in compare(args.methods, args.seeds, settings, args.outer_lrs, args.jobs):
        runs.append(run)
        print(json.dumps(asdict(run)), flush=True)
    print(table(runs))
    if args.figure is not None:
        args.figure.parent.mkdir(parents=True, exist_ok=True)
        draw(runs).savefig(args.figure)


if __name__ == "__main__":
    main()
