"""Schedulers follow the progress of the data, whatever this rank's own steps."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.types import LRSchedulerConfig

from lightning_async_localsgd.plan import EpochSteps, RunBudget
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


def test_epochs_are_as_long_as_the_budget_says_and_begin_where_the_run_went_on(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = RunBudget.of_epochs([EpochSteps(20, 10), EpochSteps(20, 10), EpochSteps(8, 4)])
    trainer, _, scheduler = build(monkeypatch, interval="epoch")
    schedulers = ProgressSchedulers(trainer, 0.0, budget)
    for progress, taken in ((9.9, 0), (10.0, 1), (19.0, 1), (20.0, 2), (24.0, 3)):
        schedulers.advance(progress)
        assert scheduler.last_epoch == taken, progress
    # It goes on after two epochs, which were twice as long: the trainer has counted 40 steps, and the plan says 20.
    trainer, _, scheduler = build(monkeypatch, interval="epoch")
    scheduler.last_epoch = 2
    schedulers = ProgressSchedulers(trainer, 40.0, budget, ahead=20)
    for progress, taken in ((43.9, 2), (44.0, 3)):
        schedulers.advance(progress)
        assert scheduler.last_epoch == taken, progress
    # A worker that joins then catches up; where epochs were shorter before, too.
    for ahead, now in ((20, 40.0), (-15, 5.0)):
        trainer, _, scheduler = build(monkeypatch, interval="epoch")
        schedulers = ProgressSchedulers(trainer, 0.0, budget, ahead)
        schedulers.advance(now)
        assert scheduler.last_epoch == 2


def test_while_a_scheduler_is_stepped_the_trainer_counts_the_step_that_it_is_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer, _, _ = build(monkeypatch, interval="step", frequency=2)
    counted: list[int] = []

    def counted_as(steps: int) -> Any:
        counted.append(steps)
        return nullcontext()

    ProgressSchedulers(trainer, 0.0, counted_as=counted_as).advance(7.0)
    assert counted == [2, 4, 6]
