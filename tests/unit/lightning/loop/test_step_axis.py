"""Each batch of a worker belongs to a step within its epoch, and rank 0 stops where it validates or saves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async_localsgd.lightning.loop.step_axis import StepAxis, reserved_units
from lightning_async_localsgd.policies.plan import EpochSteps, RunBudget

WORKERS = 2


def make_trainer(val_check: Any = 32, checkpoint_every: int | None = None, **changes: Any) -> Any:
    checkpoints = [ModelCheckpoint(every_n_train_steps=checkpoint_every)] if checkpoint_every else []
    values = {"check_val_every_n_epoch": 1, "enable_validation": True, "accumulate_grad_batches": 1, **changes}
    return SimpleNamespace(
        callbacks=checkpoints,
        val_check_batch=val_check,
        limit_val_batches=1.0,
        current_epoch=0,
        lightning_module=SimpleNamespace(automatic_optimization=True),
        **values,
    )


def data_of(items: int, step_samples: int = 0, own: int = 1, batch: int = 1) -> Any:
    return SimpleNamespace(
        items_per_epoch=items,
        global_epochs=True,
        step_samples=step_samples,
        items_per_step=lambda epoch: step_samples or 1,
        own_items_per_step=own,
        items_of_batch=batch,
    )


def make_axis(trainer: Any, items: int = 64, epochs: int = 4, max_steps: int = 0, **changes: Any) -> StepAxis:
    data: Any = data_of(items)
    budget = RunBudget.of_epochs([EpochSteps(items, items // WORKERS)] * epochs)
    if max_steps:
        budget = RunBudget(max_steps * WORKERS, max_steps, "max_steps")
    values = {"step_offset": 0, "steps": 0, "reserved": reserved_units(trainer, data, WORKERS), **changes}
    return StepAxis(trainer, budget, WORKERS, data=data, **values)


def test_every_worker_counts_steps_of_its_own_epoch() -> None:
    axis = make_axis(make_trainer())
    assert axis.step_of(0, 40.0, epoch=0, is_last=False) == 31
    assert axis.step_of(31, 40.0, epoch=0, is_last=True) == 32
    assert axis.step_of(32, 33.0, epoch=2, is_last=False) == 64


def test_steps_never_decrease() -> None:
    assert make_axis(make_trainer()).step_of(30, 12.0, epoch=0, is_last=False) == 30


def test_epochs_of_a_run_that_ends_with_its_steps_have_unequal_shares() -> None:
    axis = make_axis(make_trainer(), items=33, max_steps=40)
    assert [axis.step_of(0, 1.0, epoch, is_last=True) for epoch in (0, 1)] == [17, 33]
    # The third epoch would end after the run.
    assert axis.step_of(0, 35.2, 2, is_last=True) == 35
    assert axis.step_of(0, 35.2, 3, is_last=False) < 40


def test_epochs_of_a_resumed_run_begin_where_it_resumes() -> None:
    trainer = make_trainer()
    trainer.current_epoch = 1
    planned = make_axis(trainer, step_offset=5, steps=42)
    assert planned.step_of(42, 50.0, 1, is_last=True) == 69
    other_data = make_axis(trainer, items=20, max_steps=100, steps=42)
    assert other_data.step_of(42, 45.0, 1, is_last=True) == 52


@pytest.mark.parametrize(
    ("val_check", "checkpoint_every", "units"),
    [(32, None, 1), (16, None, 2), (16, 25, 4), (8, None, 4), (float("inf"), None, 1), (32, 1, 1), (32, 1000, 2)],
)
def test_rank_zero_reserves_a_step_for_each_of_its_tasks(
    val_check: float, checkpoint_every: int | None, units: int
) -> None:
    data = data_of(64)
    assert reserved_units(make_trainer(val_check, checkpoint_every), data, WORKERS) == units


def test_rank_zero_stops_at_each_step_at_which_it_validates_or_saves() -> None:
    axis = make_axis(make_trainer(16, checkpoint_every=25))
    steps = [0]
    for estimate in (30.0, 30.5, 31.0):
        steps.append(axis.step_of_host(steps[-1], estimate, 0, is_last=False, position=5))
    assert steps == [0, 16, 25, 31]


def test_rank_zero_that_knows_nothing_of_others_stops_there_with_its_reserved_steps() -> None:
    axis = make_axis(make_trainer(16, checkpoint_every=25))
    places = [(59, False), (60, False), (61, False), (62, False), (63, True)]
    steps = [0]
    for position, is_last in places:
        steps.append(axis.step_of_host(steps[-1], steps[-1] + 0.5, 0, is_last, position))
    assert steps == [0, 0, 0, 16, 25, 32]


def test_rank_zero_passes_steps_over_if_they_are_too_many() -> None:
    axis = make_axis(make_trainer(checkpoint_every=3))
    assert axis.step_of_host(4, 20.7, 0, is_last=False, position=5) == 18
    assert axis.step_of_host(18, 19.7, 0, is_last=False, position=5) == 19
    assert axis.step_of_host(19, 20.0, 0, is_last=True, position=63) == 32


def test_epochs_of_its_own_do_not_limit_a_worker() -> None:
    axis = make_axis(make_trainer(), max_steps=100)
    axis._data.global_epochs = False
    assert axis.step_of(10, 77.5, 0, is_last=True) == 77


def test_rank_zero_with_own_batches_reserves_steps_of_its_own_size() -> None:
    """An epoch of 640 samples, of which a step of the script has 8. Rank 0 has steps of 20."""
    data = data_of(640, step_samples=8, own=20, batch=20)
    # An equal part are 40 steps of the script, so at most a third of them is reserved: five of rank 0's own.
    assert reserved_units(make_trainer(10), data, WORKERS) == 4
    assert reserved_units(make_trainer(5), data, WORKERS) == 1, "too many"
    trainer = make_trainer(10)
    budget = RunBudget.of_epochs([EpochSteps(640, 40)] * 4, unit=8)
    axis = StepAxis(trainer, budget, WORKERS, 0, data, steps=0, reserved=4)
    # Its last steps begin at these samples. At each of the first three it must validate.
    steps = [0]
    for position, is_last in [(540, False), (560, False), (580, False), (600, False), (620, True)]:
        steps.append(axis.step_of_host(steps[-1], steps[-1] + 0.5, 0, is_last, position))
    assert steps == [0, 0, 10, 20, 30, 40]


def test_epochs_of_samples_have_a_length_in_steps_of_the_script() -> None:
    trainer, data = make_trainer(), data_of(600, step_samples=16)
    axis = StepAxis(trainer, RunBudget(1600, 50, "max_steps", unit=16), WORKERS, 0, data, steps=0, reserved=1)
    assert axis.begin(2) == pytest.approx(37.5)
