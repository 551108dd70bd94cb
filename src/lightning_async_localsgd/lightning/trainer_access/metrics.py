"""Logged metrics: Lightning's accumulators, and the values that it shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _METRICS,
    _Metadata,
    _ResultCollection,
    _ResultMetric,
)
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch import Tensor, nn

Metadata = _Metadata
"""How a metric was logged: the arguments of ``self.log``."""

ResultMetric = _ResultMetric
"""Accumulator of one logged metric. ``value`` and ``cumulated_batch_size`` are sums since the epoch's beginning."""

ResultCollection = _ResultCollection
"""The accumulators by key, ``"<hook>.<name>"``."""

Metrics = _METRICS
"""Values by name, for callbacks (``"callback"``), loggers (``"log"``) and the progress bar (``"pbar"``)."""


def logger_connector(trainer: pl.Trainer) -> Any:
    """Return the object whose ``metrics`` give every metric that Lightning shows.

    Lightning calls its ``update_train_step_metrics`` after every batch, and ``update_train_epoch_metrics`` after every
    epoch. Its attribute ``_first_loop_iter`` is None outside of an epoch's batches.
    """
    return trainer._logger_connector


def logs_this_step(trainer: pl.Trainer) -> bool:
    """Return whether the loggers get the current step's metrics, according to ``log_every_n_steps``."""
    return bool(trainer._logger_connector.should_update_logs)


def training_results(trainer: pl.Trainer) -> ResultCollection:
    """Return the accumulators of the metrics that are logged in training."""
    return trainer.fit_loop.epoch_loop._results


def current_metrics(trainer: pl.Trainer) -> Metrics:
    """Return the values of the running stage's metrics: of the current step or, after the last batch, of the epoch."""
    return trainer._logger_connector.metrics


def shown_metrics(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """Return ``trainer.callback_metrics``, ``logged_metrics`` and ``progress_bar_metrics`` as they can be written to.

    The trainer's attributes of these names compute metrics first. In training Lightning updates these dictionaries
    after every batch and every epoch.
    """
    connector = trainer._logger_connector
    return [connector._callback_metrics, connector._logged_metrics, connector._progress_bar_metrics]


def step_value(metric: ResultMetric) -> Tensor | None:
    """Return the value that was logged last with ``on_step=True``. Each call of ``self.log`` makes a new tensor."""
    return metric._forward_cache


def update_count(metric: ResultMetric) -> int:
    """Return how often the metric was logged since its accumulator was reset."""
    return int(metric._update_count)


def gather_states_of_unequal_dtypes(module: nn.Module) -> Callable[[], None]:
    """Let a module's metrics gather their states from ranks with other dtypes, until the returned function is called.

    Metrics of torchmetrics gather their states by themselves, not through the strategy. Some keep the predictions in
    the dtype in which they get them. Metrics that have a ``dist_sync_fn`` of their own keep it.
    """
    metrics = [each for each in module.modules() if isinstance(each, Metric) and each.dist_sync_fn is None]
    for metric in metrics:
        metric.dist_sync_fn = _gather_as_double

    def restore() -> None:
        for metric in metrics:
            metric.dist_sync_fn = None

    return restore


def _gather_as_double(state: Tensor, group: Any | None = None) -> list[Tensor]:
    if not state.is_floating_point():
        return gather_all_tensors(state, group)
    return [each.to(state.dtype) for each in gather_all_tensors(state.double(), group)]
