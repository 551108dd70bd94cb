"""What trainer_access does to a Trainer's loops."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lightning_async_localsgd.lightning.trainer_access import loop
from lightning_async_localsgd.lightning.trainer_access.metrics import shown_metrics
from tests.unit.lightning.trainer_access.support import Model, RecordingLogger, at, fit, loader


def test_trainer_can_stop_early_once_its_minimum_is_met() -> None:
    def stop(trainer: L.Trainer) -> bool:
        trainer.should_stop = True
        return loop.can_stop_early(trainer)

    callback, results = at(on_train_batch_end=stop)
    trainer = fit(callback, min_steps=3, min_epochs=0)
    assert results["on_train_batch_end"] == [False, False, True]
    assert trainer.global_step == 3


def test_sigterm_that_lightning_has_noted_raises_at_once() -> None:
    def check(trainer: L.Trainer) -> None:
        loop.raise_if_sigterm(trainer)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SIGTERMException):
            loop.raise_if_sigterm(trainer)

    callback, results = at(on_train_batch_start=check)
    with suppress(SIGTERMException):  # Lightning raises it at the end of the batch, too.
        fit(callback, batches=1)
    assert results["on_train_batch_start"] == [None]


def test_batches_without_an_optimizer_step_accumulate_gradients() -> None:
    callback, results = at(on_train_batch_start=loop.should_accumulate)
    trainer = fit(callback, batches=5, accumulate_grad_batches=2)
    assert results["on_train_batch_start"] == [True, False, True, False, False]
    assert trainer.global_step == 3


def test_metrics_are_logged_with_the_step_that_was_set() -> None:
    callback, _ = at(on_train_batch_start=lambda trainer: loop.set_logged_step(trainer, 10 + trainer.global_step))
    logger = RecordingLogger()
    fit(callback, batches=3, logger=logger, log_every_n_steps=1)
    assert logger.steps == [10, 11, 12, 12]


def test_epoch_ends_with_its_data_until_restored() -> None:
    restores: list[Callable[[], None]] = []

    def shorten(trainer: L.Trainer) -> None:
        trainer.fit_loop.max_batches = 2
        restores.append(loop.end_epochs_with_data(trainer))

    def restore(trainer: L.Trainer) -> int:
        restores[0]()
        return trainer.fit_loop.epoch_loop.batch_idx

    callback, results = at(on_train_start=shorten, on_train_epoch_end=restore)
    fit(callback, batches=5, max_epochs=2)
    assert results["on_train_epoch_end"] == [4, 1]


def test_begin_and_end_of_optimizer_steps_are_controlled_until_restored() -> None:
    module = Model()
    restores: list[Callable[[], None]] = []

    def control(trainer: L.Trainer) -> None:
        # The first epoch has six batches. Its first step takes one batch, and its second step takes four.
        begins, ends = (lambda: module.value in (0, 1)), (lambda: module.value in (1, 5))
        restores.append(loop.control_steps(trainer, begins, ends))

    def restore(trainer: L.Trainer) -> int:
        restores[0]()
        return trainer.global_step

    callback, results = at(on_train_start=control, on_train_epoch_end=restore)
    fit(callback, module=module, batches=6, max_epochs=2, accumulate_grad_batches=3)
    # Gradients are set to zero between the forward and the backward pass of a step's first batch.
    assert module.zero_grads == [1, 2, 7, 10]
    assert results["on_train_epoch_end"] == [2, 4]


def test_validations_run_in_a_context_until_restored() -> None:
    seen: list[str] = []

    @contextmanager
    def context() -> Iterator[None]:
        seen.append("in")
        yield
        seen.append("out")

    class Validated(Model):
        def val_dataloader(self) -> Any:
            seen.append("loader")
            return loader(1)

    restores: list[Callable[[], None]] = []
    callback, _ = at(
        setup=lambda trainer: restores.append(loop.run_validations_in(trainer, context)),
        on_validation_batch_end=lambda _: seen.append("batch"),
        on_train_batch_end=lambda _: seen.append("train"),
        on_train_epoch_end=lambda trainer: restores[0]() if trainer.current_epoch == 1 else None,
    )
    fit(callback, module=Validated(), batches=1, max_epochs=3, limit_val_batches=1, num_sanity_val_steps=1)
    validation = ["in", "batch", "out"]
    assert seen == ["in", "loader", "batch", "out", "train", *validation, "train", *validation, "train", "batch"]


def test_scheduler_is_stepped_with_the_modules_hook() -> None:
    class Scheduled(Model):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            steps.append((scheduler, metric))
            super().lr_scheduler_step(scheduler, metric)

    steps: list[Any] = []

    def step(trainer: L.Trainer) -> Any:
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        loop.step_scheduler(trainer, scheduler)
        return scheduler

    callback, results = at(on_train_batch_end=step)
    fit(callback, batches=1, module=Scheduled())
    [scheduler] = results["on_train_batch_end"]
    assert steps[0] == (scheduler, None)
    assert len(steps) == 2, "Lightning steps the scheduler at the end of the epoch"


class Validated(Model):
    """Has a validation of one batch, and a scheduler that follows its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def val_dataloader(self) -> Any:
        return loader(1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append((self.trainer.global_step, self.current_epoch))
        self.log("loss", 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "loss", "frequency": 100}}


def test_validation_runs_at_a_position_of_another_process() -> None:
    module = Validated()

    def validate(trainer: L.Trainer) -> bool:
        found = loop.has_validation_batches(trainer)
        loop.set_position(trainer, 7, 3)
        loop.run_validation(trainer)
        assert loop.step_progress(trainer).completed == 7
        loop.set_position(trainer, 0, 0)
        return found and trainer.training

    callback, results = at(on_train_start=validate)
    trainer = fit(callback, module=module, batches=2, limit_val_batches=1, num_sanity_val_steps=0)
    assert results["on_train_start"] == [True]
    assert module.seen == [(7, 3), (2, 0)]
    assert trainer.callback_metrics["loss"] == 1.0
    nothing, results = at(on_train_start=loop.has_validation_batches)
    fit(nothing, module=Validated(), batches=2)
    assert results["on_train_start"] == [False]


def test_validations_are_controlled_until_restored() -> None:
    module = Validated()
    steps: list[int] = []
    restores: list[Callable[[], None]] = []

    def control(trainer: L.Trainer) -> None:
        def is_due(planned: bool) -> bool:
            return trainer.global_step == 2 or planned

        def run(run_here: Callable[[], Any]) -> Any:
            loop.restart_validation_timer(trainer)
            steps.append(loop.logged_step(trainer) + 1)
            return run_here() if trainer.global_step == 2 else []

        restores.append(loop.control_validations(trainer, is_due, run))

    callback, _ = at(
        on_train_start=control,
        on_train_epoch_end=lambda trainer: restores[0]() if trainer.current_epoch == 1 else None,
    )
    fit(callback, module=module, batches=4, max_epochs=3, limit_val_batches=1, num_sanity_val_steps=0)
    assert steps == [2, 4, 8]
    assert module.seen == [(2, 0), (12, 2)]


def test_scheduler_of_a_metric_is_stepped_although_it_is_not_due() -> None:
    rates: list[float] = []

    def step(trainer: L.Trainer) -> None:
        shown_metrics(trainer)[0]["loss"] = torch.tensor(1.0)
        [config] = trainer.lr_scheduler_configs
        loop.step_plateau_scheduler(trainer, config)
        assert trainer.lr_scheduler_configs == [config]
        assert config.frequency == 100
        rates.append(config.scheduler.optimizer.param_groups[0]["lr"])

    callback, _ = at(on_train_batch_end=step)
    fit(callback, module=Validated(), batches=2)
    assert rates == [0.1, pytest.approx(0.01)]


def test_scheduler_of_a_metric_that_is_not_there() -> None:
    class Misspelled(Validated):
        def configure_optimizers(self) -> Any:
            configured = super().configure_optimizers()
            configured["lr_scheduler"]["monitor"] = "los"
            return configured

    def step(trainer: L.Trainer) -> None:
        [config] = trainer.lr_scheduler_configs
        with pytest.raises(MisconfigurationException, match="metric los which is not available"):
            loop.step_plateau_scheduler(trainer, config)
        config.strict = False
        with pytest.warns(RuntimeWarning, match="metric los which is not available"):
            loop.step_plateau_scheduler(trainer, config)

    callback, _ = at(on_train_batch_end=step)
    fit(callback, module=Misspelled(), batches=1)


def test_schedulers_that_follow_a_metric_are_postponed_until_restored() -> None:
    class Often(Validated):
        def configure_optimizers(self) -> Any:
            configured = super().configure_optimizers()
            configured["lr_scheduler"]["frequency"] = 2
            return configured

    asked: list[tuple[int, str]] = []
    rates: list[float] = []
    restores: list[Callable[[], None]] = []

    def control(trainer: L.Trainer) -> None:
        def postpone(config: Any) -> bool:
            asked.append((trainer.current_epoch, config.monitor))
            return trainer.current_epoch < 4

        restores.append(loop.control_plateau_schedulers(trainer, postpone))

    def note(trainer: L.Trainer) -> None:
        if trainer.current_epoch == 6:
            restores[0]()
        rates.append(trainer.lr_scheduler_configs[0].scheduler.last_epoch)

    callback, _ = at(on_train_start=control, on_train_epoch_start=note)
    trainer = fit(callback, module=Often(), batches=1, max_epochs=9, limit_val_batches=1, num_sanity_val_steps=0)
    # Lightning asks at the end of every second epoch. Two of these steps are left out, and one comes after the end.
    assert asked == [(1, "loss"), (3, "loss"), (5, "loss")]
    assert rates == [0, 0, 0, 0, 0, 0, 1, 1, 2]
    assert len(trainer.lr_scheduler_configs) == 1
