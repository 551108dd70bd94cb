"""Training metrics as means over workers that log at their own speed.

``self.log`` works as usual: Lightning accumulates each rank's own values. Ranks above 0 send with every push what they
have logged since their last push. When Lightning asks for metrics on rank 0, for loggers, the progress bar or
``trainer.callback_metrics``, these values are added to rank 0's own. No rank waits for a metric.
"""

from __future__ import annotations

import json
import logging
import math
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_async_localsgd.lightning.mixed_in import mixed_in
from lightning_async_localsgd.lightning.trainer_access.metrics import (
    Metadata,
    Metrics,
    ResultCollection,
    ResultMetric,
    current_metrics,
    logger_connector,
    shown_metrics,
    step_value,
    training_results,
    update_count,
)
from lightning_async_localsgd.protocol.messages import MAX_TEXT

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.launch.rendezvous import Rendezvous
    from lightning_async_localsgd.runtime.base import Runtime

_log = logging.getLogger(__name__)

_FLAGS = {"s": "on_step", "e": "on_epoch", "l": "logger", "p": "prog_bar"}
"""Letters for the arguments of ``self.log`` in the text of a push."""


class SharedMetrics:
    """Add other workers' metrics to those that a trainer shows, until :meth:`restore`.

    A metric that is logged on every step is shown as the mean over the live workers: rank 0's value of the current step
    and, for each other worker, the mean over its latest round with this metric. A metric that is reduced over an epoch
    is shown as the reduction of rank 0's own values and of all values that others have sent since rank 0's last epoch
    end, with their weights. Metrics that rank 0 does not log itself are shown, too. The state of a
    ``torchmetrics.Metric`` stays on its rank.

    Args:
        trainer: the trainer, before its first batch.
        runtime: this rank's part in asynchronous training.

    """

    def __init__(self, trainer: pl.Trainer, runtime: Runtime) -> None:
        self._trainer = trainer
        self._side = _WorkerMetrics(trainer) if runtime.server is None else _ServerMetrics(trainer, runtime)
        if isinstance(self._side, _WorkerMetrics):
            runtime.worker.metrics = self._side.encode
        self._restore = mixed_in(logger_connector(trainer), _SharedLoggerConnector, _side=self._side)

    def validation_metrics(self) -> dict[str, float | str | None]:
        """Return the metrics of the validation that ends on rank 0, in JSON's types."""
        return {name: _json_number(value.item()) for name, value in current_metrics(self._trainer)["callback"].items()}

    def set_validation_metrics(self, validated: dict[str, float | str]) -> None:
        """Show the metrics of rank 0's latest validation in ``trainer.callback_metrics`` of another rank."""
        shown, _, _ = shown_metrics(self._trainer)
        shown.update({name: torch.tensor(float(n)) for name, n in validated.items()})

    def synchronize(self, rendezvous: Rendezvous) -> None:
        """Show rank 0's metrics on all ranks, after training."""
        mine = shown_metrics(self._trainer)
        for own, shown in zip(mine, rendezvous.broadcast(move_data_to_device(mine, "cpu")), strict=True):
            own.update(shown)

    def restore(self) -> None:
        """Make the trainer show its own metrics only."""
        self._restore()


class _SharedLoggerConnector:
    """Mixin for the trainer's logger connector."""

    _side: _WorkerMetrics | _ServerMetrics
    _first_loop_iter: bool | None

    @property
    def metrics(self) -> Metrics:
        """The values of all metrics that Lightning shows."""
        own: Metrics = super().metrics  # type: ignore[misc]
        return self._side.complete(own, on_step=self._first_loop_iter is not None)

    def update_train_step_metrics(self) -> None:
        # Lightning calls this method at the end of every batch, after all hooks.
        self._side.record_step()
        super().update_train_step_metrics()  # type: ignore[misc]

    def update_train_epoch_metrics(self) -> None:
        # Lightning calls this method at the end of every epoch, after all hooks. Accumulators are then reset.
        with self._side.ending_epoch():
            super().update_train_epoch_metrics()  # type: ignore[misc]


@dataclass
class _Sum:
    """An accumulated value, with the sum of its weights if the metric is a mean."""

    value: Tensor
    weight: Tensor | None

    @classmethod
    def of(cls, item: ResultMetric) -> _Sum:
        return cls(item.value.detach(), item.cumulated_batch_size if item.meta.is_mean_reduction else None)

    def plus(self, value: Any, weight: Any, meta: Metadata) -> _Sum:
        """Return the sum of this and another accumulated value of the same metric."""
        if meta.is_max_reduction or meta.is_min_reduction:
            choose = torch.maximum if meta.is_max_reduction else torch.minimum
            return _Sum(choose(self.value, torch.as_tensor(value).to(self.value)), None)
        return _Sum(self.value + value, None if self.weight is None else self.weight + weight)

    @property
    def result(self) -> Tensor:
        return self.value if self.weight is None else self.value / self.weight


class _WorkerMetrics:
    """Metrics that a rank above 0 has logged since its last push.

    Between pushes nothing is computed, and no device is waited for. Values of steps are collected in lists, and
    Lightning's accumulators are read when a push begins.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._results: ResultCollection = training_results(trainer)
        self._last_values: dict[str, Tensor] = {}
        self._steps: dict[str, list[Tensor]] = {}
        self._sums_before: dict[str, tuple[int, _Sum]] = {}
        self._sums: dict[str, _Sum] = {}
        self._warned = False

    def complete(self, own: Metrics, on_step: bool) -> Metrics:
        """Return the rank's own metrics unchanged."""
        return own

    def record_step(self) -> None:
        """Record the values that the current step has logged."""
        for key, item in self._shared_items():
            value = step_value(item)
            # A new value is a new tensor. A metric that was not logged in this step keeps its tensor.
            if item.meta.on_step and value is not None and value is not self._last_values.get(key):
                self._last_values[key] = value
                self._steps.setdefault(key, []).append(value.detach())

    @contextmanager
    def ending_epoch(self) -> Iterator[None]:
        """Record accumulated values before Lightning resets the accumulators at the end of an epoch."""
        self._record_sums()
        yield
        self._sums_before.clear()

    def encode(self) -> str:
        """Return all values since the last push as a JSON object, and forget them."""
        self.record_step()
        self._record_sums()
        keys = [key for key, _ in self._shared_items() if key in self._steps or key in self._sums]
        numbers: list[Tensor | None] = []
        for key in keys:
            values, total = self._steps.get(key), self._sums.get(key)
            numbers.append(torch.stack(values).mean() if values else None)
            numbers += [None, None] if total is None else [total.value, total.weight]
        plain = _to_floats(numbers)
        entries = []
        for at, key in enumerate(keys):
            meta = self._results[key].meta
            flags = "".join(letter for letter, name in _FLAGS.items() if getattr(meta, name))
            content = [meta.reduce_fx.__name__, flags, *map(_json_number, plain[3 * at : 3 * at + 3])]
            entries.append(f"{json.dumps(key)}:{json.dumps(content, separators=(',', ':'), allow_nan=False)}")
        self._steps.clear()
        self._sums.clear()
        return self._join(entries)

    def _shared_items(self) -> Iterator[tuple[str, ResultMetric]]:
        for key, item in self._results.items():
            if item.is_tensor and not item.meta.sync.rank_zero_only:
                yield key, item

    def _record_sums(self) -> None:
        """Record by how much Lightning's accumulators have grown."""
        for key, item in self._shared_items():
            if not item.meta.on_epoch or item.has_reset:
                continue
            count, now = update_count(item), _Sum.of(item)
            count_before, before = self._sums_before.get(key, (0, None))
            if count == count_before:
                continue
            self._sums_before[key] = (count, now)
            more = now
            is_sum = not (item.meta.is_max_reduction or item.meta.is_min_reduction)
            if before is not None and count > count_before and is_sum:
                weight = None if now.weight is None or before.weight is None else now.weight - before.weight
                more = _Sum(now.value - before.value, weight)
            recorded = self._sums.get(key)
            self._sums[key] = more if recorded is None else recorded.plus(more.value, more.weight, item.meta)

    def _join(self, entries: list[str]) -> str:
        """Return one JSON object with as many entries as a message holds."""
        size, fitting = 2, []
        for entry in entries:
            size += len(entry) + 1
            if size <= MAX_TEXT:
                fitting.append(entry)
        if len(fitting) < len(entries) and not self._warned:
            self._warned = True
            _log.warning(
                "%d of %d training metrics of this rank were left out, because a push holds %d characters of metrics. "
                "Rank 0 logs the left-out metrics without this rank's values; log fewer names.",
                len(entries) - len(fitting), len(entries), MAX_TEXT,
            )  # fmt: skip
        return "{" + ",".join(fitting) + "}" if fitting else ""


class _ServerMetrics:
    """Metrics that other ranks have sent to rank 0, which completes its own metrics with them."""

    def __init__(self, trainer: pl.Trainer, runtime: Runtime) -> None:
        assert runtime.server is not None
        self._trainer = trainer
        self._results: ResultCollection = training_results(trainer)
        self._server = runtime.server
        self._metas: dict[str, Metadata] = {}
        self._steps: dict[str, dict[int, float]] = {}
        self._means: dict[str, _Mean] = {}
        self._sums: dict[str, _Sum] = {}
        self._received_keys: set[str] = set()
        self._is_ending_epoch = False
        self._in_epoch = False
        self._checked_results = 0
        self._warned: set[str] = set()

    def record_step(self) -> None:
        """Record that rank 0 has taken a step in the current epoch."""
        self._in_epoch = True

    def complete(self, own: Metrics, on_step: bool) -> Metrics:
        """Add other ranks' values to rank 0's metrics.

        Args:
            own: rank 0's metrics; changed in place.
            on_step: whether these are the metrics of a step or of an epoch.

        """
        if not self._trainer.training:
            return own  # Only rank 0 validates.
        self._receive()
        self._warn_about_metric_states()
        if on_step:
            live = self._server.snapshot.workers
            for key, steps in self._steps.items():
                others = [value for worker, value in steps.items() if worker in live]
                item = self._own_item(key)
                if not others or (item is None and key not in self._received_keys):
                    continue
                value = None if item is None else step_value(item)
                mean = self._means.get(key)
                if mean is None or mean.own is not value or mean.others != others:
                    mean = self._means[key] = _Mean(value, others)
                _show(own, self._metas[key], on_step, mean)
        elif self._in_epoch:
            for key, total in self._sums.items():
                item = self._own_item(key)
                if item is not None:
                    weight = None if total.weight is None else total.weight.to(item.value)
                    total = _Sum.of(item).plus(total.value.to(item.value), weight, item.meta)
                _show(own, self._metas[key], on_step, total)
        return own

    @contextmanager
    def ending_epoch(self) -> Iterator[None]:
        """Count what has been received before the block for the ending epoch, and everything later for the next."""
        self._receive()
        self._is_ending_epoch = True
        yield
        self._is_ending_epoch = self._in_epoch = False
        self._sums.clear()
        self._received_keys.clear()

    def _own_item(self, key: str) -> ResultMetric | None:
        """Return rank 0's own accumulator of a metric, if it has logged the metric in this epoch."""
        item = self._results.get(key)
        return item if item is not None and item.is_tensor and not item.has_reset else None

    def _receive(self) -> None:
        """Add all metrics that have arrived since the last call."""
        while not self._is_ending_epoch:
            try:
                worker, text = self._server.received_metrics.get_nowait()
            except queue.Empty:
                return
            self._add_message(worker, text)

    def _add_message(self, worker: int, text: str) -> None:
        try:
            for key, (reduction, flags, *numbers) in json.loads(text).items():
                step, value, weight = (None if number is None else float(number) for number in numbers)
                if key not in self._metas:
                    logged: dict[str, Any] = {name: letter in flags for letter, name in _FLAGS.items()}
                    # Lightning's key consists of the hook and the name.
                    fx, _, name = key.partition(".")
                    self._metas[key] = Metadata(fx, name, reduce_fx=reduction, **logged)
                self._received_keys.add(key)
                if step is not None:
                    self._steps.setdefault(key, {})[worker] = step
                if value is not None:
                    self._add(key, value, weight)
        except (ValueError, TypeError, AttributeError, MisconfigurationException) as error:
            self._warn_once("unreadable", f"Metrics of worker {worker} could not be read and are left out: {error!r}")

    def _add(self, key: str, value: float, weight: float | None) -> None:
        # In double precision whatever the module's dtype, because these are sums of sums.
        amount = torch.tensor(value, dtype=torch.float64)
        share = None if weight is None else torch.tensor(weight, dtype=torch.float64)
        total = self._sums.get(key)
        self._sums[key] = _Sum(amount, share) if total is None else total.plus(amount, share, self._metas[key])

    def _warn_about_metric_states(self) -> None:
        if len(self._results) == self._checked_results:
            return
        self._checked_results = len(self._results)
        names = sorted({item.meta.name for item in self._results.values() if not item.is_tensor})
        if names:
            self._warn_once(
                "states",
                f"{', '.join(names)}: a torchmetrics.Metric that is logged in training covers rank 0's samples only, "
                "because its state stays on its rank. Log tensors, which are shown as means over workers, or use the "
                "metric in validation, where rank 0 uses all data.",
            )

    def _warn_once(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            rank_zero_warn(text)


@dataclass
class _Mean:
    """Mean of a worker's own value, if it has one, and the values of other workers."""

    own: Tensor | None
    others: list[float]

    @cached_property
    def result(self) -> Tensor:
        if self.own is None:
            return torch.tensor(sum(self.others) / len(self.others))
        return (self.own.detach() + sum(self.others)) / (1 + len(self.others))


def _show(metrics: Metrics, meta: Metadata, on_step: bool, reduced: _Sum | _Mean) -> None:
    """Write a value to all places, and under all names, where Lightning would show the metric."""
    name, value = meta.forked_name(on_step), reduced.result
    if meta.logger:
        metrics["log"][name] = value
    metrics["callback"][meta.name] = value
    metrics["callback"][name] = value
    if meta.prog_bar:
        shown = metrics["pbar"].get(name)
        if isinstance(reduced, _Mean) and shown is not None:
            # Lightning has already copied its number from the device. Another copy would wait for the device again.
            metrics["pbar"][name] = (shown + sum(reduced.others)) / (1 + len(reduced.others))
        else:
            metrics["pbar"][name] = value.item()


def _to_floats(tensors: list[Tensor | None]) -> list[float | None]:
    """Return the tensors' numbers, with one copy from each device for all tensors."""
    numbers: list[float | None] = [None] * len(tensors)
    by_device: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor is not None:
            by_device.setdefault(tensor.device, []).append(index)
    for indices in by_device.values():
        joined = torch.cat([tensor.reshape(1) for index in indices if (tensor := tensors[index]) is not None])
        for index, number in zip(indices, joined.tolist(), strict=True):
            numbers[index] = number
    return numbers


def _json_number(number: float | None) -> float | str | None:
    """Return a number with the nine digits of single precision, or a string if it is not finite, as JSON has no NaN."""
    if number is None:
        return None
    return float(f"{number:.9g}") if math.isfinite(number) else str(number)
