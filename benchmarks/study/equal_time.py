"""Table G: what a user would use instead, each with the same time of the same devices.

Every run has a schedule of its own that ends with its time, so all of them are finished runs.
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import replace

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from benchmarks.study.bandwidth import packed_share
from benchmarks.study.cells import Cell, strategy_options
from benchmarks.study.results import TUNING_SEED, NotTunedError, Results
from benchmarks.study.variants import follow_progress
from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy

SECONDS = 1000.0
"""Time of the devices. The four devices of the paper take about 4,000 steps together, and the fastest one 1,724."""
BUDGETS = (0.3, 0.45, 0.6, 0.8)
"""Shares of :data:`SECONDS` of the runs that show how soon a method reaches a loss."""
INNER_LR = 1e-3
"""Learning rate that a user has chosen for one device: the best of the grid for the fastest device alone."""
LENGTHS = (1, 4, 20, 50)
"""Values of H."""
STARTS = (0, 1500)
"""Steps of the checkpoint from which training starts; 0 is random weights."""

_BASE = Cell("default", dynamic=True, grace="auto", steps=0, seconds=SECONDS, inner_lr=INNER_LR, moments=True)
DEFAULTS = replace(_BASE, local_steps="auto")
"""The strategy without any option."""
ALONE = replace(_BASE, method="alone", dynamic=False, grace=0.0, moments=False)
DDP = replace(ALONE, method="ddp")
_ASYNC = replace(_BASE, moments=False)


def alone(base: Cell) -> list[Cell]:
    """Return the runs of the fastest device alone, each with another learning rate."""
    return [replace(base, inner_lr=INNER_LR * factor) for factor in (0.5, 1.0, 2.0)]


def data_parallel(base: Cell) -> list[Cell]:
    """Return the runs of DDP: the learning rate of one device, times the root of k, and times k."""
    return [replace(base, inner_lr=INNER_LR * base.workers**power) for power in (0.0, 0.5, 1.0)]


def gains(base: Cell) -> list[Cell]:
    """Return async SGD with each push applied by 1/k, 1/sqrt(k) and as a whole."""
    values = (1.0 / base.workers, base.workers**-0.5, 1.0)
    return [replace(base, method="sgd", lr=round(lr, 3)) for lr in values]


def methods(base: Cell) -> list[Cell]:
    """Return all methods with rounds of a length."""
    sync = [replace(base, method="sync", grace=0.0, lr=lr) for lr in (0.2, 0.7)]
    return [
        replace(base, method="default", moments=True),
        *gains(base),
        *(replace(base, method="dn", lr=lr) for lr in (0.07, 0.2, 0.7)),
        *(replace(base, method="mla", lr=lr) for lr in (0.07, 0.2, 0.7)),
        *(replace(base, method="nesterov_half", lr=lr) for lr in (0.1, 0.3, 1.0)),
        *(replace(cell, dynamic=False) for cell in sync),
        *sync,
    ]


def core() -> list[Cell]:
    """Return the runs with four very unequal devices and a free exchange."""
    cells = []
    for warm_steps in STARTS:
        start = [*alone(ALONE), *data_parallel(DDP), DEFAULTS]
        start += [cell for length in LENGTHS for cell in methods(replace(_ASYNC, local_steps=length))]
        cells += [replace(cell, warm_steps=warm_steps) for cell in start]
    return cells


def budgets() -> list[Cell]:
    """Return the runs with less time."""
    compared = [
        DEFAULTS,
        *gains(replace(_ASYNC, local_steps=1))[1:2],
        replace(_ASYNC, method="sync", grace=0.0, lr=0.7),
    ]
    shorter = [replace(cell, seconds=SECONDS * share) for share in BUDGETS for cell in compared]
    return [replace(cell, warm_steps=warm_steps) for warm_steps in STARTS for cell in shorter]


VARIATIONS: dict[str, dict[str, object]] = {
    "k = 2": {"workers": 2, "level": "two"},
    "k = 8": {"workers": 8},
    "k = 16": {"workers": 16},
    "equal devices": {"level": "none"},
    "1 : 10": {"workers": 2, "level": "1:10"},
    "exchange of 1 %": {"exchange_seconds": 0.0029},
    "exchange of 10 %": {"exchange_seconds": 0.029},
    "exchange of 50 %": {"exchange_seconds": 0.145},
    "1.5 M": {"size": "1.5m"},
    "4 M": {"size": "4m"},
}
"""What each further group of rows changes. An exchange is two messages, relative to a step of the fastest device."""


def variation(name: str) -> list[Cell]:
    """Return the runs from random weights with one thing changed."""
    long = replace(_ASYNC, local_steps=20)
    base = [
        *data_parallel(replace(DDP, **VARIATIONS[name])),  # type: ignore[arg-type] # fields of the cell
        *gains(replace(_ASYNC, local_steps=1, **VARIATIONS[name])),  # type: ignore[arg-type]
        gains(replace(long, **VARIATIONS[name]))[1],  # type: ignore[arg-type]
    ]
    others = [ALONE, DEFAULTS, replace(_BASE, local_steps=20)]
    others += [replace(long, method="dn", lr=lr) for lr in (0.2, 0.7)]
    others += [replace(long, method="sync", grace=0.0, lr=lr) for lr in (0.2, 0.7)]
    cells = [replace(cell, **VARIATIONS[name]) for cell in others] + base  # type: ignore[arg-type]
    return [replace(cell, warm_steps=0) for cell in cells]


_SCRATCH = replace(DEFAULTS, warm_steps=0)
TRIALS: dict[str, Cell] = {
    "nothing": _SCRATCH,
    "no second moments": replace(_SCRATCH, moments=False),
    "no grace window": replace(_SCRATCH, grace=0.0),
    "whole pushes": replace(_SCRATCH, method="sgd", lr=1.0),
    "whole pushes, times 1/sqrt(1 + staleness)": replace(_SCRATCH, method="sgd_poly", lr=1.0),
    "mean of the pushes (1/k)": replace(_SCRATCH, method="sgd", lr=0.25),
    "momentum 0.9, the same movement": replace(_SCRATCH, method="dn", lr=0.2),
    "momentum 0.5 at every push, the same movement": replace(_SCRATCH, method="nesterov_half", lr=0.25),
    "average as momentum (MLA)": replace(_SCRATCH, method="mla", lr=0.26),
    "HeLoCo + MLA": replace(_SCRATCH, method="heloco_mla", lr=0.26),
    "momentum that grows to 0.9, the same movement": replace(_SCRATCH, method="dn_growing", lr=2.0),
    "pushes weighed by their samples": replace(_SCRATCH, weights="samples"),
    "synchronous beginning of 50 steps": replace(_SCRATCH, sync_warmup_steps=50),
    "synchronous beginning of 100 steps": replace(_SCRATCH, sync_warmup_steps=100),
    "H = 1, then 20": replace(_SCRATCH, early_local_steps=1, local_steps=20),
    "H = 20, then 1": replace(_SCRATCH, early_local_steps=20, local_steps=1),
}
"""Changes of the defaults that were tried, each alone. The movement of the model by k equal pushes is that of the
defaults, except where the name says otherwise."""

OVERSHOOTING: dict[str, Cell] = {
    "k = 4, H = 20": replace(_SCRATCH, local_steps=20),
    "k = 4, H = 50": replace(_SCRATCH, local_steps=50),
    "k = 16, H = auto": replace(_SCRATCH, workers=16),
    "k = 16, H = 20": replace(_SCRATCH, workers=16, local_steps=20),
}
"""Runs of the defaults that show from where on they need momentum."""


def without_momentum(cell: Cell) -> Cell:
    """Return the run in which each push moves the model by 1/sqrt(k) of it at once."""
    return replace(cell, method="sgd", lr=round(cell.workers**-0.5, 3))


TABLE_G: list[Cell] = list(
    dict.fromkeys(
        [
            *core(),
            *budgets(),
            *TRIALS.values(),
            *(run for cell in OVERSHOOTING.values() for run in (cell, without_momentum(cell))),
            *(cell for name in VARIATIONS for cell in variation(name)),
        ]
    )
)


def with_best_rates(results: Results, seed: int) -> list[Cell]:
    """Return the cells of the table that run with a seed.

    The first seed tries every learning rate. The others run the best rate of each method only, as far as the first seed
    has found it.
    """
    if seed == TUNING_SEED:
        return TABLE_G
    groups: dict[Cell, list[Cell]] = {}
    for cell in TABLE_G:
        # The methods whose rates were tried differ in nothing else.
        rated = cell.workers_apart
        groups.setdefault(replace(cell, lr=None) if rated else replace(cell, inner_lr=None), []).append(cell)
    best = []
    for group in groups.values():
        with contextlib.suppress(NotTunedError):
            best.append(results.best(group))
    return best


# ------------------------------------------------------------------------ steps


def steps_in(cell: Cell) -> int:
    """Return how many steps a cell takes in its time: optimizer steps alone and in DDP, else steps per worker."""
    assert cell.seconds is not None
    fastest, slowest, exchange = min(cell.seconds_per_step), max(cell.seconds_per_step), 2.0 * cell.exchange_seconds
    if cell.method == "alone":
        return max(1, math.floor(cell.seconds / fastest))
    if cell.method == "ddp":
        return max(1, math.floor(cell.seconds / (slowest + exchange)))
    timed = replace(cell, seconds=None, warm_steps=0, size="smoke", sync_warmup_steps=0)
    steps = 10 * int(cell.local_steps) if cell.method == "sync" else 500
    if cell.method == "sync" and cell.dynamic:
        # The first rounds, whose speeds are unknown, take longer than the others: a short run would not tell.
        steps = math.floor(cell.seconds * _steps_per_second(timed, steps))
    if cell.local_steps == "auto" and cell.link_seconds > 0.0:
        # H depends on the number of steps of the whole run.
        steps = math.floor(cell.seconds * _steps_per_second(timed, steps))
    if cell.sync_warmup_steps:
        # A part of the whole run, and not of a shorter one.
        steps = math.floor(cell.seconds * _steps_per_second(timed, steps))
        timed = replace(timed, sync_warmup_steps=cell.sync_warmup_steps)
    return max(1, math.floor(cell.seconds * _steps_per_second(timed, steps)))


@functools.cache
def _steps_per_second(cell: Cell, steps: int) -> float:
    """Measure the steps per worker and second in a run of a model with one parameter. Times do not depend on models."""
    strategy = SimulatedAsyncLocalSGDStrategy(
        cell.seconds_per_step,
        exchange_seconds=cell.exchange_seconds + packed_share(cell) * cell.link_seconds / 2.0,
        overlap=cell.overlap,
        **strategy_options(cell),
    )
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    follow_progress(strategy, trainer, cell.early_local_steps)
    trainer.fit(_OneParameter(), DataLoader(range(10**6), batch_size=1))  # type: ignore[arg-type] # a sequence of numbers
    assert strategy.virtual_seconds is not None
    return steps / strategy.virtual_seconds


class _OneParameter(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.weight**2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)
