"""Calls of a Trainer that is launched in many ways: ``python launching_job.py OUT JSON``.

Each rank appends a line of JSON to ``OUT/rank_<n>.jsonl`` at the end of each call. The option ``"cli"`` is a command
line for LightningCLI.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

if "interactive" in json.loads(sys.argv[2]):
    sys.ps1 = ">>> "  # Lightning recognizes a notebook by this, at its import.

import lightning as L
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from lightning_async_localsgd import AsyncLocalSGDStrategy, ExchangeOptions
from lightning_async_localsgd.faults import Fault, FaultInjection, FaultKind
from tests.lightning_models import Pace, Regression, digest, loader, quiet_trainer

SECONDS = (0.01, 0.04)
"""Minimum seconds of a local step, for even and odd ranks."""


RANK_VARIABLES = ("RANK", "GLOBAL_RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""From these, data libraries learn which part of the data a process reads."""


class Model(Regression):
    """A linear regression, which logs its rank in validation and test."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(8, 1))

    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step(batch, index)
        self.log("rank", float(self.trainer.global_rank), sync_dist=True)

    def test_step(self, batch: Any, index: int) -> None:
        self.log("rank", float(self.trainer.global_rank), sync_dist=True)


class Data(L.LightningDataModule):
    """Sixteen batches for training, and four for everything else.

    Args:
        processes: processes of the training loader of each rank, which then has many batches.

    """

    def __init__(self, processes: int = 0) -> None:
        super().__init__()
        self.processes = processes

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(10_000 if self.processes else 64, batch_size=4, num_workers=self.processes)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(16, batch_size=4, shuffle=False)

    test_dataloader = predict_dataloader = val_dataloader


def is_restarted() -> bool:
    """Return whether this process was restarted, alone or with the whole job."""
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", os.environ.get("SLURM_RESTART_COUNT", "0"))
    return "ASYNC_LOCALSGD_REJOIN" in os.environ or "ASYNC_LOCALSGD_RESUME" in os.environ or restarts != "0"


class SlowValidation(L.Callback):
    """Makes each validation batch take long."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        (self.out / "validating").touch()
        time.sleep(1.0)


class SlowBoot(L.Callback):
    """Makes a restarted process take long before it joins."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def setup(self, *_: Any, **__: Any) -> None:
        if is_restarted():
            (self.out / "booting").touch()
            time.sleep(120)


class Notice(logging.Handler):
    """Creates a file when a text is logged.

    Args:
        text: part of the text.
        file: the file.

    """

    def __init__(self, text: str, file: Path) -> None:
        super().__init__()
        self.text = text
        self.file = file

    def emit(self, record: logging.LogRecord) -> None:
        if self.text in record.getMessage():
            self.file.touch()


class Notes(Pace):
    """Gives ranks unequal speeds, lets one of them fail if requested, and writes what the rank observed.

    Args:
        out: folder of the notes.
        fail: which rank raises an exception, or kills itself, after which step.
        awaited: training ends when pushes of this worker are merged again after its restart.

    """

    def __init__(self, out: str, fail: dict[str, int] | None = None, awaited: int | None = None) -> None:
        super().__init__(SECONDS)
        self.out = Path(out)
        self.fail = fail
        self.awaited = awaited
        self.predicted = 0
        self.group = False
        self.address: list[Any] = []
        self.environment: list[str | None] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.group |= torch.distributed.is_initialized()
        if self.batches == 0:
            self.address = address(trainer)
            self.environment = [os.environ.get(name) for name in RANK_VARIABLES]
            (self.out / f"training_{trainer.global_rank}").write_text(str(os.getpid()))
        super().on_train_batch_end(trainer, pl_module)
        if self.batches == 15:
            (self.out / f"advanced_{trainer.global_rank}").touch()
        if self.fail == {"rank": trainer.global_rank, "step": self.batches}:
            (self.out / "failed").touch()
            if trainer.is_global_zero:  # Ranks that follow end first, as they may on a busy machine.
                threading.Thread(target=time.sleep, args=(3.0,)).start()
            raise RuntimeError("a fault of this rank's own")
        if self.fail == {"kill": trainer.global_rank, "step": self.batches} and not is_restarted():
            os.kill(os.getpid(), signal.SIGKILL)
        if self.awaited is not None and trainer.is_global_zero:
            workers = trainer.strategy.runtime.totals()
            trainer.should_stop |= workers[self.awaited].sessions > 1 and workers[self.awaited].rounds > 3

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.fail == {"rank": trainer.global_rank, "step": 0}:
            raise RuntimeError("a fault of this rank's own")

    def note(self, trainer: L.Trainer, call: str, **seen: Any) -> None:
        state = digest(trainer.lightning_module.state_dict())
        seen |= {"call": call, "rank": trainer.global_rank, "digest": state, "pid": os.getpid()}
        seen |= {"local_rank": trainer.local_rank, "world_size": trainer.world_size}
        with (self.out / f"rank_{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(seen) + "\n")

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.note(trainer, "fit", steps=self.batches, group=self.group, address=self.address, env=self.environment)
        self.batches = 0

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._after("validate", trainer)

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._after("test", trainer)

    def on_predict_batch_end(self, *_: Any) -> None:
        self.predicted += 1

    def on_predict_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._after("predict", trainer, batches=self.predicted)

    def _after(self, call: str, trainer: L.Trainer, **seen: Any) -> None:
        seen["group"] = torch.distributed.is_initialized()
        seen["rank_metric"] = float(trainer.callback_metrics.get("rank", -1))
        self.note(trainer, call, **seen)


def address(trainer: L.Trainer) -> list[Any]:
    """Return how this rank reaches the server: the transport, and whether it is encrypted."""
    runtime = trainer.strategy.runtime
    endpoints = getattr(runtime.worker.exchange, "_endpoints", None)
    return [] if endpoints is None else [endpoints.address.split(":")[0], endpoints.encrypted]


def more_callbacks(out: Path, options: dict[str, Any]) -> list[L.Callback]:
    callbacks: list[L.Callback] = []
    if options.get("slow_validation"):
        callbacks.append(SlowValidation(out))
    if options.get("boots_for_long"):
        callbacks.append(SlowBoot(out))
    # A logger with a handler of its own does not print its warnings any more.
    log = logging.getLogger("lightning_async_localsgd")
    if "min_workers" in options.get("own_strategy", {}):
        log.addHandler(Notice("training is paused", out / "paused"))
    if "fault" in options:
        log.addHandler(Notice("inject", out / "injected"))
        fault = options["fault"]
        callbacks.append(FaultInjection([Fault(**{**fault, "kind": FaultKind[fault["kind"]]})]))
    if options.get("saves_on_exception"):
        callbacks.append(OnExceptionCheckpoint(out))
    return callbacks


def run(out: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    strategy: Any = options.get("strategy", "async_localsgd")
    if "exchange" in options or "own_strategy" in options:
        exchange = ExchangeOptions(**options.get("exchange", {}))
        strategy = AsyncLocalSGDStrategy(**{"local_steps": 5, "exchange": exchange, **options.get("own_strategy", {})})
    module = Model()
    for number, calls in enumerate(options.get("calls", [["fit"]])):
        options |= options.get(f"trainer {number}", {})
        trainer = quiet_trainer(
            strategy if number == 0 else options.get("strategy", "async_localsgd"),
            callbacks=[Notes(str(out), options.get("fail"), options.get("awaited")), *more_callbacks(out, options)],
            default_root_dir=out,
            **{"devices": 2, "max_steps": 100, "num_sanity_val_steps": 0, **options.get("trainer", {})},
        )
        for call in calls:
            getattr(trainer, call)(module, datamodule=Data(options.get("loader_processes", 0)))
    print("the script's end", flush=True)


if __name__ == "__main__":
    if "cli" in json.loads(sys.argv[2]):
        LightningCLI(Model, Data, seed_everything_default=0, args=json.loads(sys.argv[2])["cli"])
    else:
        run(Path(sys.argv[1]), json.loads(sys.argv[2]))
