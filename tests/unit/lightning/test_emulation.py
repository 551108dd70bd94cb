"""EmulatedDevices: each step takes the emulated time, and other work is added to that time."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_async_localsgd.emulation import EmulatedDevices
from lightning_async_localsgd.lightning import emulation


class FakeClock:
    """A clock that moves only by :meth:`work` and :meth:`sleep`. A sleep ends ``late`` seconds late."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.late = 0.0
        self.sleeps: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds + self.late

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(emulation, "time", fake)
    return fake


class Run:
    """Calls the hooks of a training loop around a real optimizer."""

    def __init__(self, clock: FakeClock, seconds: float) -> None:
        self.clock = clock
        self.parameter = torch.nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.SGD([self.parameter], lr=0.1)
        self.steps_of_beginning = SimpleNamespace(on=False, ends_local_step=True)
        strategy = SimpleNamespace(controller=SimpleNamespace(synchronous_steps=self.steps_of_beginning))
        self.trainer: Any = SimpleNamespace(optimizers=[self.optimizer], world_size=1, global_rank=0, strategy=strategy)
        self.devices = EmulatedDevices([seconds])
        self.module: Any = None
        self.devices.setup(self.trainer, self.module, "fit")
        self.devices.on_train_start(self.trainer, self.module)

    def batch(self, work: float, exchange: float = 0.0, update: bool = True) -> None:
        self.devices.on_train_batch_start(self.trainer, self.module, None, 0)
        self.clock.work(work)
        if update:
            self.optimizer.step()
        self.clock.work(exchange)
        self.devices.on_train_batch_end(self.trainer, self.module, None, None, 0)

    def steps(self, count: int, work: float, exchange: float = 0.0) -> float:
        start = self.clock.now
        for _ in range(count):
            self.batch(work, exchange)
        return self.clock.now - start


def test_step_takes_the_emulated_time(clock: FakeClock) -> None:
    assert Run(clock, 0.1).steps(50, work=0.03) == pytest.approx(5.0)
    assert clock.sleeps == pytest.approx([0.07] * 50)


def test_longer_work_is_neither_slowed_down_nor_caught_up(clock: FakeClock) -> None:
    run = Run(clock, 0.1)
    assert run.steps(10, work=0.15) == pytest.approx(1.5)
    assert clock.sleeps == []
    assert run.steps(10, work=0.02) == pytest.approx(1.0)


def test_work_after_the_update_is_added_to_the_emulated_time(clock: FakeClock) -> None:
    assert Run(clock, 0.1).steps(20, work=0.03, exchange=0.5) == pytest.approx(20 * 0.6)


def test_work_between_batches_is_part_of_the_next_step(clock: FakeClock) -> None:
    run = Run(clock, 0.1)
    start = clock.now
    for _ in range(10):
        run.batch(work=0.03)
        clock.work(0.02)  # loggers, the progress bar, loading the next batch
    assert clock.now - start == pytest.approx(10 * 0.1 + 0.02)


def test_accumulation_window_is_one_step(clock: FakeClock) -> None:
    run = Run(clock, 0.1)
    start = clock.now
    for index in range(12):
        run.batch(work=0.01, update=index % 4 == 3)
    assert clock.now - start == pytest.approx(0.3)
    assert clock.sleeps == pytest.approx([0.06] * 3)


def test_local_steps_of_the_synchronous_beginning_take_the_emulated_time_each(clock: FakeClock) -> None:
    run = Run(clock, 0.1)
    run.steps_of_beginning.on = True
    start = clock.now
    for index in range(12):  # Two batches in a local step, and three local steps in a synchronous one.
        run.devices.on_train_batch_start(run.trainer, run.module, None, 0)
        clock.work(0.02)
        run.steps_of_beginning.ends_local_step = index % 2 == 1
        run.devices.on_after_backward(run.trainer, run.module)
        if index % 6 == 5:
            clock.work(0.5)  # the exchange of gradients
            run.optimizer.step()
        run.devices.on_train_batch_end(run.trainer, run.module, None, None, 0)
    assert clock.now - start == pytest.approx(6 * 0.1 + 2 * 0.5)
    assert clock.sleeps == pytest.approx([0.06] * 6)


def test_several_updates_in_one_batch_each_take_the_emulated_time(clock: FakeClock) -> None:
    run = Run(clock, 0.1)
    run.devices.on_train_batch_start(run.trainer, run.module, None, 0)
    start = clock.now
    for _ in range(3):
        clock.work(0.02)
        run.optimizer.step()
    run.devices.on_train_batch_end(run.trainer, run.module, None, None, 0)
    assert clock.now - start == pytest.approx(0.3)


def test_validation_is_added_to_the_emulated_time(clock: FakeClock) -> None:
    run = Run(clock, 0.1)
    run.batch(work=0.03)
    start = clock.now
    clock.work(0.08)
    run.devices.on_validation_end(run.trainer, run.module)
    run.batch(work=0.03)
    assert clock.now - start == pytest.approx(0.18)


def test_late_wake_ups_do_not_accumulate(clock: FakeClock) -> None:
    clock.late = 0.004
    assert Run(clock, 0.1).steps(100, work=0.03) == pytest.approx(10.0 + 0.004)


def test_very_late_wake_up_is_not_compensated(clock: FakeClock) -> None:
    clock.late = 5.0
    run = Run(clock, 0.1)
    run.batch(work=0.03)
    clock.late = 0.0
    assert run.steps(1, work=0.03) == pytest.approx(0.09)
    assert run.steps(1, work=0.03) == pytest.approx(0.1)


def test_step_outside_a_batch_is_not_slowed_down(clock: FakeClock) -> None:
    run = Run(clock, 0.1)
    run.optimizer.step()
    assert clock.sleeps == []


def test_teardown_removes_the_hook(clock: FakeClock) -> None:
    run = Run(clock, 0.1)
    run.devices.teardown(run.trainer, run.module, "fit")
    run.batch(work=0.03)
    assert clock.sleeps == []


def test_every_optimizer_step_of_a_trainer_sleeps_once(clock: FakeClock, tmp_path: Any) -> None:
    devices = EmulatedDevices([0.25, 9.0])
    trainer = pl.Trainer(
        max_steps=3,
        accumulate_grad_batches=2,
        limit_val_batches=0,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=devices,
    )
    trainer.fit(BoringModel())
    assert clock.sleeps == pytest.approx([0.25] * 3)
    assert trainer.optimizers[0]._optimizer_step_post_hooks == {}


@pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf, True, "0.1", None])
def test_entry_that_is_not_a_positive_number_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"seconds_per_step\[1\]="):
        EmulatedDevices([0.1, value])


def test_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match=r"seconds_per_step=\[\] is empty"):
        EmulatedDevices([])


def test_fewer_entries_than_ranks_are_refused_at_the_start_of_fit() -> None:
    devices = EmulatedDevices([0.1, 0.2])
    trainer: Any = SimpleNamespace(world_size=4, global_rank=0)
    module: Any = None
    devices.setup(trainer, module, "validate")
    with pytest.raises(ValueError, match=r"has 2 entries, but there are 4 ranks"):
        devices.setup(trainer, module, "fit")


def test_module_without_optimizer_is_refused() -> None:
    trainer: Any = SimpleNamespace(optimizers=[], strategy=None)
    module: Any = None
    with pytest.raises(ValueError, match="configure_optimizers returned none"):
        EmulatedDevices([0.1]).on_train_start(trainer, module)


def test_total_speed_is_the_sum_of_all_ranks() -> None:
    devices = EmulatedDevices([0.1, 0.2, 0.5])
    assert devices.total_speed(2) == pytest.approx(15.0)
    assert devices.total_speed(3) == pytest.approx(17.0)
