"""Runs with Lightning's callbacks, loggers and profilers: ``python callbacks_job.py OUT NAME...``.

There are two ranks. A step of rank 1 takes four times as long. Each rank writes what it noted to ``OUT/rank_<n>.json``,
by the name of the run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler
from lightning.pytorch.tuner import Tuner

from lightning_async_localsgd import AsyncLocalSGDCallback, AsyncLocalSGDStrategy, ExchangeOptions
from tests.lightning_models import WEIGHTS_ONLY, PacedRegression, digest, line_loader, quiet_trainer

SECONDS = (0.004, 0.016)
"""Minimum seconds of a local step, by rank."""


class Paced(PacedRegression):
    """A backbone and a head, on ranks of unequal speed. The metric ``worse`` rises with each validation."""

    def __init__(self, lr: float = 0.01) -> None:
        backbone = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.BatchNorm1d(4))
        super().__init__(SECONDS, torch.nn.Sequential(backbone, torch.nn.Linear(4, 1)), lr=lr, schedule=decay)
        self.validations = 0
        self.steps = 0
        self.patience = -1
        self.folder = ""

    @property
    def backbone(self) -> torch.nn.Module:
        return self.net[0]

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = super().training_step(batch, index)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.steps += 1

    def on_train_epoch_start(self) -> None:
        stopping, checkpoint = self.trainer.early_stopping_callback, self.trainer.checkpoint_callback
        self.patience = -1 if stopping is None else stopping.patience
        self.folder = "" if checkpoint is None else str(checkpoint.dirpath)

    def on_validation_epoch_end(self) -> None:
        self.validations += 1
        self.log("worse", float(self.validations))


def decay(optimizer: torch.optim.Optimizer, steps: float) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)


def trainer(out: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """Return a trainer that validates every ten steps of the run."""
    defaults: dict[str, Any] = {
        "num_sanity_val_steps": 0,
        "limit_val_batches": 2,
        "check_val_every_n_epoch": None,
        "val_check_interval": 10,
        "max_epochs": -1,
    }
    return quiet_trainer(
        AsyncLocalSGDStrategy(local_steps=5, exchange=ExchangeOptions(start_timeout=120.0)),
        devices=len(SECONDS),
        default_root_dir=out,
        callbacks=list(callbacks),
        **{**defaults, **options},
    )


def fit(run: L.Trainer, module: Paced, samples: int = 400) -> dict[str, Any]:
    """Train, and return the notes that all runs have in common."""
    run.fit(module, line_loader(samples), line_loader(16))
    return {"digest": digest(module.state_dict()), "steps": module.steps, "state": str(run.state.status.value)}


def early_stopping(out: Path) -> dict[str, Any]:
    stopping = EarlyStopping("worse", patience=2)
    module = Paced()
    noted = fit(trainer(out, stopping, max_steps=100_000), module)
    seen = {"patience": module.patience, "best": float(stopping.best_score)}
    return {**noted, **seen, "waited": stopping.wait_count}


def early_stopping_on_training(out: Path) -> dict[str, Any]:
    # The mean of an epoch never falls by that much.
    stopping = EarlyStopping("train_loss_epoch", patience=1, min_delta=1e6, check_on_train_epoch_end=True)
    noted = fit(trainer(out, stopping, max_epochs=1000, limit_val_batches=0), Paced(), samples=80)
    return {**noted, "waited": stopping.wait_count}


class Listed(ModelCheckpoint):
    """Keeps a state of its own for each directory."""

    @property
    def state_key(self) -> str:
        return f"{super().state_key}{self.dirpath}"


def checkpoints(out: Path) -> dict[str, Any]:
    best = Listed(out / "best", "{step}", monitor="worse", mode="max", save_top_k=2, save_last=True)
    steps = Listed(out / "steps", "{step}", every_n_train_steps=10, save_top_k=-1)
    times = Listed(out / "times", "{step}", train_time_interval=timedelta(seconds=0.1), save_top_k=-1)
    training = Listed(out / "training", "{epoch}", monitor="train_loss_epoch", save_on_train_epoch_end=True)
    run = trainer(out, best, steps, times, training, max_steps=60)
    module = Paced()
    noted = fit(run, module, samples=160)
    # The best model was saved before the end of its epoch, and loading it restores the callbacks of that moment.
    training_path = training.best_model_path
    tested = run.validate(ckpt_path="best", dataloaders=line_loader(16), verbose=False, **WEIGHTS_ONLY)[0]
    score = best.best_model_score
    return {
        **noted,
        "best": best.best_model_path,
        "score": None if score is None else float(score),
        "last": best.last_model_path,
        "top": {Path(path).name: float(score) for path, score in best.best_k_models.items()},
        "training": training_path,
        "folder": module.folder,
        "validated": tested,
    }


def timer_of_one_rank(out: Path) -> dict[str, Any]:
    rank = L.pytorch.utilities.rank_zero_only.rank
    timer = Timer(timedelta(seconds=0.3 if rank == 1 else 600))
    noted = fit(trainer(out, timer), Paced())
    return {**noted, "elapsed": timer.time_elapsed("train")}


def max_time(out: Path) -> dict[str, Any]:
    return fit(trainer(out, max_time={"milliseconds": 300}), Paced())


class StopOn(L.Callback):
    """Sets ``should_stop`` on one rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == self.rank and trainer.fit_loop.total_batch_idx >= 6:
            trainer.should_stop = True


def should_stop_on_rank_0(out: Path) -> dict[str, Any]:
    return fit(trainer(out, StopOn(0), max_steps=100_000), Paced())


def should_stop_on_rank_1(out: Path) -> dict[str, Any]:
    return fit(trainer(out, StopOn(1), max_steps=100_000), Paced())


def monitors(out: Path) -> dict[str, Any]:
    rates = LearningRateMonitor(logging_interval="step", log_momentum=True)
    loggers = [CSVLogger(out, name="csv"), TensorBoardLogger(str(out), name="board")]
    run = trainer(
        out, rates, DeviceStatsMonitor(cpu_stats=True), TQDMProgressBar(refresh_rate=5), SpikeDetection(warmup=1000),
        max_steps=40, logger=loggers, log_every_n_steps=5, enable_progress_bar=True, enable_model_summary=True,
    )  # fmt: skip
    noted = fit(run, Paced())
    return {
        **noted,
        "rates": len(next(iter(rates.lrs.values()))),
        "log_dir": run.log_dir,
        "version": loggers[0].version,
    }


def rich_bar(out: Path) -> dict[str, Any]:
    run = trainer(out, RichProgressBar(), max_steps=20, enable_progress_bar=True, enable_model_summary=True)
    return fit(run, Paced())


class Accumulated(L.Callback):
    """Records the number of accumulated batches, for each batch."""

    def __init__(self) -> None:
        self.factors: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.factors.append(trainer.accumulate_grad_batches)


class Validated(L.Callback):
    """Records the global steps at which a rank validated."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.steps.append(trainer.global_step)


def reporters(out: Path) -> dict[str, Any]:
    """Train with two reporting callbacks, neither of which comes first."""
    given = [
        Validated(),
        AsyncLocalSGDCallback(events=out / "events.jsonl", table=False),
        Accumulated(),
        AsyncLocalSGDCallback(recording=out / "recording.jsonl"),
    ]
    run = trainer(out, *given, max_steps=24, val_check_interval=4, logger=CSVLogger(out), log_every_n_steps=4)
    noted = fit(run, Paced())
    return {**noted, "validated": given[0].steps, "order_kept": run.callbacks == given}


def accumulation(out: Path) -> dict[str, Any]:
    seen = Accumulated()
    run = trainer(out, GradientAccumulationScheduler({0: 1, 1: 2}), seen, max_epochs=3)
    return {**fit(run, Paced(), samples=160), "factors": sorted(set(seen.factors)), "batches": len(seen.factors)}


def finetuning(out: Path) -> dict[str, Any]:
    module = Paced()
    before = module.backbone[0].weight.detach().clone()
    run = trainer(out, BackboneFinetuning(unfreeze_backbone_at_epoch=1), max_epochs=3)
    noted = fit(run, module, samples=160)
    return {
        **noted,
        "trainable": all(parameter.requires_grad for parameter in module.backbone.parameters()),
        "moved": not torch.equal(before, module.backbone[0].weight.detach()),
        "groups": len(run.optimizers[0].param_groups),
    }


def rate_finder(out: Path) -> dict[str, Any]:
    module = Paced(lr=1e-3)
    finder = LearningRateFinder(min_lr=1e-4, max_lr=0.1, num_training_steps=20)
    noted = fit(trainer(out, finder, max_steps=20), module)
    assert finder.optimal_lr is not None
    return {**noted, "lr": module.lr, "tried": len(finder.optimal_lr.results["lr"])}


def tuner(out: Path) -> dict[str, Any]:
    module = Paced(lr=1e-3)
    run = trainer(out, max_steps=20)
    found = Tuner(run).lr_find(module, line_loader(400), line_loader(16), min_lr=1e-4, max_lr=0.1, num_training=20)
    assert found is not None
    steps = module.steps
    return {**fit(run, module), "lr": module.lr, "tried": len(found.results["lr"]), "sweep": steps}


def profilers(out: Path) -> dict[str, Any]:
    fit(trainer(out, max_steps=10, profiler=SimpleProfiler(str(out), "simple")), Paced())
    return fit(trainer(out, max_steps=10, profiler=AdvancedProfiler(str(out), "advanced")), Paced())


class Fails(L.Callback):
    """Raises an exception on one rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.batches = 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.batches += 1
        if trainer.global_rank == self.rank and self.batches == 8:
            raise RuntimeError(f"a fault of rank {self.rank}'s own")


def failing(out: Path, rank: int) -> dict[str, Any]:
    saved = ModelCheckpoint(out / "saved", "{step}", monitor="worse", save_on_exception=True)
    on_exception = OnExceptionCheckpoint(out / "exception", "fallen")
    return fit(trainer(out, saved, on_exception, Fails(rank), max_steps=40), Paced())


RUNS: dict[str, Callable[[Path], dict[str, Any]]] = {
    run.__name__: run
    for run in (
        early_stopping, early_stopping_on_training, checkpoints, timer_of_one_rank, max_time, should_stop_on_rank_0,
        should_stop_on_rank_1, monitors, rich_bar, reporters, accumulation, finetuning, rate_finder, tuner, profilers,
    )
}  # fmt: skip
RUNS["failing_0"] = lambda out: failing(out, 0)
RUNS["failing_1"] = lambda out: failing(out, 1)


def main(out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    noted = {}
    for name in names:
        L.seed_everything(1, verbose=False)
        noted[name] = RUNS[name](out / name)
    rank = L.pytorch.utilities.rank_zero_only.rank
    (out / f"rank_{rank}.json").write_text(json.dumps(noted))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
