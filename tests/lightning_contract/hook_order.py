"""The order in which Lightning calls the hooks of a module and of a callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch

from tests.lightning_models import Regression

HOOKS = [name for name in dir(L.LightningModule) if name.startswith("on_")] + [
    "optimizer_step", "optimizer_zero_grad", "backward", "configure_gradient_clipping", "lr_scheduler_step",
    "transfer_batch_to_device", "training_step", "configure_optimizers", "configure_callbacks", "setup", "teardown",
]  # fmt: skip


def recording(calls: list[str]) -> tuple[L.LightningModule, L.Callback]:
    """Return a module and a callback that record the calls of their hooks."""

    def recording_class(base: type, prefix: str, names: list[str]) -> type:
        def hook(name: str) -> Callable[..., Any]:
            def call(self: Any, *arguments: Any, **named: Any) -> Any:
                calls.append(f"{prefix}.{name}")
                return getattr(super(made, self), name)(*arguments, **named)

            return call

        made = type(f"Recording{base.__name__}", (base,), {name: hook(name) for name in names})
        return made

    def decay(optimizer: torch.optim.Optimizer, steps: float) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n)

    names = [name for name in dir(L.Callback) if name.startswith("on_")] + ["setup", "teardown"]
    module = recording_class(Regression, "module", HOOKS)(schedule=decay)
    return module, recording_class(L.Callback, "callback", names)()


def hooks_of_a_step(calls: list[str]) -> list[str]:
    """Return the hooks of the third training batch, from the first to the last."""
    starts = [index for index, name in enumerate(calls) if name == "callback.on_train_batch_start"]
    return calls[starts[2] : starts[3]]


def hooks_around(calls: list[str]) -> list[str]:
    """Return the hooks that no training batch calls, each once, in the order of their first calls."""
    steps = set(hooks_of_a_step(calls))
    return [name for name in dict.fromkeys(calls) if name not in steps]
