"""What the cases of the modules job have in common: the module, the trainer, and what a rank notes."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from lightning_async_localsgd import AsyncLocalSGDCallback, AsyncLocalSGDStrategy, ExchangeOptions
from tests.lightning_models import Pace, Regression, digest, loader, quiet_trainer

SECONDS = (0.001, 0.006)
"""How long each rank sleeps after a step."""

STEPS = 12
"""``max_steps`` of a case: the mean number of local steps of the two ranks."""

CASES: dict[str, Callable[[Path], dict[str, Any]]] = {}


def case(function: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    """Register a case under the name of its function."""
    CASES[function.__name__] = function
    return function


class Module(Regression):
    """A regression with any network, trained by SGD with momentum."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__(net, partial(torch.optim.SGD, momentum=0.9))


class Watch(Pace):
    """Gives ranks unequal speeds, and notes what a rank exchanges and its final model."""

    def __init__(self) -> None:
        super().__init__(SECONDS)
        self.seen: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.strategy.runtime is not None and "exchanged" not in self.seen:
            self.seen["exchanged"] = [entry.name for entry in trainer.strategy.runtime.binding.layout.entries]
        super().on_train_batch_end(trainer, module)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        state = module.state_dict()
        self.seen |= {
            "steps": self.steps,
            "digest": digest(state),
            "finite": all(bool(torch.isfinite(t).all()) for t in state.values() if t.is_floating_point()),
        }


def fit(
    module: Any, out: Path, *callbacks: L.Callback, data: Any = None, strategy: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train a module on two ranks and return what was noted."""
    watch = Watch()
    given = {"local_steps": 4, "exchange": ExchangeOptions(start_timeout=60.0), **(strategy or {})}
    trainer = quiet_trainer(
        AsyncLocalSGDStrategy(**given),
        devices=2,
        callbacks=[watch, *callbacks, AsyncLocalSGDCallback(table=False)],
        **{"max_steps": STEPS, "limit_val_batches": 0, "default_root_dir": out, **options},
    )
    trainer.fit(module, data if data is not None else loader(), loader(32, shuffle=False))
    return {"rank": trainer.global_rank, **watch.seen}


def rank() -> int:
    """Return this process's rank, before there is a trainer."""
    return int(os.environ.get("LOCAL_RANK", "0"))


class SharedNames(L.Callback):
    """Records the frozen parameters that are exchanged."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.runs_elsewhere = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        shared = trainer.strategy.runtime.worker.shared
        self.runs_elsewhere = not trainer.is_global_zero
        self.names = [shared.frozen.names[number] for number in shared.numbers]
