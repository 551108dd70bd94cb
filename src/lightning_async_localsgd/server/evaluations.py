"""The server's side of the evaluator: a process that validates the global model, and that is not a worker.

Rank 0 requests a validation of the model as it is now. The evaluator gets this model as the answer to its last message,
and its next message has the metrics. At most one validation is out at a time.
"""

from __future__ import annotations

import json
import logging
import queue
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_async_localsgd.protocol.buffers import BufferPool
from lightning_async_localsgd.protocol.messages import Reply

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning_async_localsgd.protocol.buffers import PooledBuffer
    from lightning_async_localsgd.protocol.messages import Hello, Push
    from lightning_async_localsgd.protocol.ports import ReplyChannel
    from lightning_async_localsgd.server.global_model import GlobalModel

_log = logging.getLogger(__name__)

_MAX_BUFFERS = 4
"""Models that may exist for the evaluator: the one that is validated, and those whose transfer was interrupted."""

_ENDED = "training has ended"
"""What an evaluator is told that sends something after the end."""


@dataclass(frozen=True)
class ValidationRequest:
    """A validation that was requested.

    Args:
        number: counts the requests of a run from 1.
        version: version of the global model to validate.
        buffer: holds this model, flat fp32. Rank 0 releases it when it needs the model no more.

    """

    number: int
    version: int
    buffer: PooledBuffer


@dataclass(frozen=True)
class ValidationResult:
    """What has become of a requested validation.

    Args:
        number: number of the request.
        text: what the evaluator has sent; None if the evaluator was lost.

    """

    number: int
    text: str | None


class Evaluations:
    """Sends models to the evaluator and receives the results.

    Belongs to the server's owner thread, except :attr:`present` and :attr:`results`. The evaluator says hello, gets the
    model at once, and reports with its first push whether it can validate. Each later push has a result. A push that
    is sent again is answered again.

    Args:
        incarnation: random name of this start of the server.
        numel: number of elements of the model.

    Attributes:
        present: whether there is an evaluator that can validate.
        results: results of requested validations, and losses of the evaluator while one was out.

    """

    def __init__(self, incarnation: str, numel: int) -> None:
        self.present = False
        self.results: queue.SimpleQueue[ValidationResult] = queue.SimpleQueue()
        self._incarnation = incarnation
        self._pool = BufferPool(numel, max_active=_MAX_BUFFERS, max_total=_MAX_BUFFERS)
        self._session: str | None = None
        self._live = False
        self._ready = False
        self._channel: ReplyChannel | None = None
        self._sequence = 0
        self._waits = False
        self._number = 0
        self._request: ValidationRequest | None = None
        self._position = self._shared = ""
        self._over = False
        # Why the present session cannot validate.
        self._unfit: str | None = None

    # ------------------------------------------------------------ the evaluator

    def check_join(self) -> str | None:
        """Return why no evaluator can join; None if one can."""
        if self._over:
            return "training is over"
        return "the run has an evaluator already; a run has at most one" if self._live else None

    def join(self, hello: Hello, channel: ReplyChannel, model: GlobalModel) -> str | None:
        """Handle the evaluator's hello. Return why it is refused for good; None if it is not."""
        if self._over:
            return _ENDED
        if hello.session != self._session:
            if (reason := self.check_join()) is not None or hello.reconnecting:
                return reason or "another evaluator has replaced this one"
            self._session, self._sequence, self._ready, self._unfit = hello.session, 0, False, None
        if self._unfit is not None:
            return self._unfit
        self._channel = channel
        self._set_live(True)
        self._waits = False
        if not hello.reconnecting and self._sequence == 0:
            buffer = self._pool.try_acquire()
            if buffer is None:
                return "the transfers of earlier evaluators are not over; try again later"
            model.copy_to(buffer.tensor)
            channel.dispatch(self._reply(model.version), buffer)
        return None

    def push(self, push: Push, channel: ReplyChannel) -> str | None:
        """Handle the evaluator's report or result.

        Returns:
            Why this evaluator cannot validate, which the caller has to act on; None if it can.

        """
        if push.session != self._session:
            channel.refuse("another evaluator has replaced this one")
            return None
        if self._over or self._unfit is not None:
            channel.refuse(self._unfit or _ENDED)
            return None
        self._channel, self._waits = channel, True
        if push.sequence > self._sequence:
            self._sequence = push.sequence
            if push.stop:
                return push.metrics
            if not self._ready:
                self._ready = True
                _log.warning("an evaluator has joined the run, and validates for rank 0")
            elif (request := self._request) is not None and _number_in(push.metrics) == request.number:
                self._request = None
                self.results.put(ValidationResult(request.number, push.metrics))
        self._set_live(True)
        self._send()
        return None

    def lose(self, session: str, reason: str) -> None:
        """Handle the loss of the evaluator. What it was validating is reported as lost."""
        if session != self._session or not self._live:
            return
        self._set_live(False)
        self._channel = None
        if self._over:
            return
        _log.warning("the evaluator left the run (%s); rank 0 validates again", reason)
        self._report_loss()

    def dismiss(self, reason: str) -> None:
        """Refuse an evaluator that cannot validate. Training has begun, and goes on without the evaluator."""
        _log.warning("%s. Training goes on, and rank 0 validates", reason)
        self._unfit = reason
        self.refuse(reason)
        self._report_loss()

    def revive(self, session: str) -> None:
        """Handle a sign of life of an evaluator that was lost."""
        if session == self._session and not (self._live or self._over or self._unfit):
            self._set_live(True)
            _log.warning("the evaluator is back, and validates for rank 0")

    def refuse(self, reason: str) -> None:
        """Refuse the evaluator for good."""
        channel, self._channel = self._channel, None
        self._set_live(False)
        if channel is not None:
            channel.refuse(reason)

    # ------------------------------------------------------------------- rank 0

    def begin(self, model: GlobalModel, position: Mapping[str, int], shared: str = "") -> ValidationRequest | None:
        """Request a validation of the model as it is now.

        Args:
            model: the global model.
            position: where the run is, for the evaluator's trainer.
            shared: see :attr:`.Reply.shared`.

        Returns:
            The request; None if there is no evaluator, or one validation is out already.

        """
        buffer = None if not self.present or self._request is not None else self._pool.try_acquire()
        if buffer is None:
            return None
        model.copy_to(buffer.tensor)
        self._number += 1
        self._request = ValidationRequest(self._number, model.version, buffer)
        self._position, self._shared = json.dumps({**position, "number": self._number}), shared
        self._send()
        return self._request

    def end(self, model: GlobalModel) -> None:
        """End the evaluator, because training is over. May be called twice."""
        if self._over:
            return
        self._over = True
        self._request = None
        self.present = False
        if self._waits and self._channel is not None and (buffer := self._pool.try_acquire()) is not None:
            model.copy_to(buffer.tensor)
            self._channel.dispatch(self._reply(model.version, stop=True), buffer)
            self._waits = False
        else:
            self.refuse(_ENDED)

    # ----------------------------------------------------------------- internal

    def _set_live(self, live: bool) -> None:
        self._live = live
        self.present = live and self._ready and not self._over

    def _report_loss(self) -> None:
        """Report the validation that is out as lost."""
        request, self._request = self._request, None
        if request is not None:
            self.results.put(ValidationResult(request.number, None))

    def _send(self) -> None:
        """Send the requested validation's model, if the evaluator waits for one."""
        request = self._request
        if request is not None and self._waits and self._channel is not None:
            self._waits = False
            request.buffer.add_holders()
            self._channel.dispatch(self._reply(request.version, self._position), request.buffer)

    def _reply(self, version: int, position: str = "", stop: bool = False) -> Reply:
        return Reply(
            incarnation=self._incarnation,
            sequence=self._sequence,
            version=version,
            staleness=0,
            local_steps=0,
            progress=0.0,
            progress_per_step=1.0,
            wait_seconds=0.0,
            stop=stop,
            refused=None,
            broadcast=position,
            shared=self._shared,
        )


def _number_in(text: str) -> int | None:
    """Return the number of the request that a result belongs to; None if the text is no result."""
    try:
        number = json.loads(text)["number"]
    except (ValueError, KeyError, TypeError):
        return None
    return number if type(number) is int else None
