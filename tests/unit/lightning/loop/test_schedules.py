"""Schedulers follow the progress of all workers."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.types import LRSchedulerConfig

from lightning_async_localsgd.lightning.loop.schedules import ProgressSchedulers
from lightning_async_localsgd.policies.plan import EpochSteps, RunBudget


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
        "lightning_async_localsgd.lightning.loop.schedules.step_scheduler",
        lambda trainer, scheduler: trainer.lightning_module.lr_scheduler_step(scheduler, None),
    )
    return trainer, entry, scheduler


def test_step_schedulers_follow_the_progress_and_never_step_back(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, entry, scheduler = build(monkeypatch, interval="step", frequency=2)
    schedulers = ProgressSchedulers(trainer, 0.0)
    assert entry.frequency > 10**9, "Lightning never steps the scheduler"
    for progress, steps in ((0.5, 0), (1.99, 0), (2.0 - 1e-9, 1), (1.0, 1), (7.3, 3), (7.9, 3), (8.0, 4)):
        schedulers.advance(progress)
        assert scheduler.last_epoch == steps, progress
    schedulers.restore()
    assert entry.frequency == 2
    schedulers.advance(100.0)
    assert scheduler.last_epoch == 4


def test_epoch_schedulers_follow_epochs_of_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, scheduler = build(monkeypatch, batches=11, accumulate=2, interval="epoch")
    schedulers = ProgressSchedulers(trainer, 0.0)
    for progress, steps in ((5.9, 0), (6.0, 1), (18.5, 3)):
        schedulers.advance(progress)
        assert scheduler.last_epoch == steps


def test_resumed_run_does_not_repeat_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, scheduler = build(monkeypatch, interval="step")
    schedulers = ProgressSchedulers(trainer, 40.0)
    schedulers.advance(40.2)
    assert scheduler.last_epoch == 0
    schedulers.advance(42.0)
    assert scheduler.last_epoch == 2


def test_schedulers_that_cannot_follow_the_progress_are_stepped_by_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, entry, _ = build(monkeypatch, batches=float("inf"), interval="epoch")
    ProgressSchedulers(trainer, 0.0)
    assert entry.frequency == 1
    trainer, entry, _ = build(monkeypatch, interval="step")
    trainer.lightning_module.automatic_optimization = False
    ProgressSchedulers(trainer, 0.0)
    assert entry.frequency == 1


def test_scheduler_that_a_callback_has_replaced_is_not_stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, entry, scheduler = build(monkeypatch, interval="step")
    schedulers = ProgressSchedulers(trainer, 0.0)
    schedulers.advance(2.0)
    trainer.strategy.lr_scheduler_configs[0] = LRSchedulerConfig(torch.optim.swa_utils.SWALR(scheduler.optimizer, 0.1))
    schedulers.advance(9.0)
    assert scheduler.last_epoch == 2
    schedulers.restore()
    assert entry.frequency == 1


def test_epochs_have_the_lengths_of_the_budget_and_begin_at_the_step_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = RunBudget.of_epochs([EpochSteps(20, 10), EpochSteps(20, 10), EpochSteps(8, 4)])
    trainer, _, scheduler = build(monkeypatch, interval="epoch")
    schedulers = ProgressSchedulers(trainer, 0.0, budget)
    for progress, steps in ((9.9, 0), (10.0, 1), (19.0, 1), (20.0, 2), (24.0, 3)):
        schedulers.advance(progress)
        assert scheduler.last_epoch == steps, progress
    # The run is resumed after two epochs that were twice as long: the trainer has counted 40 steps, the plan has 20.
    trainer, _, scheduler = build(monkeypatch, interval="epoch")
    scheduler.last_epoch = 2
    schedulers = ProgressSchedulers(trainer, 40.0, budget, step_offset=20)
    for progress, steps in ((43.9, 2), (44.0, 3)):
        schedulers.advance(progress)
        assert scheduler.last_epoch == steps, progress
    # A worker that joins later steps its schedulers to the same epoch, also if earlier epochs were shorter.
    for step_offset, now in ((20, 40.0), (-15, 5.0)):
        trainer, _, scheduler = build(monkeypatch, interval="epoch")
        schedulers = ProgressSchedulers(trainer, 0.0, budget, step_offset)
        schedulers.advance(now)
        assert scheduler.last_epoch == 2


def test_step_count_of_the_trainer_matches_each_scheduler_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer, _, _ = build(monkeypatch, interval="step", frequency=2)
    counted: list[int] = []

    def counting(steps: int) -> Any:
        counted.append(steps)
        return nullcontext()

    ProgressSchedulers(trainer, 0.0, counting=counting).advance(7.0)
    assert counted == [2, 4, 6]
