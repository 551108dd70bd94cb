"""Trainers, a model and a callback for the tests of Lightning's private names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from torch.utils.data import DataLoader

from tests.lightning_models import quiet_trainer


class Model(BoringModel):
    """Logs 1.0, 2.0, 3.0, ... in training."""

    def __init__(self) -> None:
        super().__init__()
        self.value = 0.0
        self.zero_grads: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.value += 1.0
        self.log("value", self.value, on_step=True, on_epoch=True, prog_bar=True)
        return super().training_step(batch, batch_idx)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.zero_grads.append(int(self.value))
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)


class RecordingLogger(Logger):
    """Remembers what is logged at which step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int | None] = []
        self.metrics: list[dict[str, float]] = []

    @property
    def name(self) -> str:
        return "recording"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.steps.append(step)
        self.metrics.append(metrics)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def at(**functions: Callable[[L.Trainer], Any]) -> tuple[L.Callback, dict[str, list[Any]]]:
    """Return a callback that calls a function with the trainer in each named hook, and the lists of their results."""
    results: dict[str, list[Any]] = {hook: [] for hook in functions}
    callback = L.Callback()

    def calling(hook: str, function: Callable[[L.Trainer], Any]) -> Callable[..., None]:
        return lambda trainer, *_, **__: results[hook].append(function(trainer))

    for hook, function in functions.items():
        setattr(callback, hook, calling(hook, function))
    return callback, results


def trainer_with(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    """Return a trainer for one epoch without validation, which no strategy of this package controls."""
    limits = {"strategy": "auto", "limit_val_batches": 0, "max_epochs": 1}
    return quiet_trainer(callbacks=list(callbacks), **{**limits, **options})


def loader(batches: int) -> DataLoader[Tensor]:
    return DataLoader(RandomDataset(32, 2 * batches), batch_size=2)


def fit(*callbacks: L.Callback, batches: int = 4, module: L.LightningModule | None = None, **options: Any) -> L.Trainer:
    trainer = trainer_with(*callbacks, **options)
    trainer.fit(Model() if module is None else module, loader(batches))
    return trainer
