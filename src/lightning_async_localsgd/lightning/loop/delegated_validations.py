"""Validations that the evaluator runs for rank 0, while rank 0 goes on training.

At a validation point of its Trainer, rank 0 only requests the validation of the global model as it is now. When the
result has arrived, rank 0 acts on it between two of its steps: it logs the metrics at the step of the validation, and
lets the callbacks and schedulers act that follow a metric. For the time of that, the module holds the validated model.
"""

from __future__ import annotations

import json
import queue
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_async_localsgd.lightning.mixed_in import mixed_in
from lightning_async_localsgd.lightning.trainer_access.callbacks import callbacks_of, saving_as_in
from lightning_async_localsgd.lightning.trainer_access.loop import (
    can_stop_early,
    control_plateau_schedulers,
    control_validations,
    logged_step,
    restart_validation_timer,
    run_validation,
    set_logged_step,
    step_plateau_scheduler,
)
from lightning_async_localsgd.lightning.trainer_access.metrics import shown_metrics, training_results

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.runtime.base import Runtime
    from lightning_async_localsgd.server.evaluations import ValidationRequest, ValidationResult

_CHECK_SECONDS = 0.5
"""Seconds between two checks of the server while rank 0 waits for a result at the end of training."""


@dataclass(frozen=True)
class _Validation:
    """A requested validation.

    Args:
        request: the request, which holds the model.
        step: ``trainer.global_step`` at the request.
        epoch: ``trainer.current_epoch`` at the request.
        logged_step: step with which loggers get its metrics.

    """

    request: ValidationRequest
    step: int
    epoch: int
    logged_step: int


class DelegatedValidations:
    """Let the evaluator run rank 0's validations while there is an evaluator, until :meth:`restore`.

    At most one validation is out. A validation point that comes before the result is skipped, except the last one: once
    training has ended, rank 0 waits for the result, and validates the final model itself. If the evaluator is lost,
    rank 0 validates the model that was out, and goes on to validate itself.

    Args:
        trainer: the trainer of rank 0.
        runtime: rank 0's part in asynchronous training.
        prepare: brings the global model up to date before a validation.
        begin: notes that a version of the global model is validated.
        finish: acts on the end of a validation, with its metrics.

    """

    def __init__(
        self,
        trainer: pl.Trainer,
        runtime: Runtime,
        prepare: Callable[[], None],
        begin: Callable[[int], None],
        finish: Callable[[dict[str, Any]], None],
    ) -> None:
        assert runtime.server is not None
        self._trainer = trainer
        self._runtime = runtime
        self._server = runtime.server
        self._prepare = prepare
        self._begin = begin
        self._finish = finish
        self._out: _Validation | None = None
        self._lost: _Validation | None = None
        self._planned = False
        self._stops = False
        self._waiting: dict[int, Callable[[], None]] = {}
        self._warned = False
        self._restores = ExitStack()
        self._restores.callback(control_validations(trainer, self._is_due, self._run))
        for callback in callbacks_of(trainer):
            if isinstance(callback, (EarlyStopping, ModelCheckpoint)) and callback.monitor is not None:
                self._restores.callback(mixed_in(callback, _WaitingCallback, _delegated=self))
        self._restores.callback(control_plateau_schedulers(trainer, self._postpone))

    @property
    def repeated(self) -> ValidationRequest | None:
        """The request of a lost evaluator that rank 0 is about to validate itself; None if there is none."""
        return None if self._lost is None else self._lost.request

    def poll(self) -> None:
        """Act on a result that has arrived. Called between two steps of rank 0."""
        while self._out is not None and not self._runtime.in_step:
            try:
                self._accept(self._server.evaluations.results.get_nowait())
            except queue.Empty:
                return

    def end(self) -> None:
        """Wait for the result that is out, because training has ended, and end the evaluator."""
        self._await_result()
        if self._lost is not None:
            run_validation(self._trainer)
        self._server.end_evaluations()

    def waits(self, monitor: str | None) -> bool:
        """Return whether what follows a metric has to wait, because the metric's validation is out."""
        if self._out is None and self._lost is None:
            return False
        items = training_results(self._trainer).values()
        logged = {f"{item.meta.name}{ending}" for item in items for ending in ("", "_step", "_epoch")}
        return monitor not in logged

    def wait(self, owner: object, action: Callable[[], None]) -> None:
        """Run ``action`` of ``owner`` when the result has arrived."""
        self._waiting[id(owner)] = action

    def restore(self) -> None:
        """Let Lightning run validations as usual again."""
        self._restores.close()

    # ----------------------------------------------------------------- internal

    def _postpone(self, config: Any) -> bool:
        """Return whether a scheduler that is due has to wait for its metric, and let it wait."""
        if not self.waits(config.monitor):
            return False
        self.wait(config, lambda: step_plateau_scheduler(self._trainer, config))
        return True

    def _is_due(self, planned: bool) -> bool:
        # Lightning would validate once more when it stops early.
        self._planned = planned and not self._stops
        return self._planned or self._lost is not None

    def _run(self, run_here: Callable[[], Any]) -> Any:
        """Validate here or let the evaluator do it, in place of Lightning's validation loop."""
        planned, self._planned = self._planned, False
        self._validate_lost(run_here)
        if not planned:
            return []
        if not self._runtime.stopped and self._server.evaluations.present:
            restart_validation_timer(self._trainer)
            if self._out is not None:
                self._warn(self._out)
                return []
            if self._request():
                return []
        self._await_result()
        self._validate_lost(run_here)
        return run_here()

    def _request(self) -> bool:
        """Request a validation. Return whether there was an evaluator for it."""
        trainer = self._trainer
        self._prepare()
        request = self._server.request_validation({"step": trainer.global_step, "epoch": trainer.current_epoch})
        if request is None:
            return False
        self._begin(request.version)
        self._out = _Validation(request, trainer.global_step, trainer.current_epoch, logged_step(trainer))
        return True

    def _await_result(self) -> None:
        """Wait until no validation is out."""
        while self._out is not None:
            try:
                self._accept(self._server.evaluations.results.get(timeout=_CHECK_SECONDS))
            except queue.Empty:
                self._server.raise_failure()

    def _accept(self, result: ValidationResult) -> None:
        out = self._out
        if out is None or result.number != out.request.number:
            return
        if result.text is None:
            self._out, self._lost = None, out
        else:
            self._act(out, json.loads(result.text))

    def _act(self, out: _Validation, result: dict[str, Any]) -> None:
        """Do what Lightning does when a validation ends."""
        self._bring_up_to_date()
        trainer, metrics = self._trainer, _tensors(result["metrics"])
        stopped_before = trainer.should_stop
        shown, logged, bar = shown_metrics(trainer)
        shown.update(metrics)
        bar.update({name: float(value) for name, value in result["bar"].items()})
        for numbers, step in result["logged"]:
            values = {name: float(value) for name, value in numbers.items()}
            logged.update(_tensors(numbers))
            self._log(values, step, out)
        self._runtime.show_global_model(out.request.buffer.tensor, out.request.version)
        # Files are named after the validation, as long as the module logs no metrics with these names.
        names = {"step": out.step, "epoch": out.epoch}
        named = {name: torch.tensor(value) for name, value in names.items() if name not in shown}
        shown.update(named)
        try:
            with self._saving_as_in(out):
                for callback in callbacks_of(trainer):
                    if isinstance(callback, (Checkpoint, EarlyStopping)):
                        callback.on_validation_end(trainer, trainer.lightning_module)
            self._out = None
            self._run_waiting(out)
        finally:
            self._out = None
            for name in named:
                shown.pop(name, None)
            self._runtime.hide_global_model()
            out.request.buffer.release()
        trainer.should_stop |= result["stop"]
        self._stops = trainer.should_stop and not stopped_before and can_stop_early(trainer)
        self._finish(result["metrics"])

    def _bring_up_to_date(self) -> None:
        """Bring the server's model up to date, which is saved in a checkpoint beside the validated model.

        Without this, a run that resumes within its synchronous beginning would begin from old weights.
        """
        self._runtime.flush_round()

    def _validate_lost(self, run_here: Callable[[], Any]) -> None:
        """Validate here what a lost evaluator has not validated, at the step to which the validation belongs."""
        lost = self._lost
        if lost is None:
            return
        self._bring_up_to_date()
        step = logged_step(self._trainer)
        set_logged_step(self._trainer, lost.logged_step)
        try:
            with self._saving_as_in(lost):
                run_here()
        finally:
            set_logged_step(self._trainer, step)
            self._lost = None
            lost.request.buffer.release()
        self._run_waiting(lost)

    def _run_waiting(self, validation: _Validation) -> None:
        waiting, self._waiting = self._waiting, {}
        with self._saving_as_in(validation):
            for action in waiting.values():
                action()

    @contextmanager
    def _saving_as_in(self, validation: _Validation) -> Iterator[None]:
        """Let callbacks save the model of a validation, whatever they have saved since."""
        with ExitStack() as stack:
            for callback in callbacks_of(self._trainer):
                stack.enter_context(saving_as_in(callback, validation.epoch))
            yield

    def _log(self, values: dict[str, float], step: int | None, out: _Validation) -> None:
        if step is None:
            own = values.pop("step", None)
            step = out.logged_step if own is None else int(own)
            if own is None:
                values.setdefault("epoch", out.epoch)
        for logger in self._trainer.loggers:
            logger.log_metrics(metrics=values, step=step)
            logger.save()

    def _warn(self, out: _Validation) -> None:
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"The evaluator still validates the model of step {out.step}, so the validation at step "
                f"{self._trainer.global_step} is skipped, and others like it. Validate less often, or use fewer "
                "validation batches."
            )


class _WaitingCallback:
    """Mixin for a callback that acts on a metric at the end of an epoch."""

    _delegated: DelegatedValidations
    monitor: str | None

    def on_train_epoch_end(self, *arguments: Any) -> None:
        act: Callable[..., None] = super().on_train_epoch_end  # type: ignore[misc]
        if self._delegated.waits(self.monitor):
            self._delegated.wait(self, lambda: act(*arguments))
        else:
            act(*arguments)


def _tensors(numbers: Mapping[str, float | str]) -> dict[str, torch.Tensor]:
    """Return the metrics of a result as tensors, as a validation in this process would show them."""
    return {name: torch.tensor(float(value)) for name, value in numbers.items()}
