"""What budgets, intervals and schedules came to on every rank, for the cases of ``test_progress.py``.

``python progress_job.py OUT JSON`` runs all cases one after the other in one set of processes; every rank writes
``OUT/<case>_<rank>.json``, and rank 0's logger ``OUT/<case>/metrics.csv``.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from lightning_async_localsgd import AsyncLocalSGDStrategy

FAST, SLOW = 0.004, 0.02
"""Least seconds of a batch."""


class Model(L.LightningModule):
    """Notes its rank's learning rates by global step, and at which global steps rank 0 validated."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        self.case = case
        self.layer = torch.nn.Linear(2, 1)
        self.rates: list[list[float]] = []
        self.validated: list[int] = []
        self.shown: list[int] = []
        self.epochs = 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        slow = self.case.get("slow_rank", 1)
        time.sleep(SLOW if self.global_rank == slow else FAST)
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.shown.append(self.trainer.global_step)
        self.rates.append([group["lr"] for optimizer in self.trainer.optimizers for group in optimizer.param_groups])
        if self.case.get("stop_at") == len(self.shown) and self.global_rank == self.case.get("stopper", 0):
            self.trainer.should_stop = True

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.layer(batch[0]).mean())

    def on_validation_epoch_end(self) -> None:
        self.validated.append(-1 if self.trainer.sanity_checking else self.trainer.global_step)

    def on_train_epoch_end(self) -> None:
        self.epochs += 1

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        kind = self.case.get("schedule")
        total = self.trainer.estimated_stepping_batches
        if kind is None:
            return optimizer
        schedules: dict[str, Any] = {
            "one_cycle": lambda: lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=int(total) + 1),
            "warm_cosine": lambda: lr_scheduler.LambdaLR(
                optimizer, lambda n: min(1.0, (n + 1) / 10) * (0.55 + 0.45 * math.cos(math.pi * n / total))
            ),
            "by_epoch": lambda: lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5),
            "every_five": lambda: lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.9),
            "several": lambda: lr_scheduler.ExponentialLR(optimizer, gamma=0.99),
        }
        config = {"scheduler": schedules[kind](), "interval": "step"}
        if kind == "by_epoch":
            config["interval"] = "epoch"
        if kind == "every_five":
            config["frequency"] = 5
        if kind == "several":
            by_epoch = {"scheduler": lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5), "interval": "epoch"}
            return [optimizer], [config, by_epoch]
        return {"optimizer": optimizer, "lr_scheduler": config}


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
    "accumulated": {"trainer": {"max_epochs": 2, "accumulate_grad_batches": 4}},
    "time": {"trainer": {"max_time": {"seconds": 1}, "max_epochs": -1}},
    "stopped": {"stop_at": 6, "trainer": {"max_epochs": 5}},
    "stopped_elsewhere": {"stop_at": 3, "stopper": 1, "trainer": {"max_epochs": 5}},
    "min_steps": {"stop_at": 6, "trainer": {"max_steps": 60, "min_steps": 30}},
    "min_epochs": {"stop_at": 6, "trainer": {"max_epochs": 4, "min_epochs": 2}},
    # Rounds that nobody comes to the end of: what other ranks take is an estimate for long.
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
    trainer = L.Trainer(
        strategy=AsyncLocalSGDStrategy(local_steps=case.get("local_steps", 5)),
        accelerator="cpu",
        devices=2,
        logger=CSVLogger(out, name="", version=name),
        callbacks=[LearningRateMonitor(), checkpoint],
        log_every_n_steps=5,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"num_sanity_val_steps": 1, **case["trainer"]},
    )
    model = Model(case)
    data = TensorDataset(torch.randn(80, 2))
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
    for one in json.loads(sys.argv[2]).get("cases", CASES):
        run(one, Path(sys.argv[1]))
