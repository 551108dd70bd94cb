"""Metrics, and learning rates that follow a metric, on ranks that run at their own speed.

Metrics that other ranks have logged reach rank 0 with their pushes. Rank 0's learning rates and validation metrics
reach the other ranks with the replies, and completely after training.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.lightning.loop.metrics import SharedMetrics
from lightning_async_localsgd.lightning.loop.plateau import PlateauSync
from lightning_async_localsgd.protocol.messages import MAX_TEXT

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.launch.rendezvous import Rendezvous
    from lightning_async_localsgd.runtime.base import Runtime

_log = logging.getLogger(__name__)


class MetricSync:
    """Synchronize a trainer's metrics and the schedulers that follow a metric, until :meth:`restore`.

    Args:
        trainer: the trainer, before its first batch.
        runtime: this rank's part in asynchronous training.

    Raises:
        ValueError: see :class:`.PlateauSync`.

    """

    def __init__(self, trainer: pl.Trainer, runtime: Runtime) -> None:
        self._server = runtime.server
        self._worker = runtime.worker
        self._rates: list[Any] = []
        self._validated: dict[str, Any] = {}
        self._received = ""
        self._warned = False
        self._plateaus = PlateauSync(trainer, None if runtime.server is None else self._send_rates)
        self._metrics = SharedMetrics(trainer, runtime)

    def receive(self) -> None:
        """Apply what rank 0 has sent with the latest reply, on other ranks."""
        text = "" if self._worker.reply is None else self._worker.reply.broadcast
        if self._server is None and text not in ("", self._received):
            self._received = text
            content = json.loads(text)
            self._plateaus.apply(content["rates"])
            self._metrics.set_validation_metrics(content["validated"])

    def end_validation(self, validated: dict[str, Any] | None = None) -> None:
        """Send the metrics of a validation that has ended.

        Args:
            validated: the metrics in JSON's types; None for those of the validation that ends on rank 0.

        """
        self._validated = self._metrics.validation_metrics() if validated is None else validated
        self._send()

    def synchronize(self, rendezvous: Rendezvous) -> None:
        """Give all ranks rank 0's learning rates and metrics, after training."""
        self._plateaus.apply(rendezvous.broadcast(self._rates))
        self._metrics.synchronize(rendezvous)

    def restore(self) -> None:
        """Restore the trainer's schedulers and metrics."""
        self._plateaus.restore()
        self._metrics.restore()

    def _send_rates(self, rates: list[Any]) -> None:
        self._rates = rates
        self._send()

    def _send(self) -> None:
        assert self._server is not None
        content: dict[str, Any] = {"rates": self._rates, "validated": {}}
        room = MAX_TEXT - len(json.dumps(content, allow_nan=False))
        for name, value in self._validated.items():
            room -= len(json.dumps({name: value}, allow_nan=False))
            if room >= 0:
                content["validated"][name] = value
        if room < 0 and not self._warned:
            self._warned = True
            _log.warning(
                "%d of %d validation metrics reach other ranks only after training, because a reply holds %d "
                "characters of them. If callbacks on other ranks read trainer.callback_metrics during training, log "
                "fewer names.",
                len(self._validated) - len(content["validated"]), len(self._validated), MAX_TEXT,
            )  # fmt: skip
        self._server.broadcast(json.dumps(content, allow_nan=False))
