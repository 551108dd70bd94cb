"""Lightning models, data and trainers for the tests.

What a test records stays beside it, in a class derived from :class:`Regression` or in a callback.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

EMAWeightAveraging: Any = getattr(callbacks, "EMAWeightAveraging", None)
"""Lightning's callback of this name; None if this release of Lightning has no such callback."""

WEIGHTS_ONLY: dict[str, Any] = (
    {"weights_only": True} if "weights_only" in inspect.signature(L.Trainer.fit).parameters else {}
)
"""Argument of ``fit``, ``validate``, ``test`` and ``predict`` that forbids pickled code; empty for older Lightning."""

# ------------------------------------------------------------------------------------------------------------- models


def network(width: int = 16, batch_norm: bool = False) -> nn.Sequential:
    """Return a network with eight inputs, one hidden layer and one output."""
    norm = [nn.BatchNorm1d(width)] if batch_norm else []
    return nn.Sequential(nn.Linear(8, width), *norm, nn.Tanh(), nn.Linear(width, 1))


def one_cycle(optimizer: torch.optim.Optimizer, steps: float) -> lr_scheduler.LRScheduler:
    """Return a schedule that raises an error if it is stepped more often than the run has steps."""
    # It counts its own construction, too.
    return lr_scheduler.OneCycleLR(optimizer, max_lr=optimizer.defaults["lr"], total_steps=int(steps) + 1)


def cosine(optimizer: torch.optim.Optimizer, steps: float) -> lr_scheduler.LRScheduler:
    """Return a schedule that falls to zero at the end of the run."""
    return lr_scheduler.LambdaLR(optimizer, lambda n: 0.5 + 0.5 * math.cos(math.pi * min(n, steps) / steps))


def inverse_time(optimizer: torch.optim.Optimizer, steps: float) -> lr_scheduler.LRScheduler:
    """Return a schedule that does not depend on the length of the run."""
    return lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n / 10))


class Regression(L.LightningModule):
    """A regression. A batch is inputs, targets and whatever else its dataset adds.

    Args:
        net: the network; by default :func:`network`.
        optimizer: makes the optimizer from the trainable parameters and ``lr``.
        lr: learning rate.
        schedule: makes a schedule that is stepped with the optimizer, from the optimizer and the steps of the run.

    """

    def __init__(
        self,
        net: nn.Module | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        lr: float = 0.05,
        schedule: Callable[[torch.optim.Optimizer, float], lr_scheduler.LRScheduler] | None = None,
    ) -> None:
        super().__init__()
        self.net = network() if net is None else net
        self.lr = lr
        self.make_optimizer = optimizer
        self.make_schedule = schedule

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: Any, index: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, index: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad], lr=self.lr)
        if self.make_schedule is None:
            return optimizer
        schedule = self.make_schedule(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class PacedRegression(Regression):
    """A regression whose ranks have unequal speeds.

    Args:
        seconds: how long a training step of each rank sleeps.
        *arguments: those of :class:`Regression`.
        **options: those of :class:`Regression`.

    """

    def __init__(self, seconds: Sequence[float], *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seconds = seconds

    def training_step(self, batch: Any, index: int) -> Tensor:
        time.sleep(self.seconds[self.global_rank % len(self.seconds)])
        return super().training_step(batch, index)


class Pace(L.Callback):
    """Gives ranks unequal speeds outside of their training steps, and counts what a rank does.

    Args:
        seconds: how long each rank sleeps after a batch.

    Attributes:
        batches: training batches of this rank.
        steps: steps of its first optimizer.

    """

    def __init__(self, seconds: Sequence[float]) -> None:
        self.seconds = seconds
        self.batches = 0
        self.steps = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.optimizers[0].register_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.steps += 1

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.batches += 1
        time.sleep(self.seconds[trainer.global_rank % len(self.seconds)])


# --------------------------------------------------------------------------------------------------------- optimizers


class Lookahead(torch.optim.SGD):
    """SGD whose weights go half way back to slow ones every other step."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            state = self.state[parameter]
            state["slow"] = state.get("slow", parameter.detach().clone())
            state["count"] = state.get("count", 0) + 1
            if state["count"] % 2 == 0:
                state["slow"].lerp_(parameter.detach(), 0.5)
                parameter.data.copy_(state["slow"])
        return loss


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (arXiv 2405.15682): trains at y, remembers z, and shows their average x."""

    def __init__(self, params: Any, lr: float, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "train_mode": False, "steps": 0})

    def _switch(self, trains: bool) -> None:
        for group in self.param_groups:
            weight = 1 - group["beta"] if trains else 1 - 1 / group["beta"]
            if group["train_mode"] != trains:
                for parameter in group["params"]:
                    if "z" in self.state[parameter]:
                        parameter.data.lerp_(self.state[parameter]["z"], weight)
            group["train_mode"] = trains

    def train(self) -> None:
        self._switch(True)

    def eval(self) -> None:
        self._switch(False)

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("the optimizer shows its weights, so it cannot train; call train() before step()")
            group["steps"] += 1
            for parameter in group["params"]:
                z = self.state[parameter].setdefault("z", parameter.detach().clone())
                x = parameter.data.lerp(z, 1 - 1 / group["beta"])
                z.sub_(parameter.grad, alpha=group["lr"])
                x.lerp_(z, 1 / group["steps"])
                parameter.data.copy_(x.lerp(z, 1 - group["beta"]))
        return loss


# --------------------------------------------------------------------------------------------------------------- data


def product(inputs: Tensor) -> Tensor:
    """Return targets with a product of two inputs."""
    return (inputs[:, :1] * inputs[:, 1:2]).tanh() + 0.5 * inputs[:, 2:3]


def sine(inputs: Tensor) -> Tensor:
    """Return targets that depend on the first input only."""
    return inputs[:, :1].sin()


def regression_data(samples: int, target: Callable[[Tensor], Tensor] = product, seed: int = 0) -> TensorDataset:
    """Return samples of eight inputs, one target and the number of the sample."""
    inputs = torch.randn(samples, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, target(inputs), torch.arange(samples))


def loader(
    samples: int = 256, batch_size: int = 8, shuffle: bool = True, target: Callable[[Tensor], Tensor] = product,
    seed: int = 0, **options: Any,
) -> DataLoader[Any]:  # fmt: skip
    """Return a loader of :func:`regression_data`. Other options are those of a DataLoader."""
    return DataLoader(regression_data(samples, target, seed), batch_size=batch_size, shuffle=shuffle, **options)


def line_loader(samples: int) -> DataLoader[Any]:
    """Return a loader of points on a line, in order, in batches of four."""
    inputs = torch.arange(samples, dtype=torch.float32).reshape(-1, 1) / samples
    return DataLoader(TensorDataset(inputs, 2 * inputs), batch_size=4)


# ----------------------------------------------------------------------------------------------------------- trainers


def close_ddp_group() -> None:
    """Close the process group that DDP leaves open. At the end of a process, the group's threads sometimes abort it."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def quiet_trainer(strategy: Any = "async_localsgd", **options: Any) -> L.Trainer:
    """Return a trainer on one CPU device that shows and logs nothing, and saves what its callbacks save."""
    callbacks = options.get("callbacks") or []
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
    }
    return L.Trainer(strategy=strategy, **{**quiet, **options})


# --------------------------------------------------------------------------------------------------------- comparison


def digest(tree: Any) -> str:
    """Return a hash of every bit of the tensors in nested dictionaries and lists, and of all other values."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(f"{value.dtype} {list(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for key in sorted(value, key=str):
                found.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            found.update(repr(value).encode())

    add(tree)
    return found.hexdigest()


def same_tensors(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Return whether two states have the same names, and the same values to the last bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Return whether two modules have the same state to the last bit."""
    return same_tensors(first.state_dict(), second.state_dict())
