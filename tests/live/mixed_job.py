"""Ranks of unequal precision or devices: ``python mixed_job.py OUT JSON``. Each process writes ``OUT/rank_<n>.json``.

The options ``precision`` and ``accelerator`` have a value for each ``LOCAL_RANK``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchmetrics
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_async_localsgd import AsyncLocalSGDStrategy, ExchangeOptions
from lightning_async_localsgd.lightning.callback import SUMMARY_FILE
from tests.lightning_models import Regression, loader, quiet_trainer


class Model(Regression):
    """Has a frozen layer, statistics, and an optimizer with second moments.

    Args:
        kill: this rank kills itself at its tenth step, unless it was restarted. Training ends when it is back.

    """

    def __init__(self, kill: int | None) -> None:
        net = nn.Sequential(nn.Linear(8, 16).requires_grad_(False), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
        super().__init__(net, optimizer=torch.optim.AdamW, lr=0.01)
        self.kill = kill
        self.steps = 0
        self.auroc = torchmetrics.AUROC("binary")  # Keeps predictions in the dtype in which it gets them.
        self.backend = ""
        self.loss_dtype = ""

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.steps += 1
        if self.steps == 10 and self.global_rank == self.kill and "ASYNC_LOCALSGD_REJOIN" not in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.002)
        loss = super().training_step(batch, index)
        self.log("train_loss", loss)
        if self.kill is not None and self.trainer.is_global_zero:
            workers = self.trainer.strategy.runtime.totals()
            back = workers[self.kill].sessions > 1 and workers[self.kill].rounds > 3
            self.trainer.should_stop |= back and all(worker.rounds > 3 for worker in workers.values())
        return loss

    def test_step(self, batch: Any, index: int) -> None:
        loss = self.loss(batch)
        self.loss_dtype = str(loss.dtype)
        self.log("test_loss", loss, sync_dist=True, on_step=True, on_epoch=True)
        self.auroc(self.net(batch[0])[:, 0].sigmoid(), (batch[1][:, 0] > 0).int())
        self.log("auroc", self.auroc)
        gathered = self.all_gather(loss)
        assert gathered.dtype == loss.dtype
        self.log("gathered", gathered.float().mean())
        self.backend = torch.distributed.get_backend()


def run(out: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    L.seed_everything(0)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    precision = options["precision"][local_rank]
    accelerator = options["accelerator"][local_rank] if "accelerator" in options else "cpu"
    strategy = AsyncLocalSGDStrategy(
        local_steps=5, exchange=ExchangeOptions(**options.get("exchange", {})), **options.get("strategy", {})
    )
    saved = ModelCheckpoint(out / "saved", save_last=True, every_n_train_steps=20)
    trainer = quiet_trainer(
        strategy, devices=options.get("devices", len(options["precision"])), precision=precision,
        accelerator=accelerator, logger=CSVLogger(out, "", ""), callbacks=[saved], default_root_dir=out, max_epochs=-1,
        max_steps=options.get("max_steps", 60), val_check_interval=30, check_val_every_n_epoch=None,
        num_sanity_val_steps=1, **options.get("trainer", {}),
    )  # fmt: skip
    model = Model(options.get("kill"))
    held_out = loader(64, shuffle=False)
    trainer.fit(model, loader(512), held_out, ckpt_path=options.get("resumed"))
    found = {
        "state": {name: value.double().tolist() for name, value in model.state_dict().items()},
        "dtype": str(next(model.parameters()).dtype),
        "steps": model.steps,
    }
    if trainer.is_global_zero:
        found["summary"] = json.loads((out / SUMMARY_FILE).read_text())
    (out / f"rank_{trainer.global_rank}.json").write_text(json.dumps(found))
    if options.get("tests"):
        trainer.test(model, held_out, verbose=False)
        found |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        found |= {"backend": model.backend, "loss_dtype": model.loss_dtype}
        (out / f"rank_{trainer.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run(Path(sys.argv[1]), json.loads(sys.argv[2]))
