"""The length of the synchronous beginning, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy as Simulated
from lightning_async_localsgd.lightning.loop.beginning import pretrained_part, warmup_steps
from tests.lightning_models import Regression, cosine, inverse_time, loader, network, quiet_trainer


def rise(steps: int, step: int) -> float:
    return min(1.0, (step + 1) / steps)


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=30), 30),
        (lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.1, total_iters=30), 0),
        (lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=200, pct_start=0.25), 49),
        (
            lambda o: lr_scheduler.SequentialLR(
                o,
                [lr_scheduler.LinearLR(o, 0.01, total_iters=20), lr_scheduler.CosineAnnealingLR(o, 80)],
                milestones=[20],
            ),
            20,
        ),
        (lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.LinearLR(o, 0.1, total_iters=7)]), 7),
        (lambda o: lr_scheduler.LambdaLR(o, partial(rise, 40)), 39),
        (lambda o: inverse_time(o, 100), 0),
        (lambda o: cosine(o, 100), 0),
        (lambda o: lr_scheduler.StepLR(o, 10), 0),
    ],
)
def test_warmup_of_schedulers(make: Callable[[Any], Any], wanted: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    config = SimpleNamespace(scheduler=make(optimizer), interval="step", frequency=1)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(lr_scheduler_configs=[config]))
    assert warmup_steps(trainer) == wanted
    config.interval = "epoch"
    assert warmup_steps(trainer) == 0


def test_weights_that_were_loaded_are_noticed() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(1, 1))
    assert pretrained_part(module) is None
    module[0].name_or_path = ""
    assert pretrained_part(module) is None
    module[0].name_or_path = "gpt2"
    assert pretrained_part(module) == "0 has name_or_path='gpt2'"
    assert pretrained_part(module[0]) == "the module has name_or_path='gpt2'"


def length(tmp_path: Path, module: Regression, steps: int, **options: Any) -> tuple[int, Any]:
    """Train, and return the length of the beginning and the trainer."""
    trainer = quiet_trainer(
        Simulated([0.1, 0.1], sync_warmup_steps="auto", local_steps=2), max_steps=steps, default_root_dir=tmp_path
    )
    lengths: list[int] = []

    def note(*_: Any) -> None:
        server = trainer.strategy.runtime.server
        lengths.append(server.state_dict()["beginning"]["steps"])

    module.on_train_batch_end = note  # type: ignore[method-assign]
    trainer.fit(module, loader(400), **options)
    return lengths[0], trainer


def test_automatic_length_of_a_run(tmp_path: Path) -> None:
    def schedule(optimizer: Any, steps: float) -> Any:
        return lr_scheduler.LambdaLR(optimizer, partial(rise, 9))

    module = Regression(network())
    found, trainer = length(tmp_path, module, 40)
    assert found == 4
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert length(tmp_path, Regression(network()), 60, ckpt_path=tmp_path / "end.ckpt")[0] == 0, "it is over"
    assert length(tmp_path, Regression(network(), schedule=schedule), 40)[0] == 8
    pretrained = Regression(network())
    pretrained.net.name_or_path = "hub/model"
    assert length(tmp_path, pretrained, 40)[0] == 0


class Manual(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize("option", [5, "auto"])
@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Manual, ["automatic_optimization=False", "sync_warmup_steps=0"]),
        (partial(Regression, optimizer=torch.optim.LBFGS), ["LBFGS", "sync_warmup_steps=0"]),
    ],
)
def test_modules_that_cannot_average_gradients(
    module: Callable[[], Any], words: list[str], option: Any, tmp_path: Path
) -> None:
    trainer = quiet_trainer(Simulated([0.1, 0.1], sync_warmup_steps=option), max_steps=20, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=f"sync_warmup_steps={option!r}") as caught:
        trainer.fit(module(), loader(400))
    assert all(word in str(caught.value) for word in words)


def test_gradient_scaler_is_refused(tmp_path: Path) -> None:
    trainer = quiet_trainer(Simulated([0.1, 0.1], sync_warmup_steps=5), max_steps=20, default_root_dir=tmp_path)
    trainer.strategy.precision_plugin.scaler = object()
    with pytest.raises(ValueError, match="bf16-mixed"):
        trainer.fit(Regression(), loader(400))


class Twice(torch.optim.SGD):
    """Evaluates the loss twice in a step."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


def test_optimizer_that_evaluates_gradients_twice_is_refused(tmp_path: Path) -> None:
    trainer = quiet_trainer(Simulated([0.1, 0.1], sync_warmup_steps=5), max_steps=20, default_root_dir=tmp_path)
    with pytest.raises(RuntimeError, match="Twice evaluates the loss several times"):
        trainer.fit(Regression(optimizer=Twice), loader(400))
