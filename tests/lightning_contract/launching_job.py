"""The job that ``test_launching.py`` starts in every way there is: ``python launching_job.py OUT JSON``.

Every rank appends a line of JSON to ``OUT/rank_<n>.jsonl`` at the end of each call of the Trainer. With ``"cli"`` among
the options their value is a command line for LightningCLI.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

if "interactive" in json.loads(sys.argv[2]):
    sys.ps1 = ">>> "  # What Lightning knows a notebook by. It looks when it is imported.

import lightning as L
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset

from lightning_async_localsgd import AsyncLocalSGDStrategy, ExchangeOptions
from lightning_async_localsgd.faults import Fault, FaultInjection, FaultKind

SECONDS = (0.01, 0.04)
"""Least seconds of a local step, by rank in turn."""


class Regression(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def loss(self, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.net(inputs), targets)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)
        self.log("rank", float(self.trainer.global_rank), sync_dist=True)

    def test_step(self, batch: Any, index: int) -> None:
        self.log("rank", float(self.trainer.global_rank), sync_dist=True)

    def predict_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Data(L.LightningDataModule):
    def loader(self, samples: int, shuffle: bool = False) -> DataLoader[Any]:
        inputs = torch.randn(samples, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=4, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(64, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(16)

    test_dataloader = predict_dataloader = val_dataloader


def started_again() -> bool:
    """Whether this is not the rank's, or the job's, first process."""
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", os.environ.get("SLURM_RESTART_COUNT", "0"))
    return "ASYNC_LOCALSGD_REJOIN" in os.environ or "ASYNC_LOCALSGD_RESUME" in os.environ or restarts != "0"


class SlowValidation(L.Callback):
    """Rank 0 is long in its second batch of validation."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        (self.out / "validating").touch()
        time.sleep(1.0)


class SlowBoot(L.Callback):
    """A process that was started again takes long before it joins."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def setup(self, *_: Any, **__: Any) -> None:
        if started_again():
            (self.out / "booting").touch()
            time.sleep(120)


class Notice(logging.Handler):
    """Leaves a file when a fault is injected."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self.out = out

    def emit(self, record: logging.LogRecord) -> None:
        if "inject" in record.getMessage():
            (self.out / "injected").touch()


class Notes(L.Callback):
    """Unequal speeds, a fault if it is asked for, and what the rank saw.

    Args:
        out: folder of the notes.
        fail: which rank raises an exception, or kills itself, after which of its steps.
        awaited: training ends when this worker, started again, is merged again.

    """

    def __init__(self, out: str, fail: dict[str, int] | None = None, awaited: int | None = None) -> None:
        self.out = Path(out)
        self.fail = fail
        self.awaited = awaited
        self.steps = 0
        self.predicted = 0
        self.group = False
        self.address: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps += 1
        self.group |= torch.distributed.is_initialized()
        if self.steps == 1:
            self.address = address(trainer)
            (self.out / f"training_{trainer.global_rank}").write_text(str(os.getpid()))
        if self.steps == 15:
            (self.out / f"advanced_{trainer.global_rank}").touch()
        time.sleep(SECONDS[trainer.global_rank % 2])
        if self.fail == {"rank": trainer.global_rank, "step": self.steps}:
            (self.out / "failed").touch()
            raise RuntimeError("a fault of this rank's own")
        if self.fail == {"kill": trainer.global_rank, "step": self.steps} and not started_again():
            os.kill(os.getpid(), signal.SIGKILL)
        if self.awaited is not None and trainer.is_global_zero:
            workers = trainer.strategy.phase.totals()
            trainer.should_stop |= workers[self.awaited].sessions > 1 and workers[self.awaited].rounds > 3

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.fail == {"rank": trainer.global_rank, "step": 0}:
            raise RuntimeError("a fault of this rank's own")

    def note(self, trainer: L.Trainer, call: str, **seen: Any) -> None:
        state = hashlib.sha256()
        for tensor in trainer.lightning_module.state_dict().values():
            state.update(tensor.numpy().tobytes())
        seen |= {"call": call, "rank": trainer.global_rank, "digest": state.hexdigest(), "pid": os.getpid()}
        seen |= {"local_rank": trainer.local_rank, "world_size": trainer.world_size}
        with (self.out / f"rank_{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(seen) + "\n")

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.note(trainer, "fit", steps=self.steps, group=self.group, address=self.address)
        self.steps = 0

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
    """How this rank reaches the server: transport, and whether that is encrypted."""
    phase = trainer.strategy.phase
    endpoints = getattr(phase.worker.exchange, "_endpoints", None)
    return [] if endpoints is None else [endpoints.address.split(":")[0], endpoints.encrypted]


def more_callbacks(out: Path, options: dict[str, Any]) -> list[L.Callback]:
    found: list[L.Callback] = []
    if options.get("slow_validation"):
        found.append(SlowValidation(out))
    if options.get("boots_for_long"):
        found.append(SlowBoot(out))
    if "fault" in options:
        logging.getLogger("lightning_async_localsgd").addHandler(Notice(out))
        fault = options["fault"]
        found.append(FaultInjection([Fault(**{**fault, "kind": FaultKind[fault["kind"]]})]))
    if options.get("saves_on_exception"):
        found.append(OnExceptionCheckpoint(out))
    return found


def run(out: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    strategy: Any = options.get("strategy", "async_localsgd")
    if "exchange" in options:
        strategy = AsyncLocalSGDStrategy(local_steps=5, exchange=ExchangeOptions(**options["exchange"]))
    if "own_strategy" in options:
        strategy = AsyncLocalSGDStrategy(**options["own_strategy"])
    module = Regression()
    saves = bool(options.get("saves_on_exception"))
    quiet = {"logger": False, "enable_checkpointing": saves, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    for number, calls in enumerate(options.get("calls", [["fit"]])):
        options |= options.get(f"trainer {number}", {})
        trainer = L.Trainer(
            strategy=strategy if number == 0 else options.get("strategy", "async_localsgd"),
            callbacks=[Notes(str(out), options.get("fail"), options.get("awaited")), *more_callbacks(out, options)],
            enable_model_summary=False,
            default_root_dir=out,
            **{"accelerator": "cpu", "devices": 2, "max_steps": 100, **quiet, **options.get("trainer", {})},
        )
        for call in calls:
            getattr(trainer, call)(module, datamodule=Data())
    print("the script's end", flush=True)


if __name__ == "__main__":
    if "cli" in json.loads(sys.argv[2]):
        LightningCLI(Regression, Data, seed_everything_default=0, args=json.loads(sys.argv[2])["cli"])
    else:
        run(Path(sys.argv[1]), json.loads(sys.argv[2]))
