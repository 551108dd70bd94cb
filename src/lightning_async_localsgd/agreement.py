"""What ranks agree on though each runs at its own speed: metrics, and learning rates that follow one.

What the others have logged reaches rank 0 with their pushes; what rank 0 has decided and validated reaches them with
the replies, and in full when training is over.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.messages import MAX_TEXT
from lightning_async_localsgd.metrics import SharedMetrics
from lightning_async_localsgd.plateau import FollowedPlateaus

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.phase_base import Phase
    from lightning_async_localsgd.rendezvous import Rendezvous

_log = logging.getLogger(__name__)


class Agreement:
    """Takes hold of a trainer's metrics and metric-following schedulers until :meth:`release`.

    Args:
        trainer: the trainer, about to run its first batch.
        phase: the asynchronous phase that has begun.

    Raises:
        ValueError: see :class:`~lightning_async_localsgd.plateau.FollowedPlateaus`.

    """

    def __init__(self, trainer: pl.Trainer, phase: Phase) -> None:
        self._server = phase.server
        self._worker = phase.worker
        self._rates: list[Any] = []
        self._validated: dict[str, Any] = {}
        self._heard = ""
        self._crowded = False
        self._plateaus = FollowedPlateaus(trainer, None if phase.server is None else self._tell_rates)
        self._metrics = SharedMetrics(trainer, phase)

    def follow(self) -> None:
        """Ranks above 0, after each exchange: does and knows what rank 0 had told by then."""
        text = "" if self._worker.reply is None else self._worker.reply.shared
        if self._server is None and text not in ("", self._heard):
            self._heard = text
            told = json.loads(text)
            self._plateaus.follow(told["rates"])
            self._metrics.learn(told["validated"])

    def end_validation(self) -> None:
        """Rank 0 has validated, and knows the outcome."""
        self._validated = self._metrics.validated()
        self._tell()

    def agree(self, rendezvous: Rendezvous) -> None:
        """When training is over: all ranks have the same rates, and show the same metrics."""
        self._plateaus.follow(rendezvous.broadcast(self._rates))
        self._metrics.agree(rendezvous)

    def release(self) -> None:
        """Gives everything back to Lightning."""
        self._plateaus.release()
        self._metrics.release()

    def _tell_rates(self, rates: list[Any]) -> None:
        self._rates = rates
        self._tell()

    def _tell(self) -> None:
        assert self._server is not None
        told: dict[str, Any] = {"rates": self._rates, "validated": {}}
        room = MAX_TEXT - len(json.dumps(told, allow_nan=False))
        for name, value in self._validated.items():
            room -= len(json.dumps({name: value}, allow_nan=False))
            if room >= 0:
                told["validated"][name] = value
        if room < 0 and not self._crowded:
            self._crowded = True
            _log.warning(
                "%d of %d validation metrics reach ranks above 0 only when training is over: a reply has room for %d "
                "characters; log fewer names if callbacks on other ranks read them in trainer.callback_metrics",
                len(self._validated) - len(told["validated"]), len(self._validated), MAX_TEXT,
            )  # fmt: skip
        self._server.share(json.dumps(told, allow_nan=False))
