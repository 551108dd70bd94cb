"""Base class of the simulators, which decide in which order the rounds of virtual workers are computed and pushed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_async_localsgd.protocol.codecs import codec_of
from lightning_async_localsgd.protocol.options import ExchangeOptions
from lightning_async_localsgd.protocol.ports import LocalReplyChannel
from lightning_async_localsgd.runtime.local_exchange import LocalExchange
from lightning_async_localsgd.runtime.shared_parameters import SharedParameters
from lightning_async_localsgd.simulation.machine import VirtualClock, VirtualWorker

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lightning_async_localsgd.protocol.frozen import FrozenParameters
    from lightning_async_localsgd.protocol.layout import Binding
    from lightning_async_localsgd.protocol.lease_source import LeaseSource
    from lightning_async_localsgd.protocol.messages import Push, Reply
    from lightning_async_localsgd.runtime.optimizer_weights import OptimizerWeights
    from lightning_async_localsgd.server.server import Server


class Simulator(ABC):
    """The workers of a simulated run. One worker at a time computes its round: the current worker.

    The current worker's round is computed as a whole, at the virtual time at which its push reaches the server::

        worker = simulator.next_worker()
        simulator.begin_round(worker)
        while not simulator.end_step(worker, samples, tokens):
            ...  # Compute a step.
        simulator.push_round(worker)

    In the synchronous beginning, a round is a worker's contribution to a step: its gradients, computed from the weights
    that all workers have. The optimizer takes the step once, when the last worker of the step has computed its
    gradients::

        simulator.push_round(worker, factor=1.0)  # not the last worker of the step
        simulator.average(worker, factor=1.0, has_data=...)  # the last one; then the optimizer takes the step

    Args:
        server: server without a thread. Its clock is ``clock``.
        clock: the server's clock.
        binding: exchanged tensors of the module in which all rounds are computed.
        frozen: frozen parameters of the module, which it may move itself; None if there is only one worker.
        exchange_options: how pushes and models travel; without rounding if not given.

    Attributes:
        optimizer_weights: what the inner optimizers remember of weights; None if there are no optimizers.
        samples_of: returns the samples in a step of a worker; 0 if the run counts steps.
        clock: the server's clock.
        live: the live workers by number.
        bytes_sent: bytes that the server has sent to workers.
        bytes_received: bytes that the server has received from workers.

    """

    def __init__(
        self,
        server: Server,
        clock: VirtualClock,
        binding: Binding,
        frozen: FrozenParameters | None = None,
        exchange_options: ExchangeOptions | None = None,
    ) -> None:
        self.optimizer_weights: OptimizerWeights | None = None
        self.samples_of: Callable[[int], int] = lambda worker: 0
        self.clock = clock
        self.live: dict[int, VirtualWorker] = {}
        # Time at which the current worker's push reaches the server. The clock is set to this time only then:
        # otherwise, a lease request during the round could make the server decide something too early.
        self._push_time = clock.now
        self.bytes_sent = 0
        self.bytes_received = 0
        # In the synchronous beginning: whether the module has the weights of all workers.
        self._has_weights = False
        self._server = server
        self._binding = binding
        self._frozen = frozen
        self._gradient = binding.new_flat()
        self._options = options = exchange_options if exchange_options is not None else ExchangeOptions()
        upload = codec_of(binding.layout, options.upload)
        download = codec_of(binding.layout, options.download)
        exact_bytes = 4 * binding.layout.numel
        self._packed = None if upload is None else upload.new_packed()
        self._push_bytes = exact_bytes if upload is None else upload.nbytes
        self._model_bytes = {"fp32": exact_bytes, "mean": binding.layout.model_bytes}
        if download is not None:
            self._model_bytes[download.encoding] = download.nbytes

    @abstractmethod
    def start(self) -> None:
        """Let the initial workers join."""

    @abstractmethod
    def next_worker(self, until: Callable[[], bool] = lambda: False) -> VirtualWorker | None:
        """Advance virtual time until a worker's round is to be computed.

        Args:
            until: ends the search when it is true.

        Returns:
            The new current worker; None if training, or the search, has ended.

        Raises:
            RuntimeError: Training can never end, because no worker is left.

        """

    @abstractmethod
    def push_round(
        self, worker: VirtualWorker, final: bool = False, stop: bool = False, factor: float | None = None
    ) -> None:
        """Push the computed steps of the current worker's round.

        Args:
            worker: the current worker.
            final: whether the worker takes no more steps.
            stop: whether the worker asks that training end for all workers.
            factor: in the synchronous beginning, push the module's gradients times this factor.

        """

    @abstractmethod
    def awaited(self, worker: VirtualWorker) -> list[VirtualWorker]:
        """Return the other workers whose gradients for the present synchronous step are still to be computed."""

    def average(self, worker: VirtualWorker, factor: float, has_data: Callable[[VirtualWorker], bool]) -> None:
        """Push the gradients of the last worker of a synchronous step, and load the mean into the module's gradients.

        Args:
            worker: the current worker.
            factor: see :meth:`push_round`.
            has_data: whether a worker has data. If it has not, its rounds have ended.

        """
        completed = self._server.synchronous_steps

        def is_complete() -> bool:
            return self._server.synchronous_steps > completed

        self.push_round(worker, factor=factor)
        while not is_complete():
            other = self.next_worker(until=is_complete)
            if other is not None:
                assert not has_data(other), "another worker contributes to the step"
                self.push_round(other, final=True)
        # The worker itself may have died meanwhile.
        holder = worker if worker.number in self.members else self.live[min(self.members)]
        assert holder.pending_reply is not None
        holder.adopt_mean(holder.pending_reply)

    @abstractmethod
    def finish(self, worker: VirtualWorker, stop: bool) -> None:
        """End training with the current worker's round. Rounds of other workers that are not computed yet are lost.

        Args:
            worker: the current worker.
            stop: whether the worker asks that training end for all workers.

        """

    @property
    def members(self) -> dict[int, Reply]:
        """The replies with which the live workers have begun the present synchronous step, by worker."""
        version = self._server.snapshot.version
        replies = {worker: self.live[worker].pending_reply for worker in self._server.live if worker in self.live}
        return {
            worker: reply
            for worker, reply in replies.items()
            if reply is not None and reply.synchronous and reply.version == version
        }

    @property
    def steps_in_transit(self) -> int:
        """Steps, or samples, of rounds that have been computed and have not reached the server yet."""
        return 0

    @property
    def permanently_lost(self) -> frozenset[int]:
        """Workers that take no more steps in this run."""
        return self._server.quarantined

    def close(self) -> None:  # noqa: B027 # A replay has nothing to report.
        """Report what is left over at the end of training."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which a resumed run continues, with new rounds."""
        uplinks = {number: worker.uplink for number, worker in self.live.items()}
        return {
            "seconds": self.clock.now,
            "residuals": {str(n): uplink.copy_residual() for n, uplink in uplinks.items() if uplink is not None},
        }

    def begin_round(self, worker: VirtualWorker) -> None:
        """Load the model that a worker was dispatched into the module; with overlap, its local model.

        In the synchronous beginning, the module has the weights of all workers.
        """
        assert worker.pending_reply is not None
        current_round = worker.current_round
        worker.clock.now = self.clock.now if current_round is None else current_round.now
        if worker.pending_reply.synchronous and self._has_weights:
            if worker.reply is not worker.pending_reply:
                worker.begin_step(worker.pending_reply)
        elif current_round is not None and current_round.overlap_steps > 0:
            worker.continue_local()
        else:
            worker.adopt(worker.pending_reply)
            self._has_weights = worker.synchronous

    def end_step(self, worker: VirtualWorker, samples: int, tokens: int) -> bool:
        """Record that a step of the current worker's round has been computed.

        Args:
            worker: the current worker.
            samples: number of samples in the step's batches.
            tokens: number of tokens in the step's batches.

        Returns:
            Whether the round is over.

        """
        current_round = worker.current_round
        assert current_round is not None
        current_round.record_step(worker.round_steps)
        worker.clock.now = current_round.now
        worker.end_step(samples, tokens)
        if current_round.computed == current_round.overlap_steps:
            weights = self.optimizer_weights
            left = weights.leave() if weights is not None else []
            self.adopt_answer(worker)
            if weights is not None:
                weights.arrive(left)
        return current_round.over

    def adopt_answer(self, worker: VirtualWorker) -> None:
        """With overlap, adopt the model that the current worker was dispatched, if it has not done so."""
        current_round = worker.current_round
        assert current_round is not None
        assert worker.pending_reply is not None
        if current_round.overlap_steps > 0 and worker.reply is not worker.pending_reply:
            waited = max(0.0, current_round.answered_at - worker.clock.now)
            worker.clock.now += waited
            worker.adopt(worker.pending_reply, current_round.answered_at, waited)

    def _new_worker(self, number: int, session: str, source: LeaseSource) -> VirtualWorker:
        clock = VirtualClock(self.clock.now)
        worker = VirtualWorker(
            number, session, self._binding, source, self._gradient, clock, self._options, self._packed
        )
        worker.step_samples = self.samples_of(number)
        if self._frozen is not None and self._frozen.names:
            worker.shared = SharedParameters(self._frozen, LocalExchange(self._server).share)
        return worker

    def _channel_of(self, worker: VirtualWorker) -> VirtualReplyChannel:
        return VirtualReplyChannel(worker, self._on_dispatch, self._on_refusal)

    def _deliver(self, worker: VirtualWorker, push: Push, gradient: Tensor | None) -> None:
        if gradient is not None:
            self.bytes_received += self._push_bytes if push.contents == "round" else self._model_bytes["mean"]
        self._server.push_here(push, gradient, self._channel_of(worker))

    def _hand_over(self, worker: VirtualWorker) -> None:
        """Let a worker say that it has taken the last synchronous step, and hand in its weights if it is asked to."""
        if self.live.get(worker.number) is not worker or worker.pending_reply is None:
            return
        worker.begin_step(worker.pending_reply)
        push = worker.make_push()
        self._deliver(worker, push, worker.gradient if push.has_data else None)

    def _on_dispatch(self, worker: VirtualWorker, reply: Reply) -> None:
        """Handle a model that leaves the server."""
        self.bytes_sent += self._model_bytes[reply.encoding]
        worker.pending_reply = reply

    def _on_refusal(self, worker: VirtualWorker, reason: str) -> None:
        """Handle a worker that the server refuses for the rest of the run."""
        worker.current_round = None
        if self.live.get(worker.number) is worker:
            del self.live[worker.number]


class VirtualReplyChannel(LocalReplyChannel):
    """Receives the server's answers to a virtual worker.

    Args:
        worker: the worker.
        on_dispatch: called with the worker and the reply, once the model is in the worker's memory.
        on_refusal: called with the worker and the reason, if the worker is refused for the rest of the run.

    """

    def __init__(
        self,
        worker: VirtualWorker,
        on_dispatch: Callable[[VirtualWorker, Reply], None],
        on_refusal: Callable[[VirtualWorker, str], None],
    ) -> None:
        self._worker = worker
        self._on_dispatch = on_dispatch
        self._on_refusal = on_refusal

    @override
    def answer(self, reply: Reply, copy: Callable[[Tensor], None]) -> None:
        copy(self._worker.model)
        self._on_dispatch(self._worker, reply)

    @override
    def refuse(self, reason: str) -> None:
        self._on_refusal(self._worker, reason)
