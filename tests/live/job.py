"""A training run with options: ``python job.py OUT JSON``.

Each rank writes what it noted to ``OUT/rank_<n>.json``. With ``start_method="popen"``, Lightning's launcher runs this
script again for the other ranks. The JSON ``{"runs": {NAME: OPTIONS}}`` makes several runs, one after the other, in
``OUT/NAME``.
"""

from __future__ import annotations

import json
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

from lightning_async_localsgd import AsyncLocalSGDCallback, AsyncLocalSGDStrategy, DelayedNesterov, ExchangeOptions
from lightning_async_localsgd.faults import Fault, FaultInjection, FaultKind
from lightning_async_localsgd.server import line_file
from tests.lightning_models import (
    WEIGHTS_ONLY,
    Pace,
    Regression,
    cosine,
    digest,
    loader,
    network,
    one_cycle,
    quiet_trainer,
)

# The tests kill rank 0, and look for every push that was answered before.
line_file.BATCH_SECONDS = 0.0

SECONDS = (0.02, 0.03, 0.06, 0.16)
"""Minimum seconds of a local step, by rank. A step of the slowest takes eight times as long as one of the fastest."""


class Model(Regression):
    """A regression with BatchNorm and a schedule, which notes what the tests ask about.

    Args:
        out: folder of the notes.
        manual: whether to use manual optimization.
        width: width of the hidden layer.
        schedule: makes the schedule.

    """

    def __init__(self, out: str = ".", manual: bool = False, width: int = 32, schedule: Any = one_cycle) -> None:
        super().__init__(network(width, batch_norm=True), torch.optim.AdamW, 1e-2, schedule)
        self.out = Path(out)
        self.automatic_optimization = not manual
        self.seen: dict[str, Any] = {"rates": [], "group": [], "validated": []}

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.seen["group"].append(torch.distributed.is_initialized())
        loss = super().training_step(batch, index)
        self.log("train_loss", loss)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step(batch, index)
        self.log("ranks", float(self.trainer.global_rank), sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.seen["validated"].append(digest(self.state_dict()))


def note(trainer: L.Trainer, module: Model, **more: Any) -> None:
    """Write the notes of this rank."""
    rank = trainer.global_rank
    (module.out / f"rank_{rank}.json").write_text(json.dumps({"rank": rank, **module.seen, **more}))


def delay_broadcasts(rendezvous: Any) -> None:
    """Let each broadcast return on this rank long after it has returned on the others."""
    broadcast = rendezvous.broadcast

    def delayed(*args: Any) -> Any:
        result = broadcast(*args)
        time.sleep(0.3)
        return result

    rendezvous.broadcast = delayed


class Fate(Pace):
    """Gives ranks unequal speeds, and lets one of them fail at one of its steps.

    Args:
        options: options of the job: which rank fails, when and how, and when the run ends.

    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(SECONDS)
        self.options = options

    @property
    def life(self) -> int:
        """How often this worker, or the whole job, has been restarted."""
        rejoin = json.loads(os.environ.get("ASYNC_LOCALSGD_REJOIN", "{}"))
        return int(rejoin.get("restart_count", 0)) + int(os.environ.get("ASYNC_LOCALSGD_RESUME", "0"))

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.options.get("slow_end"):
            if trainer.global_rank == 1:
                time.sleep(1.0)
            if trainer.global_rank == 0:
                delay_broadcasts(trainer.strategy._rendezvous)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        module.seen["steps"] = self.steps
        module.seen["global_step"] = trainer.global_step
        module.seen["digest"] = digest(module.state_dict())
        module.seen["threads"] = [thread.name for thread in threading.enumerate()]
        note(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        module.seen["rates"].append(trainer.optimizers[0].param_groups[0]["lr"])
        super().on_train_batch_end(trainer, module)
        options = self.options
        until = options.get("until")
        if until is not None and trainer.global_rank == 0:
            totals = vars(trainer.strategy.runtime.totals()[until["worker"]])
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
    policies = options.get("strategy", {})
    strategy = AsyncLocalSGDStrategy(
        local_steps=options.get("local_steps", 10),
        outer_optimizer=None if "quorum" in policies else DelayedNesterov(),
        start_method=options.get("start_method", "popen"),
        exchange=ExchangeOptions(**{"start_timeout": 60.0, **options.get("exchange", {})}),
        **policies,
    )
    callbacks = [
        Fate(options),
        checkpoint,
        AsyncLocalSGDCallback(events=out / "events.jsonl", max_event_megabytes=None, per_worker=True),
    ]
    if "faults" in options:
        faults = [Fault(**{**fault, "kind": FaultKind[fault["kind"]]}) for fault in options["faults"]]
        callbacks.append(FaultInjection(faults))
    trainer = quiet_trainer(
        strategy,
        devices=options.get("ranks", 2),
        logger=CSVLogger(out, name="", version=""),
        callbacks=callbacks,
        val_check_interval=options.get("val_check_interval", 20),
        check_val_every_n_epoch=None,
        log_every_n_steps=5,
        default_root_dir=out,
        num_sanity_val_steps=options.get("sanity", 2),
        **options.get("trainer", {"max_steps": 60}),
    )
    schedule = cosine if options.get("cosine") else one_cycle
    width = 32 + (trainer.global_rank if options.get("unequal_models") else 0)
    module = Model(str(out), bool(options.get("manual")), width, schedule)
    # Each rank begins with other weights, which are replaced by the first dispatch.
    torch.manual_seed(100 + trainer.global_rank)
    torch.nn.init.normal_(module.net[0].weight)
    train = loader(640, batch_size=16, num_workers=options.get("num_workers", 0))
    valid = loader(64, batch_size=16, shuffle=False)
    late = options.get("late")
    if late is not None and trainer.global_rank == late["rank"]:
        time.sleep(late["seconds"])

    trainer.fit(module, train, valid, ckpt_path=options.get("ckpt_path"))
    if options.get("evaluate"):
        more = {
            "validate": trainer.validate(module, valid, verbose=False)[0],
            "test": trainer.test(module, valid, verbose=False, ckpt_path="best", **WEIGHTS_ONLY)[0],
            "group_after": torch.distributed.is_initialized(),
            "best": checkpoint.best_model_path,
        }
        note(trainer, module, **more)
    trainer.save_checkpoint(out / "after.ckpt")


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    for name, options in given.get("runs", {".": given}).items():
        run(Path(sys.argv[1], name), options)
