"""The training job that the tests of this folder run as real processes: ``python job.py OUT JSON``.

Every rank writes what it saw to ``OUT/rank_<n>.json``. With ``start_method="popen"`` the other ranks run this script
again, by Lightning's launcher. ``{"runs": {NAME: OPTIONS}}`` is several runs one after the other, in ``OUT/NAME``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, TensorDataset

from lightning_async_localsgd import AsyncLocalSGDCallback, AsyncLocalSGDStrategy, ExchangeOptions
from lightning_async_localsgd.faults import Fault, FaultInjection, FaultKind

SECONDS = (0.02, 0.03, 0.06, 0.16)
"""Least seconds of a local step, by rank: a factor of eight between the fastest and the slowest."""


class Regression(L.LightningModule):
    """A small regression with BatchNorm, a scheduler per step, and a note of everything that the tests ask about."""

    def __init__(
        self, out: str = ".", accumulate_manually: bool = False, width: int = 32, cosine: bool = False
    ) -> None:
        super().__init__()
        self.cosine = cosine
        self.out = Path(out)
        self.automatic_optimization = not accumulate_manually
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, width), torch.nn.BatchNorm1d(width), torch.nn.Tanh(), torch.nn.Linear(width, 1)
        )
        self.seen: dict[str, Any] = {"rates": [], "group": [], "validated": []}

    def loss(self, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.net(inputs), targets)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.seen["group"].append(torch.distributed.is_initialized())
        loss = self.loss(batch)
        self.log("train_loss", loss)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)
        self.log("ranks", float(self.trainer.global_rank), sync_dist=True)

    def test_step(self, batch: Any, index: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.seen["validated"].append(digest(self))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        total = int(self.trainer.estimated_stepping_batches)
        if self.cosine:
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5 + 0.5 * math.cos(math.pi * n / total))
        else:
            # It raises when it is stepped once too often. One more than the steps: it counts its own construction.
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=total + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def digest(module: torch.nn.Module) -> str:
    """Of every bit of the module's state."""
    state = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        state.update(name.encode())
        state.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def note(trainer: L.Trainer, module: Regression, **more: Any) -> None:
    """Writes down what this rank saw."""
    rank = trainer.global_rank
    (module.out / f"rank_{rank}.json").write_text(json.dumps({"rank": rank, **module.seen, **more}))


def dataset(samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, 8, generator=generator)
    return TensorDataset(inputs, (inputs[:, :1] * inputs[:, 1:2]).tanh() + 0.5 * inputs[:, 2:3])


def come_late(rendezvous: Any) -> None:
    """Rank 0 comes out of each broadcast when the others have long gone on, or ended."""
    broadcast = rendezvous.broadcast

    def late(*args: Any) -> Any:
        found = broadcast(*args)
        time.sleep(0.3)
        return found

    rendezvous.broadcast = late


class Pace(L.Callback):
    """Unequal ranks, and what is to happen to one of them at a step of its own."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.steps = 0
        self.batches = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.optimizers[0].register_step_post_hook(self.count)

    def count(self, *_: Any) -> None:
        self.steps += 1

    @property
    def life(self) -> int:
        """How often this worker, or the whole job, has been started again."""
        told = json.loads(os.environ.get("ASYNC_LOCALSGD_REJOIN", "{}"))
        return int(told.get("life", 0)) + int(os.environ.get("ASYNC_LOCALSGD_RESUME", "0"))

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.options.get("slow_end"):
            if trainer.global_rank == 1:
                time.sleep(1.0)
            if trainer.global_rank == 0:
                come_late(trainer.strategy._rendezvous)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        module.seen["steps"] = self.steps
        module.seen["global_step"] = trainer.global_step
        module.seen["digest"] = digest(module)
        module.seen["threads"] = [thread.name for thread in threading.enumerate()]
        note(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.batches += 1
        module.seen["rates"].append(trainer.optimizers[0].param_groups[0]["lr"])
        time.sleep(SECONDS[trainer.global_rank % len(SECONDS)])
        options = self.options
        until = options.get("until")
        if until is not None and trainer.global_rank == 0:
            totals = vars(trainer.strategy.phase.totals()[until["worker"]])
            trainer.should_stop |= all(totals[name] >= count for name, count in until.items() if name != "worker")
        if self.life >= options.get("lives", 1):
            return
        if trainer.global_rank == options.get("victim", -1) and self.batches == options.get("at_step"):
            if options["fate"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif options["fate"] == "raise":
                raise RuntimeError("a fault of this rank's own")
            elif options["fate"] == "run out of memory":
                torch.empty(1 << 55)
            elif options["fate"] == "stop":
                trainer.should_stop = True


def run(out: Path, options: dict[str, Any]) -> None:
    L.seed_everything(options.get("seed", 1), verbose=False)
    torch.set_num_threads(1)
    checkpoint = ModelCheckpoint(
        dirpath=out / "checkpoints",
        monitor="val_loss",
        save_last=True,
        save_top_k=1,
        every_n_train_steps=options.get("checkpoint_every"),
    )
    strategy = AsyncLocalSGDStrategy(
        local_steps=options.get("local_steps", 10),
        start_method=options.get("start_method", "popen"),
        exchange=ExchangeOptions(**options.get("exchange", {})),
        start_timeout=options.get("start_timeout", 60.0),
        **options.get("strategy", {}),
    )
    callbacks = [Pace(options), checkpoint, AsyncLocalSGDCallback(ledger=out / "ledger.jsonl")]
    if "faults" in options:
        faults = [Fault(**{**fault, "kind": FaultKind[fault["kind"]]}) for fault in options["faults"]]
        callbacks.append(FaultInjection(faults))
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=options.get("ranks", 2),
        logger=CSVLogger(out, name="", version=""),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=options.get("val_check_interval", 20),
        check_val_every_n_epoch=None,
        log_every_n_steps=5,
        default_root_dir=out,
        num_sanity_val_steps=options.get("sanity", 2),
        **options.get("trainer", {"max_steps": 60}),
    )
    manual = bool(options.get("manual"))
    width = 32 + (trainer.global_rank if options.get("unequal_models") else 0)
    module = Regression(str(out), accumulate_manually=manual, width=width, cosine=bool(options.get("cosine")))
    # Every rank begins with other weights, which the first dispatch replaces.
    torch.manual_seed(100 + trainer.global_rank)
    torch.nn.init.normal_(module.net[0].weight)
    train = DataLoader(dataset(640), batch_size=16, shuffle=True, num_workers=options.get("num_workers", 0))
    valid = DataLoader(dataset(64), batch_size=16)
    late = options.get("late")
    if late is not None and trainer.global_rank == late["rank"]:
        time.sleep(late["seconds"])

    trainer.fit(module, train, valid, ckpt_path=options.get("ckpt_path"))
    if options.get("evaluate"):
        more = {
            "validate": trainer.validate(module, valid, verbose=False)[0],
            "test": trainer.test(module, valid, verbose=False, ckpt_path="best", weights_only=True)[0],
            "group_after": torch.distributed.is_initialized(),
            "best": checkpoint.best_model_path,
        }
        note(trainer, module, **more)
    trainer.save_checkpoint(out / "after.ckpt")


if __name__ == "__main__":
    asked = json.loads(sys.argv[2])
    for name, options in asked.get("runs", {".": asked}).items():
        run(Path(sys.argv[1], name), options)
