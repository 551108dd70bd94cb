"""A callback that records when each rank updated its weights, and the loss of each validation.

Only the torch optimizer is observed. The figures of all strategies are therefore measured in the same way and do not
depend on what a strategy reports about itself. Times are those of ``time.monotonic``, which is the same clock for all
processes of a machine.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from typing_extensions import override

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class StepTimeline(pl.Callback):
    """Writes ``rank_<i>.json`` at the end of ``fit``, and again with the final loss after a ``validate``.

    Place the callback after :class:`~lightning_async_localsgd.emulation.EmulatedDevices`, so that an emulated step is
    recorded at its end.

    Args:
        directory: existing directory for the files.

    """

    def __init__(self, directory: str) -> None:
        super().__init__()
        self.directory = Path(directory)
        self.record: dict[str, Any] = {"steps": [], "validations": [], "final_loss": None}
        self._cpu_start = self._cpu_validation_start = self._cpu_validation = 0.0
        self._validation_start = 0.0
        self._hook: RemovableHandle | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hook = trainer.optimizers[0].register_step_post_hook(
            lambda *_: self.record["steps"].append(time.monotonic())
        )
        self._cpu_start, self._cpu_validation = time.process_time(), 0.0
        self.record.update(rank=trainer.global_rank, start=time.monotonic())

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validation_start = time.monotonic()
        self._cpu_validation_start = time.process_time()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._cpu_validation += time.process_time() - self._cpu_validation_start
        if trainer.sanity_checking or "val/loss" not in trainer.callback_metrics:
            return
        loss = float(trainer.callback_metrics["val/loss"])
        if trainer.state.fn == "fit":
            self.record["validations"].append([self._validation_start, time.monotonic(), loss])
        else:
            self.record["final_loss"] = loss

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        cpu_seconds = time.process_time() - self._cpu_start - self._cpu_validation
        self.record.update(end=time.monotonic(), cpu_seconds=cpu_seconds)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if "end" in self.record:
            path = self.directory / f"rank_{trainer.global_rank}.json"
            unfinished = path.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps(self.record))
            unfinished.replace(path)
