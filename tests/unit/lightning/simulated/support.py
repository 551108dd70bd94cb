"""Module, loaders and callbacks of the tests of simulated runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import Precision
from torch.utils.data import DataLoader

from lightning_async_localsgd import AsyncLocalSGDCallback
from lightning_async_localsgd.server.events import read_events
from tests import lightning_models
from tests.lightning_models import Regression, network, one_cycle, quiet_trainer, sine

SPEEDS = [0.1, 0.13, 0.3]


class Model(Regression):
    """A regression with BatchNorm and a learning-rate schedule. Records samples, rates and validations."""

    def __init__(self) -> None:
        super().__init__(network(batch_norm=True), torch.optim.AdamW, lr=1e-2, schedule=one_cycle)
        self.samples: list[int] = []
        self.rates: dict[int, list[float]] = {}
        self.validated: list[tuple[int, float]] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.samples += batch[2].tolist()
        runtime = getattr(self.trainer.strategy, "runtime", None)
        if runtime is not None:
            self.rates.setdefault(runtime.worker.number, []).append(self.trainer.optimizers[0].param_groups[0]["lr"])
        loss = super().training_step(batch, index)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        runtime = self.trainer.strategy.runtime
        if index == 0 and runtime is not None:
            layout = runtime.binding.layout
            theta, own = (torch.empty(layout.numel) for _ in range(2))
            runtime.server.copy_model(theta)
            runtime.binding.read(own)
            assert torch.equal(theta[: layout.model_numel], own[: layout.model_numel])
            self.validated.append((self.trainer.global_step, runtime.virtual_seconds))
        super().validation_step(batch, index)

    test_step = validation_step


class NoSchedule(Model):
    """The same regression without a schedule."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class SampleModel(Model):
    """A linear regression, for batches of one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(8, 1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class StopAt(L.Callback):
    """Sets ``should_stop`` at a global step."""

    def __init__(self, at: int = 10) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.at


class RunRecorder(AsyncLocalSGDCallback):
    """Records totals, seconds and version at the end of a run."""

    def __init__(self, **options: Any) -> None:
        super().__init__(table=False, **options)
        self.totals: dict[int, Any] = {}
        self.seconds = 0.0
        self.version = 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        runtime = trainer.strategy.runtime
        self.totals, self.seconds, self.version = runtime.totals(), runtime.seconds, runtime.server.snapshot.version


class SkippingPrecision(Precision):
    """Skips optimizer steps, like a gradient scaler."""

    def __init__(self, skips: Callable[[Any], bool]) -> None:
        self.skips = skips

    def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **options: Any) -> Any:
        if self.skips(model.trainer.strategy.runtime):
            return closure()
        return super().optimizer_step(optimizer, model, closure, **options)


def loader(batches: int = 60, seed: int = 0, shuffle: bool = True) -> DataLoader[Any]:
    return lightning_models.loader(8 * batches, shuffle=shuffle, target=sine, seed=seed)


def fit(strategy: Any, ckpt_path: Any = None, data: Any = None, **options: Any) -> tuple[Any, L.Trainer]:
    L.seed_everything(5, verbose=False)
    module = options.pop("module", Model)()
    options.setdefault("callbacks", [AsyncLocalSGDCallback(table=False)])
    trainer = quiet_trainer(strategy, **{"max_steps": 30, **options})
    validation = loader(4, 9) if "val_check_interval" in options else None
    trainer.fit(module, loader() if data is None else data, validation, ckpt_path=ckpt_path)
    return module, trainer


def assert_events_in_order(path: Path) -> None:
    """Assert that the events of a log are in the order of their times."""
    seconds = [event.seconds for event in read_events(path) if event.seconds is not None]
    assert seconds == sorted(seconds)
