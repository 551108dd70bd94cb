"""The evaluator's part in a fit: it validates each model that rank 0 sends, with Lightning's own validation loop."""

from __future__ import annotations

import math
import socket
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.launch.children import report_joined
from lightning_async_localsgd.lightning.loop.optimizer_reset import torch_optimizer
from lightning_async_localsgd.lightning.loop.rank_zero_callbacks import RestingCallbacks
from lightning_async_localsgd.lightning.loop.second_moments import averaged_moments
from lightning_async_localsgd.lightning.mixed_in import mixed_in
from lightning_async_localsgd.lightning.trainer_access.callbacks import WEIGHT_AVERAGING, callbacks_of
from lightning_async_localsgd.lightning.trainer_access.loop import has_validation_batches, run_validation, set_position
from lightning_async_localsgd.lightning.trainer_access.metrics import logger_connector, shown_metrics
from lightning_async_localsgd.lightning.waiting import WaitCheck
from lightning_async_localsgd.runtime.evaluator import EvaluatorClient
from lightning_async_localsgd.runtime.optimizer_weights import OptimizerWeights

if TYPE_CHECKING:
    from collections.abc import Mapping

    import lightning.pytorch as pl

    from lightning_async_localsgd.launch.joining import JoinGrant
    from lightning_async_localsgd.lightning.loop.limits import SuspendedLimits
    from lightning_async_localsgd.protocol.options import ExchangeOptions
    from lightning_async_localsgd.server.merge_policy import MergePolicy


def check_can_evaluate(trainer: pl.Trainer) -> None:
    """Check on every rank that a run with ``evaluator=True`` has something to validate.

    Raises:
        ValueError: There is nothing to validate, or a callback validates other weights than those of the global model.

    """
    if (reason := _unfit(trainer)) is not None:
        raise ValueError(f"evaluator=True, but host {socket.gethostname()} {reason}, or use evaluator=False")


def _unfit(trainer: pl.Trainer) -> str | None:
    """Return why an evaluator with this trainer cannot validate, and the way out; None if it can."""
    if not trainer.enable_validation:
        return (
            "has no validation data; give the module a validation_step, and the Trainer a validation loader and "
            "limit_val_batches > 0"
        )
    for callback in callbacks_of(trainer):
        if isinstance(callback, WEIGHT_AVERAGING):
            return f"has {type(callback).__name__}, which validates averages that only rank 0 has; leave it out"
    return None


def evaluate(
    trainer: pl.Trainer,
    grant: JoinGrant,
    limits: SuspendedLimits,
    options: ExchangeOptions,
    policy: MergePolicy,
    frozen: bool,
) -> None:
    """Validate as the run's evaluator until training ends, then end the trainer's loop.

    Args:
        trainer: the trainer, before its first batch.
        grant: the server's permission.
        limits: the trainer's suspended limits.
        options: transport and timeouts.
        policy: how pushes are merged.
        frozen: whether frozen parameters are exchanged like trainable ones.

    """
    optimizers = trainer.strategy.optimizers
    moments = averaged_moments(policy, frozen, optimizers)
    weights = OptimizerWeights([torch_optimizer(optimizer) for optimizer in optimizers])
    check_wait = WaitCheck(trainer, needs_ranks=False)
    client = EvaluatorClient(grant, trainer.lightning_module, options, frozen, moments, weights, check_wait)
    Evaluator(trainer, client).run()
    limits.end_training(limit_reached=False)


class Evaluator:
    """Validates the models that the server sends, until training ends.

    Args:
        trainer: the trainer of this process, before its first batch.
        client: this process's end of the exchange.

    """

    def __init__(self, trainer: pl.Trainer, client: EvaluatorClient) -> None:
        self._trainer = trainer
        self._client = client

    def run(self) -> None:
        """Join the run and validate until training ends.

        Raises:
            ValueError: This process cannot validate. If training has not begun yet, the run ends with the same text on
                all hosts.
            ExchangeError: The server refuses this process, or cannot be reached any more.

        """
        trainer, reason = self._trainer, ""
        failure = _unfit(trainer)
        if failure is None and not has_validation_batches(trainer):
            failure = "has no validation data; give it the data that rank 0 has"
        if failure is not None:
            failure = f"the evaluator on host {socket.gethostname()} {failure}, or leave the evaluator out"
        resting = RestingCallbacks(trainer)
        try:
            position = self._client.join(failure)
            report_joined()
            while position is not None:
                position = self._client.answer(self._validate(position))
        except BaseException as error:
            if failure is not None:
                raise ValueError(failure) from None
            reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._client.close(reason)
            resting.restore()

    def _validate(self, position: Mapping[str, int]) -> dict[str, Any]:
        """Validate the module's weights, and return what was logged, in JSON's types."""
        trainer, records = self._trainer, list[tuple[dict[str, Any], int | None]]()
        set_position(trainer, position["step"], position["epoch"])
        shown = shown_metrics(trainer)
        for metrics in shown:
            metrics.clear()
        restore = mixed_in(logger_connector(trainer), _RecordingConnector, _records=records)
        try:
            run_validation(trainer)
        finally:
            restore()
        callback, _, progress_bar = map(_numbers, shown)
        logged = [[_numbers(metrics), step] for metrics, step in records]
        result = {"number": position["number"], "metrics": callback, "bar": progress_bar, "logged": logged}
        return {**result, "stop": bool(trainer.should_stop)}


class _RecordingConnector:
    """Mixin for the trainer's logger connector: records what would go to the loggers."""

    _records: list[tuple[dict[str, Any], int | None]]

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if metrics:
            self._records.append((dict(metrics), step))


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float | str]:
    """Return metrics as numbers, and as strings if they are not finite, as JSON has no NaN."""
    plain = {name: float(value) for name, value in metrics.items()}
    return {name: value if math.isfinite(value) else str(value) for name, value in plain.items()}
