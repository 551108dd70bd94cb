"""Schedulers follow the progress of the data, whatever this rank's own steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.types import LRSchedulerConfig

from lightning_async_localsgd.schedules import ProgressSchedulers


class Module:
    automatic_optimization = True

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()


def build(monkeypatch: pytest.MonkeyPatch, batches: float = 10, accumulate: int = 1, **config: Any) -> Any:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    entry = LRSchedulerConfig(scheduler, **config)
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(lr_scheduler_configs=[entry]),
        lightning_module=Module(),
        num_training_batches=batches,
        accumulate_grad_batches=accumulate,
        callbacks=[],
    )
    monkeypatch.setattr(
        "lightning_async_localsgd.schedules.call._call_lightning_module_hook",
        lambda trainer, hook, *args: getattr(trainer.lightning_module, hook)(*args),
    )
    return trainer, entry, scheduler


def test_step_schedulers_follow_the_progress_and_never_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, entry, scheduler = build(monkeypatch, interval="step", frequency=2)
    schedulers = ProgressSchedulers(trainer, 0.0)
    assert entry.frequency > 10**9, "Lightning must not step it"
    for progress, taken in ((0.5, 0), (1.99, 0), (2.0 - 1e-9, 1), (1.0, 1), (7.3, 3), (7.9, 3), (8.0, 4)):
        schedulers.advance(progress)
        assert scheduler.last_epoch == taken, progress
    schedulers.release()
    assert entry.frequency == 2
    schedulers.advance(100.0)
    assert scheduler.last_epoch == 4


def test_epoch_schedulers_follow_epochs_of_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, scheduler = build(monkeypatch, batches=11, accumulate=2, interval="epoch")
    schedulers = ProgressSchedulers(trainer, 0.0)
    for progress, taken in ((5.9, 0), (6.0, 1), (18.5, 3)):
        schedulers.advance(progress)
        assert scheduler.last_epoch == taken


def test_a_resumed_run_does_not_step_again_for_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, scheduler = build(monkeypatch, interval="step")
    schedulers = ProgressSchedulers(trainer, 40.0)
    schedulers.advance(40.2)
    assert scheduler.last_epoch == 0
    schedulers.advance(42.0)
    assert scheduler.last_epoch == 2


def test_what_cannot_follow_is_left_to_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, entry, _ = build(monkeypatch, batches=float("inf"), interval="epoch")
    ProgressSchedulers(trainer, 0.0)
    assert entry.frequency == 1
    trainer, entry, _ = build(monkeypatch, interval="step")
    trainer.lightning_module.automatic_optimization = False
    ProgressSchedulers(trainer, 0.0)
    assert entry.frequency == 1


def test_a_scheduler_that_a_callback_has_replaced_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, entry, scheduler = build(monkeypatch, interval="step")
    schedulers = ProgressSchedulers(trainer, 0.0)
    schedulers.advance(2.0)
    trainer.strategy.lr_scheduler_configs[0] = LRSchedulerConfig(torch.optim.swa_utils.SWALR(scheduler.optimizer, 0.1))
    schedulers.advance(9.0)
    assert scheduler.last_epoch == 2
    schedulers.release()
    assert entry.frequency == 1
