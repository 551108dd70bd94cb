"""Records budgets, intervals and schedules of two ranks: ``python progress_job.py OUT [CASE...]``.

All cases run one after the other in the same processes. Each rank writes ``OUT/<case>_<rank>.json``, and the logger of
rank 0 writes ``OUT/<case>/metrics.csv``.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from lightning_async_localsgd import AsyncLocalSGDStrategy
from tests.lightning_models import PacedRegression, one_cycle, quiet_trainer

FAST, SLOW = 0.004, 0.02
"""Minimum seconds of a batch."""


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, float], lr_scheduler.LRScheduler]] = {
    "one_cycle": one_cycle,
    "warm_cosine": lambda optimizer, steps: lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1.0, (n + 1) / 10) * (0.55 + 0.45 * math.cos(math.pi * n / steps))
    ),
    "by_epoch": lambda optimizer, _: lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5),
    "every_five": lambda optimizer, _: lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.9),
    "several": lambda optimizer, _: lr_scheduler.ExponentialLR(optimizer, gamma=0.99),
}


class Model(PacedRegression):
    """Records learning rates and global steps of its rank, and the global steps at which it was validated."""

    def __init__(self, case: dict[str, Any]) -> None:
        seconds = [SLOW if rank == case.get("slow_rank", 1) else FAST for rank in (0, 1)]
        super().__init__(seconds, torch.nn.Linear(2, 1), lr=1.0, schedule=SCHEDULES.get(case.get("schedule", "")))
        self.case = case
        self.rates: list[list[float]] = []
        self.validated: list[int] = []
        self.shown: list[int] = []
        self.epochs = 0

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = super().training_step(batch, index)
        self.log("loss", loss)
        return 0.05 * loss  # The rates around 1 are easy to compare, and the run must not diverge with them.

    def on_train_batch_end(self, *_: Any) -> None:
        self.shown.append(self.trainer.global_step)
        self.rates.append([group["lr"] for optimizer in self.trainer.optimizers for group in optimizer.param_groups])
        if self.case.get("stop_at") == len(self.shown) and self.global_rank == self.case.get("stopper", 0):
            self.trainer.should_stop = True

    def on_validation_epoch_start(self) -> None:
        if not self.trainer.sanity_checking:
            time.sleep(self.case.get("validation_seconds", 0.0))

    def on_validation_epoch_end(self) -> None:
        self.validated.append(-1 if self.trainer.sanity_checking else self.trainer.global_step)

    def on_train_epoch_end(self) -> None:
        self.epochs += 1

    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()
        kind = self.case.get("schedule")
        if kind == "by_epoch":
            configured["lr_scheduler"]["interval"] = "epoch"
        if kind == "every_five":
            configured["lr_scheduler"]["frequency"] = 5
        if kind == "several":
            optimizer = configured["optimizer"]
            by_epoch = {"scheduler": lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5), "interval": "epoch"}
            return [optimizer], [configured["lr_scheduler"], by_epoch]
        return configured


CASES: dict[str, dict[str, Any]] = {
    "steps": {"trainer": {"max_steps": 40, "val_check_interval": 10, "check_val_every_n_epoch": None}},
    "steps_slow_zero": {
        "slow_rank": 0,
        "trainer": {"max_steps": 40, "val_check_interval": 10, "check_val_every_n_epoch": None},
    },
    "epochs": {"trainer": {"max_epochs": 3}},
    "epochs_slow_zero": {"slow_rank": 0, "trainer": {"max_epochs": 3}},
    "quarters": {"trainer": {"max_epochs": 2, "val_check_interval": 0.25}},
    "every_second_epoch": {"trainer": {"max_epochs": 4, "check_val_every_n_epoch": 2}},
    "within_epoch": {"trainer": {"max_epochs": 2, "val_check_interval": 5}},
    # During a validation, the other rank uses up whole epochs, and does not push in between.
    "busy_zero": {
        "validation_seconds": 0.3,
        "local_steps": 500,
        "trainer": {"max_epochs": 4, "val_check_interval": 0.5, "num_sanity_val_steps": 0},
    },
    "accumulated": {"trainer": {"max_epochs": 2, "accumulate_grad_batches": 4}},
    "time": {"trainer": {"max_time": {"seconds": 1}, "max_epochs": -1}},
    "stopped": {"stop_at": 6, "trainer": {"max_epochs": 5}},
    "stopped_elsewhere": {"stop_at": 3, "stopper": 1, "trainer": {"max_epochs": 5}},
    "min_steps": {"stop_at": 6, "trainer": {"max_steps": 60, "min_steps": 30}},
    "min_epochs": {"stop_at": 6, "trainer": {"max_epochs": 4, "min_epochs": 2}},
    # No rank completes a round, so the steps of other ranks remain estimates.
    "min_steps_elsewhere": {
        "stop_at": 6,
        "stopper": 1,
        "slow_rank": 0,
        "local_steps": 1000,
        "trainer": {"max_steps": 60, "min_steps": 30},
    },
    "min_epochs_elsewhere": {
        "stop_at": 6,
        "stopper": 1,
        "slow_rank": 0,
        "trainer": {"max_epochs": 4, "min_epochs": 2},
    },
    "limited_validation": {"trainer": {"max_epochs": 1, "limit_val_batches": 1, "num_sanity_val_steps": 0}},
    "anomaly": {"trainer": {"max_epochs": 1, "detect_anomaly": True}},
    "one_cycle": {"schedule": "one_cycle", "trainer": {"max_steps": 50}},
    "one_cycle_slow_zero": {"slow_rank": 0, "schedule": "one_cycle", "trainer": {"max_epochs": 2}},
    "warm_cosine": {"schedule": "warm_cosine", "trainer": {"max_steps": 60}},
    "by_epoch": {"schedule": "by_epoch", "trainer": {"max_epochs": 4}},
    "several": {"schedule": "several", "trainer": {"max_epochs": 2}},
    "every_five": {"schedule": "every_five", "trainer": {"max_steps": 30}},
}


def run(name: str, out: Path) -> None:
    case = CASES[name]
    L.seed_everything(3, verbose=False)
    checkpoint = ModelCheckpoint(
        dirpath=out / f"{name}_checkpoints", filename="{step}", every_n_train_steps=10, save_top_k=-1
    )
    trainer = quiet_trainer(
        AsyncLocalSGDStrategy(local_steps=case.get("local_steps", 5)),
        devices=2,
        logger=CSVLogger(out, name="", version=name),
        callbacks=[LearningRateMonitor(), checkpoint],
        log_every_n_steps=5,
        **{"num_sanity_val_steps": 1, **case["trainer"]},
    )
    model = Model(case)
    data = TensorDataset(torch.randn(80, 2), torch.zeros(80, 1))
    trainer.fit(model, DataLoader(data, batch_size=2, shuffle=True), DataLoader(data, batch_size=40))
    (out / f"{name}_{trainer.global_rank}.json").write_text(
        json.dumps(
            {
                "global_step": trainer.global_step,
                "current_epoch": trainer.current_epoch,
                "shown": model.shown,
                "rates": model.rates,
                "validated": model.validated,
                "epochs": model.epochs,
                "should_stop": trainer.should_stop,
                "intervals": [trainer.log_every_n_steps, trainer.max_steps, trainer.max_epochs],
            }
        )
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:] or CASES:
        run(name, Path(sys.argv[1]))
