"""A worker that exchanges its rounds with a server, in this process or across a network."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning_async_localsgd.runtime.background_call import BackgroundCall
from lightning_async_localsgd.runtime.worker_base import WorkerBase

if TYPE_CHECKING:
    from lightning_async_localsgd.protocol.exchange import Exchange
    from lightning_async_localsgd.protocol.layout import Binding
    from lightning_async_localsgd.protocol.messages import Push, Reply
    from lightning_async_localsgd.protocol.options import ExchangeOptions

_CLOSING_SECONDS = 10.0
"""Seconds that :meth:`Worker.close` waits for a push in flight to notice that it is given up."""


class Worker(WorkerBase):
    """A worker that exchanges its rounds with a server.

    Args:
        number: the worker's number (its global rank).
        binding: exchanged tensors of the module.
        exchange: connection to the server.
        clock: returns monotonic seconds.
        exchange_options: see :class:`WorkerBase`.

    """

    def __init__(
        self,
        number: int,
        binding: Binding,
        exchange: Exchange,
        clock: Callable[[], float] = time.monotonic,
        exchange_options: ExchangeOptions | None = None,
    ) -> None:
        sends_packed = exchange.sends_packed
        super().__init__(number, binding, clock, exchange_options=exchange_options, sends_packed=sends_packed)
        self.exchange = exchange
        self._in_flight: BackgroundCall[tuple[Reply, float]] | None = None

    def join(self) -> Reply:
        """Join the run: wait for the first dispatch and adopt its model.

        Raises:
            ExchangeError: The server refuses this worker, or cannot be reached.

        """
        if self.optimizer_weights is not None:
            self._left = self.optimizer_weights.start()
        reply = self.exchange.join(self.hello, self._model)
        assert not reply.averaged, "a worker that joins needs a model, not a mean of gradients"
        self.adopt(reply)
        return reply

    @property
    def due(self) -> bool:
        """Whether the round is due: all its steps are taken, or the server has recalled this worker."""
        assert self.reply is not None
        if self.stopped or self._in_flight is not None:
            return False
        return self.round_steps >= self.reply.local_steps or self.exchange.recalled_version == self.reply.version

    def check(self) -> None:
        """Check the connection. Cheap, and called at every local step.

        Raises:
            ExchangeError: The server is gone, or has been silent for too long.

        """
        if self._in_flight is None:  # The push notices it otherwise.
            self.exchange.check()

    def adopt_answer(self, wait: bool = False) -> bool:
        """Adopt the answer to the push in flight if it has arrived.

        The worker also waits for it once all steps are taken that were granted for the time of the flight.

        Args:
            wait: whether to wait for the answer in any case.

        Returns:
            Whether a model was adopted. It is not if no push is in flight.

        Raises:
            ExchangeError: see :meth:`end_round`.

        """
        if self._in_flight is None:
            return False
        assert self.reply is not None
        wait = wait or self.round_steps >= self.reply.overlap_steps
        if not wait and not self._in_flight.done:
            return False
        began_at = self._clock()
        try:
            reply, answered_at = self._in_flight.result()
        finally:
            self._in_flight = None
        self.adopt(reply, answered_at, max(0.0, answered_at - began_at))
        return True

    def end_round(self, *, final: bool = False, stop: bool = False, request_stop: bool = False) -> bool:
        """Push the round, and adopt the global model that comes back. With overlap, only begin to push.

        Args:
            final: whether this worker takes no more steps. If so, the call returns with the final model once all
                workers have pushed.
            stop: whether this worker asks that training end for all workers.
            request_stop: whether this worker asks that training end once the minimum of rank 0's trainer is reached.

        Returns:
            Whether a model was adopted.

        Raises:
            ExchangeError: The server cannot be reached any more, or refuses this worker for the rest of the run.

        """
        assert self._in_flight is None
        try:
            push = self.make_push(final=final, stop=stop, request_stop=request_stop)
            if self.overlaps and not final:
                self._in_flight = BackgroundCall(lambda: self._exchange_round(push), "async_localsgd-push")
                return False
            reply = self._send(push)
            while reply.synchronous:  # The worker that was to hand in the weights of all could not.
                reply = self._send(self.make_second_hand_over(reply))
        except BaseException:
            self._arrive(trains=True)  # The states of the optimizers may still be saved.
            raise
        self.adopt(reply)
        return True

    def average_gradients(self, factor: float) -> Reply:
        """Hand in the module's gradients, and replace them by the mean of all workers' gradients.

        Args:
            factor: see :meth:`make_gradient_push`.

        Returns:
            The reply, see :meth:`adopt_mean`. A reply with a model must be adopted after the optimizer's step.

        Raises:
            ExchangeError: see :meth:`end_round`.

        """
        reply = self._send(self.make_gradient_push(factor))
        self.adopt_mean(reply)
        return reply

    def close(self, reason: str = "") -> None:
        """Leave the run, for a reason that the server is told. A push in flight is given up."""
        self.exchange.close(reason)
        if self._in_flight is not None:
            self._in_flight.wait(_CLOSING_SECONDS)
            self._in_flight = None

    def _exchange_round(self, push: Push) -> tuple[Reply, float]:
        return self._send(push), self._clock()

    def _send(self, push: Push) -> Reply:
        packed = None if self.uplink is None or push.contents != "round" else self.uplink.packed
        return self.exchange.push(push, self._gradient, self._model, packed)
