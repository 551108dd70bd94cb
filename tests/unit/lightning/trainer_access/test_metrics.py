"""What trainer_access does to a Trainer's logged metrics."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torchmetrics
from torch import Tensor, nn

from lightning_async_localsgd.lightning.mixed_in import mixed_in
from lightning_async_localsgd.lightning.trainer_access import metrics
from tests.unit.lightning.trainer_access.support import RecordingLogger, at, fit


def test_loggers_and_progress_bars_read_metrics_from_the_logger_connector() -> None:
    class Doubled:
        calls: list[str]
        _first_loop_iter: bool | None

        @property
        def metrics(self) -> Any:
            shown = super().metrics  # type: ignore[misc]
            self.calls.append("step" if self._first_loop_iter is not None else "epoch")
            return {kind: {name: 2 * value for name, value in values.items()} for kind, values in shown.items()}

        def update_train_step_metrics(self) -> None:
            self.calls.append("after a batch")
            super().update_train_step_metrics()  # type: ignore[misc]

        def update_train_epoch_metrics(self) -> None:
            self.calls.append("after an epoch")
            super().update_train_epoch_metrics()  # type: ignore[misc]

    calls: list[str] = []
    callback, _ = at(on_train_start=lambda trainer: mixed_in(metrics.logger_connector(trainer), Doubled, calls=calls))
    logger = RecordingLogger()
    trainer = fit(callback, batches=2, logger=logger, log_every_n_steps=1)
    assert [entry["value_step"] for entry in logger.metrics[:2]] == [2.0, 4.0]
    assert logger.metrics[2]["value_epoch"] == 3.0
    assert trainer.callback_metrics["value"] == 3.0
    assert trainer.progress_bar_metrics["value_step"] == 4.0
    assert [call for call in calls if call.startswith("after")] == ["after a batch", "after a batch", "after an epoch"]
    assert "epoch" not in calls[: calls.index("after a batch")]
    assert "step" not in calls[calls.index("after an epoch") :]


def test_loggers_get_the_metrics_of_every_nth_step() -> None:
    callback, results = at(on_train_batch_end=metrics.logs_this_step)
    logger = RecordingLogger()
    fit(callback, batches=4, logger=logger, log_every_n_steps=2)
    assert results["on_train_batch_end"] == [False, True, False, True]
    assert logger.steps[:2] == [1, 3]


def test_training_results_are_sums_over_the_epoch() -> None:
    def sums(trainer: L.Trainer) -> tuple[type, float, int, bool]:
        results = metrics.training_results(trainer)
        assert isinstance(results, metrics.ResultCollection)
        metric = results["training_step.value"]
        return type(metric), metric.value.item(), int(metric.cumulated_batch_size), metric.has_reset

    callback, results = at(on_train_batch_end=sums, on_train_end=sums)
    fit(callback, batches=3)
    kind = metrics.ResultMetric
    assert results["on_train_batch_end"] == [(kind, 2.0, 2, False), (kind, 6.0, 4, False), (kind, 12.0, 6, False)]
    assert results["on_train_end"] == [(kind, 0.0, 0, True)]


def test_last_logged_value_and_number_of_values_can_be_read() -> None:
    def last(trainer: L.Trainer) -> tuple[Tensor, int]:
        metric = metrics.training_results(trainer)["training_step.value"]
        value = metrics.step_value(metric)
        assert value is not None
        return value, metrics.update_count(metric)

    callback, results = at(on_train_batch_end=last)
    fit(callback, batches=2, max_epochs=2)
    values, counts = zip(*results["on_train_batch_end"], strict=True)
    assert [value.item() for value in values] == [1.0, 2.0, 3.0, 4.0]
    assert len({id(value) for value in values}) == 4
    assert counts == (1, 2, 1, 2)


def test_current_metrics_are_step_values_and_at_the_end_of_the_epoch_epoch_values() -> None:
    callback, results = at(
        on_train_batch_end=lambda trainer: dict(metrics.current_metrics(trainer)["callback"]),
        on_train_epoch_end=lambda trainer: dict(metrics.current_metrics(trainer)["callback"]),
    )
    fit(callback, batches=2)
    assert results["on_train_batch_end"] == [{"value": n, "value_step": n} for n in (1.0, 2.0)]
    assert results["on_train_epoch_end"] == [{"value": 1.5, "value_epoch": 1.5}]


def test_shown_metrics_can_be_changed() -> None:
    def write(trainer: L.Trainer) -> None:
        for kind, values in enumerate(metrics.shown_metrics(trainer)):
            values["written"] = torch.tensor(float(kind))

    callback, _ = at(on_train_end=write)
    trainer = fit(callback)
    assert trainer.callback_metrics["written"] == 0.0
    assert trainer.logged_metrics["written"] == 1.0
    assert trainer.progress_bar_metrics["written"] == 2.0


def test_metadata_gives_the_names_and_the_reduction_of_a_metric() -> None:
    metadata = metrics.Metadata("training_step", "value", reduce_fx="max", on_step=True)  # type: ignore[arg-type]
    assert metadata.is_max_reduction
    assert [metadata.forked_name(on_step) for on_step in (True, False)] == ["value_step", "value_epoch"]
    empty = metrics.Metrics(callback={}, log={}, pbar={})
    assert empty == {"callback": {}, "log": {}, "pbar": {}}


def test_states_of_unequal_dtypes_are_gathered_as_double_until_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[torch.dtype] = []

    def gather(state: Tensor, group: Any = None) -> list[Tensor]:
        gathered.append(state.dtype)
        return [state, state]

    def own(state: Tensor, group: Any = None) -> list[Tensor]:
        raise AssertionError("no state is gathered in this way")

    monkeypatch.setattr(metrics, "gather_all_tensors", gather)
    auroc, others = torchmetrics.AUROC("binary"), torchmetrics.AUROC("binary", dist_sync_fn=own)
    restore = metrics.gather_states_of_unequal_dtypes(nn.ModuleDict({"mine": nn.Sequential(auroc), "own": others}))
    auroc.update(torch.tensor([0.25, 0.75]).bfloat16(), torch.tensor([0, 1]))
    auroc.sync(dist_sync_fn=auroc.dist_sync_fn, distributed_available=lambda: True)
    assert gathered == [torch.float64, torch.int64]
    assert auroc.preds.dtype == torch.bfloat16
    assert auroc.preds.tolist() == [0.25, 0.75] * 2
    assert others.dist_sync_fn is own
    restore()
    assert auroc.dist_sync_fn is None
    assert others.dist_sync_fn is own
