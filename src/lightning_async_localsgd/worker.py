"""One rank's part: count local steps, form the pseudo-gradient, exchange it for the global model, adopt that.

The optimizer's state stays with the worker and is never reset. The pseudo-gradient is relative to the model that the
worker really got (rounded to its parameters' dtype), so that no rounding error is pushed back as if it were progress.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning_async_localsgd.messages import ALREADY_APPLIED, NOT_FINITE, PROTOCOL_VERSION, Hello, Push, Reply

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_async_localsgd.exchange import Exchange
    from lightning_async_localsgd.layout import Binding

_log = logging.getLogger(__name__)


class Worker:
    """The rounds of one rank.

    Two flat fp32 buffers are kept: the model of the last dispatch, and the pseudo-gradient.

    Args:
        number: the worker's number (global rank).
        binding: the module's tensors.
        exchange: the way to the server.
        clock: seconds, monotonic.
        gradient: memory for pseudo-gradients, where workers share it; otherwise it gets its own.

    Attributes:
        reply: header of the last dispatch.
        round_steps: real optimizer steps since then.
        total_steps: real optimizer steps of this worker since it joined.
        stopped: the final model has been adopted; there is nothing more to do.
        diverged: the last push was refused because it was not finite.
        renewed: the round has begun with fresh states of the inner optimizers.
        metrics: gives what this worker's module has logged since it was last asked, for a push.
        used: gives the items of training data that were used since it was last asked, see :attr:`Push.used`.
        inner: gives the name of the file with this worker's inner state, see :attr:`Push.inner`.

    """

    def __init__(
        self,
        number: int,
        binding: Binding,
        exchange: Exchange,
        clock: Callable[[], float] = time.monotonic,
        gradient: Tensor | None = None,
    ) -> None:
        self.number = number
        self.session = uuid.uuid4().hex
        self.exchange = exchange
        self.round_steps = 0
        self.total_steps = 0
        self.stopped = False
        self.diverged = False
        self.renewed = False
        self.metrics: Callable[[], str] = str
        self.used: Callable[[], str] = str
        self.inner: Callable[[], str] = str
        self.reply: Reply | None = None
        self._binding = binding
        self._clock = clock
        self._model = binding.new_flat()
        self._gradient = binding.new_flat() if gradient is None else gradient
        self._sequence = 0
        self._samples = 0
        self._tokens = 0
        self._stepped = False
        self._timed_steps = 0
        self._compute_seconds = 0.0
        self._exchange_seconds = 0.0
        self._mark: float | None = None
        self._handed_in_at = 0.0

    @property
    def round(self) -> int:
        """The present round of this session, counted from 1."""
        return self._sequence + 1

    @property
    def model(self) -> Tensor:
        """The model of the last dispatch, flat fp32, as this worker's parameters could take it."""
        return self._model

    @property
    def hello(self) -> Hello:
        """How this worker introduces itself."""
        return Hello(PROTOCOL_VERSION, self.number, self.session, self._binding.layout.fingerprint)

    @property
    def gradient(self) -> Tensor:
        """The pseudo-gradient of the last round that was handed in; its memory is used again by the next."""
        return self._gradient

    def join(self) -> Reply:
        """Takes part: waits for the first dispatch and adopts it.

        Raises:
            ExchangeError: the server refused this worker or cannot be reached.

        """
        reply = self.exchange.join(self.hello, self._model)
        self.adopt(reply)
        return reply

    def count_step(self) -> None:
        """An optimizer step has been taken; called by the optimizer itself, so that skipped steps don't count."""
        self.round_steps += 1
        self.total_steps += 1
        self._stepped = True

    def end_step(self, samples: int, tokens: int = 0) -> None:
        """The loop has come to the end of an optimizer step, taken or skipped, of so many samples and tokens."""
        now = self._clock()
        if self._mark is not None:
            # A skipped step is time spent computing all the same. The first step (compilation, warm caches) and
            # interrupted ones have no mark, and so are left out of the speed.
            self._compute_seconds += now - self._mark
            self._timed_steps += self._stepped
        self._samples += samples
        self._tokens += tokens
        self._stepped = False
        self._mark = now

    def interrupt(self) -> None:
        """Something other than training takes time (validation, saving): the step around it is not timed."""
        self._mark = None

    @property
    def due(self) -> bool:
        """Whether the round is over: all its steps are taken, or the server asks for what there is."""
        assert self.reply is not None
        if self.stopped:
            return False
        return self.round_steps >= self.reply.local_steps or self.exchange.wanted_version == self.reply.version

    def end_round(self, *, final: bool = False, stop: bool = False, asks: bool = False) -> Reply:
        """Hands the round in and adopts the global model that comes back.

        Args:
            final: this worker takes no more steps; the call returns with the final model when everybody is done.
            stop: asks the same of everybody.
            asks: the same, once rank 0 finds a minimum reached.

        Returns:
            The new dispatch.

        Raises:
            ExchangeError: the server cannot be reached any more, or has put this worker in quarantine.

        """
        push = self.hand_in(final=final, stop=stop, asks=asks)
        reply = self.exchange.push(push, self._gradient, self._model)
        self.adopt(reply)
        return reply

    def hand_in(self, *, final: bool = False, stop: bool = False, asks: bool = False) -> Push:
        """Ends the round: its pseudo-gradient is in :attr:`gradient` if the push has steps.

        Args:
            final: see :meth:`end_round`.
            stop: likewise.
            asks: likewise.

        Returns:
            The push, which no other call will give again.

        """
        assert self.reply is not None
        assert not self.stopped
        # A device may still have to compute what the loop has given it; that is part of the round, not of the exchange.
        ahead = self._clock()
        self._binding.synchronize()
        self._handed_in_at = self._clock()
        if self._timed_steps > 0:
            self._compute_seconds += self._handed_in_at - ahead
        self._sequence += 1
        if self.round_steps > 0:
            self._binding.subtract_from(self._model, self._gradient)
        return Push(
            worker=self.number,
            session=self.session,
            sequence=self._sequence,
            incarnation=self.reply.incarnation,
            base_version=self.reply.version,
            steps=self.round_steps,
            samples=self._samples,
            timed_steps=self._timed_steps,
            compute_seconds=self._compute_seconds,
            exchange_seconds=self._exchange_seconds,
            final=final,
            stop=stop,
            used=self.used(),
            metrics=self.metrics(),
            inner=self.inner(),
            tokens=self._tokens,
            asks=asks,
        )

    def adopt(self, reply: Reply) -> None:
        """A new round begins: the module takes over :attr:`model`, which came with the reply."""
        self._binding.load(self._model)
        self.reply = reply
        self.stopped = reply.stop
        self.round_steps = 0
        self._samples = 0
        self._tokens = 0
        self._timed_steps = 0
        self._compute_seconds = 0.0
        # The time of an exchange is not computing. The step after it starts here, the first of all is not timed.
        now = self._clock()
        self._mark = now if self._sequence > 0 else None
        if self._sequence > 0:
            self.diverged = reply.refused is not None and reply.refused.startswith(NOT_FINITE)
            self.renewed = reply.renew
            if reply.refused is not None and reply.refused != ALREADY_APPLIED:
                _log.warning("worker %d: push %d was refused: %s", self.number, self._sequence, reply.refused)
            self._exchange_seconds = max(0.0, now - self._handed_in_at - reply.wait_seconds)
