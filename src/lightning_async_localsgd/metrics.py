"""Training metrics as means over workers, though every rank logs at its own speed.

``self.log`` stays what it is: each rank collects its own values in Lightning's result collection. Ranks above 0 hand in
with every push what was logged since the push before, and rank 0 adds that to its own values at the moment Lightning
asks for them: for the loggers, the progress bar and ``trainer.callback_metrics``. Nobody waits for a metric.
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
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_async_localsgd.messages import MAX_TEXT

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.trainer.connectors.logger_connector.result import _METRICS, _ResultCollection, _ResultMetric

    from lightning_async_localsgd.phase_base import Phase
    from lightning_async_localsgd.rendezvous import Rendezvous

_log = logging.getLogger(__name__)

_LETTERS = {"s": "on_step", "e": "on_epoch", "l": "logger", "p": "prog_bar"}
"""How a metric was logged, in the text of a push."""


class SharedMetrics:
    """Takes hold of a trainer's logger connector until :meth:`release`.

    Of a metric that is logged on every step, rank 0 shows the mean over the live workers: its own value of this step,
    and of each other worker the mean over the latest round in which it was logged. Of a metric that is reduced over an
    epoch it shows what its own samples and all that others have handed in since its last epoch end come to, each with
    its weight. Metrics that rank 0 itself does not log arrive as well. The state of a ``torchmetrics.Metric`` stays on
    its rank.

    Args:
        trainer: the trainer, about to run its first batch.
        phase: the asynchronous phase that has begun.

    """

    def __init__(self, trainer: pl.Trainer, phase: Phase) -> None:
        self._side = _HandedIn(trainer) if phase.server is None else _Collected(trainer, phase)
        if isinstance(self._side, _HandedIn):
            phase.worker.metrics = self._side.text
        self._connector = connector = trainer._logger_connector
        self._own_class = own = type(connector)
        connector.__class__ = type(own.__name__, (_Sharing, own), {"__module__": own.__module__, "_side": self._side})

    def validated(self) -> dict[str, float | str | None]:
        """Rank 0, at the end of a validation: what it came to, for JSON."""
        return {name: _encoded(value.item()) for name, value in self._connector.metrics["callback"].items()}

    def learn(self, validated: dict[str, float | str]) -> None:
        """Ranks above 0: the outcome of rank 0's latest validation, for whoever reads ``trainer.callback_metrics``."""
        self._connector._callback_metrics.update({name: torch.tensor(float(n)) for name, n in validated.items()})

    def agree(self, rendezvous: Rendezvous) -> None:
        """When training is over: every rank shows what rank 0 does."""
        connector = self._connector
        mine: list[dict[str, Any]] = [
            connector._callback_metrics, connector._logged_metrics, connector._progress_bar_metrics
        ]  # fmt: skip
        for own, shown in zip(mine, rendezvous.broadcast(move_data_to_device(mine, "cpu")), strict=True):
            own.update(shown)

    def release(self) -> None:
        """Gives the logger connector back."""
        self._connector.__class__ = self._own_class


class _Sharing:
    """Mixed into the class of the trainer's logger connector while ranks run asynchronously."""

    _side: _HandedIn | _Collected
    _first_loop_iter: bool | None

    @property
    def metrics(self) -> _METRICS:
        """All that Lightning shows of metrics comes from here."""
        own: _METRICS = super().metrics  # type: ignore[misc]
        return self._side.completed(own, on_step=self._first_loop_iter is not None)

    def update_train_step_metrics(self) -> None:
        """Called at the end of every batch, after all hooks."""
        self._side.note_step()
        super().update_train_step_metrics()  # type: ignore[misc]

    def update_train_epoch_metrics(self) -> None:
        """Called at the end of every epoch, after all hooks; results start anew with it."""
        with self._side.epoch_end():
            super().update_train_epoch_metrics()  # type: ignore[misc]


@dataclass
class _Sum:
    """An accumulated value, and the weight that goes with it where it is a mean."""

    value: Tensor
    weight: Tensor | None

    @classmethod
    def of(cls, item: _ResultMetric) -> _Sum:
        return cls(item.value.detach(), item.cumulated_batch_size if item.meta.is_mean_reduction else None)

    def plus(self, value: Any, weight: Any, meta: _Metadata) -> _Sum:
        """Together with another sum of the same metric."""
        if meta.is_max_reduction or meta.is_min_reduction:
            pick = torch.maximum if meta.is_max_reduction else torch.minimum
            return _Sum(pick(self.value, torch.as_tensor(value).to(self.value)), None)
        return _Sum(self.value + value, None if self.weight is None else self.weight + weight)

    @property
    def result(self) -> Tensor:
        return self.value if self.weight is None else self.value / self.weight


class _HandedIn:
    """Ranks above 0: what was logged since the last push.

    Nothing is computed and no device waited for between pushes: a step's value is put on a list, and Lightning's own
    accumulators are read when there is a push.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._results: _ResultCollection = trainer.fit_loop.epoch_loop._results
        self._last: dict[str, Tensor] = {}
        self._steps: dict[str, list[Tensor]] = {}
        self._seen: dict[str, tuple[int, _Sum]] = {}
        self._sums: dict[str, _Sum] = {}
        self._crowded = False

    def completed(self, own: _METRICS, on_step: bool) -> _METRICS:
        """A rank above 0 sees its own values."""
        return own

    def note_step(self) -> None:
        """Takes note of what the step has logged."""
        for key, item in self._shared():
            value = item._forward_cache
            # A new value is a new tensor; a metric that is not logged in every step keeps the one that it has.
            if item.meta.on_step and value is not None and value is not self._last.get(key):
                self._last[key] = value
                self._steps.setdefault(key, []).append(value.detach())

    @contextmanager
    def epoch_end(self) -> Iterator[None]:
        """Keeps what is still to be handed in when the results start anew."""
        self._note_sums()
        yield
        self._seen.clear()

    def text(self) -> str:
        """For a push: all that has been noted since the last one, as a JSON object."""
        self.note_step()
        self._note_sums()
        keys = [key for key, _ in self._shared() if key in self._steps or key in self._sums]
        numbers: list[Tensor | None] = []
        for key in keys:
            values, total = self._steps.get(key), self._sums.get(key)
            numbers.append(torch.stack(values).mean() if values else None)
            numbers += [None, None] if total is None else [total.value, total.weight]
        plain = _floats(numbers)
        entries = []
        for at, key in enumerate(keys):
            meta = self._results[key].meta
            flags = "".join(letter for letter, name in _LETTERS.items() if getattr(meta, name))
            content = [meta.reduce_fx.__name__, flags, *map(_encoded, plain[3 * at : 3 * at + 3])]
            entries.append(f"{json.dumps(key)}:{json.dumps(content, separators=(',', ':'), allow_nan=False)}")
        self._steps.clear()
        self._sums.clear()
        return self._fitted(entries)

    def _shared(self) -> Iterator[tuple[str, _ResultMetric]]:
        for key, item in self._results.items():
            if item.is_tensor and not item.meta.sync.rank_zero_only:
                yield key, item

    def _note_sums(self) -> None:
        for key, item in self._shared():
            if not item.meta.on_epoch or item.has_reset:
                continue
            count, now = int(item._update_count), _Sum.of(item)
            before, seen = self._seen.get(key, (0, None))
            if count == before:
                continue
            self._seen[key] = (count, now)
            more = now
            if seen is not None and count > before and not (item.meta.is_max_reduction or item.meta.is_min_reduction):
                weight = None if now.weight is None or seen.weight is None else now.weight - seen.weight
                more = _Sum(now.value - seen.value, weight)
            kept = self._sums.get(key)
            self._sums[key] = more if kept is None else kept.plus(more.value, more.weight, item.meta)

    def _fitted(self, entries: list[str]) -> str:
        """The entries as one object, as many as a message may hold."""
        size, fitting = 2, []
        for entry in entries:
            size += len(entry) + 1
            if size <= MAX_TEXT:
                fitting.append(entry)
        if len(fitting) < len(entries) and not self._crowded:
            self._crowded = True
            _log.warning(
                "%d of %d training metrics of this rank were left out: a push has room for %d characters of them; of "
                "those that don't fit, rank 0 logs the values of other ranks only; log fewer names",
                len(entries) - len(fitting), len(entries), MAX_TEXT,
            )  # fmt: skip
        return "{" + ",".join(fitting) + "}" if fitting else ""


class _Collected:
    """Rank 0: what the others have handed in, added to its own values whenever Lightning asks for these."""

    def __init__(self, trainer: pl.Trainer, phase: Phase) -> None:
        assert phase.server is not None
        self._trainer = trainer
        self._results: _ResultCollection = trainer.fit_loop.epoch_loop._results
        self._server = phase.server
        self._metas: dict[str, _Metadata] = {}
        self._steps: dict[str, dict[int, float]] = {}
        self._means: dict[str, _Mean] = {}
        self._sums: dict[str, _Sum] = {}
        self._fresh: dict[str, None] = {}
        self._closing = False
        self._in_epoch = False
        self._looked_at = 0
        self._told: set[str] = set()

    def note_step(self) -> None:
        """Rank 0's own step is shown as it is; an epoch has begun with it."""
        self._in_epoch = True

    def completed(self, own: _METRICS, on_step: bool) -> _METRICS:
        """Rank 0's own metrics with those of the others.

        Args:
            own: what Lightning shows without the others; changed in place.
            on_step: whether it is about the step, or the epoch.

        """
        if not self._trainer.training:
            return own  # Validation is rank 0's alone.
        self._drain()
        self._tell_of_states()
        if on_step:
            live = self._server.view.workers
            for key, steps in self._steps.items():
                others = [value for worker, value in steps.items() if worker in live]
                item = self._mine(key)
                if not others or (item is None and key not in self._fresh):
                    continue
                value = None if item is None else item._forward_cache
                mean = self._means.get(key)
                if mean is None or mean.own is not value or mean.others != others:
                    mean = self._means[key] = _Mean(value, others)
                _show(own, self._metas[key], on_step, mean)
        elif self._in_epoch:
            for key, total in self._sums.items():
                item = self._mine(key)
                if item is not None:
                    weight = None if total.weight is None else total.weight.to(item.value)
                    total = _Sum.of(item).plus(total.value.to(item.value), weight, item.meta)
                _show(own, self._metas[key], on_step, total)
        return own

    @contextmanager
    def epoch_end(self) -> Iterator[None]:
        """What has been handed in so far belongs to the epoch that ends, what comes now to the next one."""
        self._drain()
        self._closing = True
        yield
        self._closing = self._in_epoch = False
        self._sums.clear()
        self._fresh.clear()

    def _mine(self, key: str) -> _ResultMetric | None:
        """What rank 0 itself has logged under this key since the results began anew."""
        item = self._results.get(key)
        return item if item is not None and item.is_tensor and not item.has_reset else None

    def _drain(self) -> None:
        """Takes what has arrived in the meantime."""
        while not self._closing:
            try:
                worker, text = self._server.received_metrics.get_nowait()
            except queue.Empty:
                return
            self._take(worker, text)

    def _take(self, worker: int, text: str) -> None:
        try:
            for key, (reduction, flags, *numbers) in json.loads(text).items():
                step, value, weight = (None if number is None else float(number) for number in numbers)
                if key not in self._metas:
                    logged: dict[str, Any] = {name: letter in flags for letter, name in _LETTERS.items()}
                    # Lightning's key: the hook, then the name.
                    fx, _, name = key.partition(".")
                    self._metas[key] = _Metadata(fx, name, reduce_fx=reduction, **logged)
                self._fresh[key] = None
                if step is not None:
                    self._steps.setdefault(key, {})[worker] = step
                if value is not None:
                    self._add(key, value, weight)
        except (ValueError, TypeError, AttributeError, MisconfigurationException) as error:
            self._tell("unreadable", f"what worker {worker} has logged could not be read, and is left out: {error!r}")

    def _add(self, key: str, value: float, weight: float | None) -> None:
        # In double precision, whatever the module computes in: these are sums of sums.
        amount = torch.tensor(value, dtype=torch.float64)
        share = None if weight is None else torch.tensor(weight, dtype=torch.float64)
        total = self._sums.get(key)
        self._sums[key] = _Sum(amount, share) if total is None else total.plus(amount, share, self._metas[key])

    def _tell_of_states(self) -> None:
        if len(self._results) == self._looked_at:
            return
        self._looked_at = len(self._results)
        names = sorted({item.meta.name for item in self._results.values() if not item.is_tensor})
        if names:
            self._tell(
                "states",
                f"{', '.join(names)}: what is logged in training as a torchmetrics.Metric shows the samples of rank 0 "
                "only, because the state of a metric stays on its rank while ranks run at their own speed; log "
                "tensors, which arrive as means over workers, or use the metric in validation, which rank 0 runs on "
                "all data",
            )

    def _tell(self, what: str, text: str) -> None:
        if what not in self._told:
            self._told.add(what)
            rank_zero_warn(text)


@dataclass
class _Mean:
    """The mean of a worker's own value, if it has one, and those of others."""

    own: Tensor | None
    others: list[float]

    @cached_property
    def result(self) -> Tensor:
        if self.own is None:
            return torch.tensor(sum(self.others) / len(self.others))
        return (self.own.detach() + sum(self.others)) / (1 + len(self.others))


def _show(metrics: _METRICS, meta: _Metadata, on_step: bool, found: _Sum | _Mean) -> None:
    """Puts a value everywhere that Lightning would put it, under the names that it builds."""
    name, value = meta.forked_name(on_step), found.result
    if meta.logger:
        metrics["log"][name] = value
    metrics["callback"][meta.name] = value
    metrics["callback"][name] = value
    if meta.prog_bar:
        shown = metrics["pbar"].get(name)
        if isinstance(found, _Mean) and shown is not None:
            # Lightning has waited for the device already; the plain number is at hand.
            metrics["pbar"][name] = (shown + sum(found.others)) / (1 + len(found.others))
        else:
            metrics["pbar"][name] = value.item()


def _floats(tensors: list[Tensor | None]) -> list[float | None]:
    """Plain numbers, with one copy from each device for all of them."""
    plain: list[float | None] = [None] * len(tensors)
    places: dict[torch.device, list[int]] = {}
    for at, tensor in enumerate(tensors):
        if tensor is not None:
            places.setdefault(tensor.device, []).append(at)
    for at_once in places.values():
        there = torch.cat([tensor.reshape(1) for at in at_once if (tensor := tensors[at]) is not None])
        for at, number in zip(at_once, there.tolist(), strict=True):
            plain[at] = number
    return plain


def _encoded(number: float | None) -> float | str | None:
    """For JSON, which knows no NaN: with the nine digits that a number of single precision has."""
    if number is None:
        return None
    return float(f"{number:.9g}") if math.isfinite(number) else str(number)
