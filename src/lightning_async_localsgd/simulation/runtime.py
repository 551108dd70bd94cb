"""The runtime of a simulated run: all workers are virtual, and one at a time computes its round in this process."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from lightning_async_localsgd.protocol.buffers import BufferPool
from lightning_async_localsgd.protocol.frozen import FrozenParameters
from lightning_async_localsgd.protocol.layout import Binding, Layout
from lightning_async_localsgd.protocol.messages import JoinInfo
from lightning_async_localsgd.runtime.assembly import adapt_saved_state, build_coordinator
from lightning_async_localsgd.runtime.base import Runtime, warn_of_own_buffer
from lightning_async_localsgd.server.server import Server
from lightning_async_localsgd.server.shared_values import SharedValues
from lightning_async_localsgd.server.traffic import Traffic
from lightning_async_localsgd.simulation.cluster import ClusterSimulator
from lightning_async_localsgd.simulation.machine import VirtualClock
from lightning_async_localsgd.simulation.replay import Recording, ReplayServer, ReplaySimulator

if TYPE_CHECKING:
    from torch import nn

    from lightning_async_localsgd.runtime.leases import LeaseBuffer
    from lightning_async_localsgd.runtime.settings import RuntimeSettings
    from lightning_async_localsgd.simulation.devices import Cluster
    from lightning_async_localsgd.simulation.machine import VirtualWorker
    from lightning_async_localsgd.simulation.simulator import Simulator


_SHARE_OF_INTERVAL = 3
"""Before a validation, the current worker's round ends early if the round has more than one part in so many of the
steps since the last validation. Validations that are rare leave all rounds as long as they are."""


class SimulatedRuntime(Runtime):
    """All virtual workers of a simulated run. The module holds the weights of the current worker.

    Args:
        settings: policies and numbers of the run.
        scenario: the machines, or the recorded run that is replayed.
        module: the model to train.
        seed: seed of the step times.
        restored: server state to resume from, see :meth:`state_dict`.

    Raises:
        ValueError: The module cannot be trained this way, or ``restored`` does not fit the model.

    Attributes:
        simulator: decides in which order rounds are computed.
        worker: the current worker.
        has_data: whether a worker has data for another step.
        replays: whether the run is a replay of a logged run.
        replays_live_run: whether the recorded run was live.

    """

    worker: VirtualWorker

    def __init__(
        self,
        settings: RuntimeSettings,
        scenario: Cluster | Recording,
        module: nn.Module,
        seed: int,
        restored: dict[str, Any] | None = None,
    ) -> None:
        moments = settings.moments if len(scenario.worker_numbers) > 1 else None
        layout = Layout.of(module, settings.exchange_frozen, moments)
        binding = Binding(layout, module, moments)
        super().__init__(settings, module, binding, scenario.initial_workers, single_process=True)
        if len(scenario.worker_numbers) > 1:
            binding.on_own = warn_of_own_buffer
        if isinstance(scenario, Recording):
            scenario.check(
                self.binding, settings.budget.total, settings.exchange, settings.min_workers, settings.step_samples
            )
        ranks = scenario.ranks if isinstance(scenario, Recording) else None
        coordinator = build_coordinator(settings, layout, self.workers, scenario.incarnation, ranks=ranks)
        coordinator.model.read(self.binding)
        if restored is not None:
            coordinator.load_state_dict(adapt_saved_state(restored, settings.budget, self.workers, virtual=True))
        simulation_state = {} if restored is None else restored.get("simulation", {})
        self._start_time = scenario.start_time
        self._clock = clock = VirtualClock(simulation_state.get("seconds", scenario.start_time))
        # Local steps of all workers, or samples, that were computed before the current round.
        self._steps_before_round: float = coordinator.budget.done
        self.has_data: Callable[[VirtualWorker], bool] = lambda _: True
        # Local steps of all workers that were computed before the last validation.
        self._validated_steps: float = self._steps_before_round
        self._stopped = False
        server_class = ReplayServer if isinstance(scenario, Recording) else Server
        info = JoinInfo(self.workers, settings.seed, settings.fit_number, settings.run_name, frozen_digest="")
        buffers, options = BufferPool(layout.numel), settings.exchange
        frozen = None
        if len(scenario.worker_numbers) > 1 and settings.exchange.frozen is not False:
            frozen = FrozenParameters(module, layout)
            frozen.watch()
        self._server = server = server_class(
            coordinator,
            buffers,
            threaded=False,
            clock=clock,
            join_info=info,
            observers=settings.observers,
            shared=None if frozen is None else SharedValues(frozen.sizes),
            traffic=Traffic(layout, buffers, options.upload, options.download, self.workers),
        )
        self.simulator: Simulator
        self.replays = isinstance(scenario, Recording)
        self.replays_live_run = isinstance(scenario, Recording) and scenario.is_live
        if isinstance(scenario, Recording):
            assert isinstance(server, ReplayServer)
            self.simulator = ReplaySimulator(server, clock, scenario, self.binding, frozen, options)
        else:
            self.simulator = ClusterSimulator(
                server, clock, scenario, self.binding, seed, simulation_state, frozen, options
            )
        self.simulator.optimizer_weights = settings.optimizer_weights
        self.simulator.samples_of = settings.samples_of
        self.simulator.start()
        self.next_round()

    # ------------------------------------------------------------------ running

    @property
    @override
    def server(self) -> Server:
        return self._server

    @property
    @override
    def stopped(self) -> bool:
        return self._stopped

    @property
    @override
    def keeps_weights(self) -> bool:
        # Each round begins with the weights of another worker.
        return False

    @property
    @override
    def confirmed_steps(self) -> float:
        return self._server.snapshot.progress

    @property
    @override
    def global_steps(self) -> float:
        """Global steps that have been computed, whatever their virtual times are."""
        if self._stopped:
            return self._to_global_steps(self._server.snapshot.progress)
        return self._to_global_steps(self._steps_before_round + self.worker.round_units)

    @property
    @override
    def next_global_steps(self) -> float:
        return self._to_global_steps(self._steps_before_round + self.worker.round_units + self.worker.step_units)

    @property
    def global_steps_of_worker(self) -> float:
        """Global steps that the current worker estimates at its own virtual time, like a live worker."""
        return self._estimate_of_worker(self.worker.steps_since_reply)

    @property
    def next_global_steps_of_worker(self) -> float:
        """Value of :attr:`global_steps_of_worker` after one more step of the current worker."""
        return self._estimate_of_worker(self.worker.steps_since_reply + 1)

    def _estimate_of_worker(self, steps: int) -> float:
        reply = self.worker.reply
        assert reply is not None
        return self._estimate_global_steps(reply.progress + steps * reply.progress_per_step)

    @property
    @override
    def virtual_seconds(self) -> float:
        """Virtual seconds from the start of training to the server's last decision.

        This is the age of the current global model. The round that is being computed ends later.
        """
        return self._clock.now - self._start_time

    @property
    @override
    def seconds(self) -> float:
        """Virtual seconds since training started."""
        return self.virtual_seconds

    @property
    @override
    def lost_workers(self) -> list[tuple[int, float, str]]:
        return [(worker, when - self._start_time, why) for worker, when, why in self._server.lost_workers]

    @property
    @override
    def bytes_sent(self) -> int:
        return self.simulator.bytes_sent

    @property
    @override
    def bytes_received(self) -> int:
        return self.simulator.bytes_received

    @override
    def lease_buffer(self, stream: str, items: int, unit: int, ordered: bool, own_unit: bool) -> LeaseBuffer:
        return self.worker.lease_client.buffer(stream, items, unit, ordered, own_unit)

    @override
    def end_step(self) -> bool:
        samples, tokens = self._samples, self._tokens
        self._samples = self._tokens = 0
        self._in_step = False
        return self.simulator.end_step(self.worker, samples, tokens)

    @override
    def count_gradients(self) -> None:
        samples, tokens = self._samples, self._tokens
        self._samples = self._tokens = 0
        self.worker.count_step()
        self.simulator.end_step(self.worker, samples, tokens)

    @override
    def average_gradients(self, factor: float) -> None:
        self.simulator.average(self.worker, factor, self.has_data)

    def push_gradients(self, factor: float) -> None:
        """Push the gradients of the current worker, and begin the contribution of the next worker to the step.

        Args:
            factor: factor that makes the module's gradients the mean over the worker's batches of the step.

        """
        self.simulator.push_round(self.worker, factor=factor)
        self.begin_next_round()

    @override
    def end_synchronous_step(self) -> bool:
        self._in_step = False
        self._steps_before_round = self._server.snapshot.progress + self.simulator.steps_in_transit
        flat, weights = self.binding.new_flat(), self.optimizer_weights
        left = weights.leave() if weights is not None else []
        self.binding.read(flat)
        flat[self.binding.layout.model_numel :].fill_(math.nan)
        if weights is not None:
            weights.arrive(left)
        members = self.simulator.members
        self._server.load_weights(min(members), flat)
        return all(reply.local_steps == 0 for reply in members.values())

    def restore_buffers(self) -> None:
        """Load the exchanged buffers with which all workers begin the present synchronous step."""
        layout = self.binding.layout
        if layout.model_numel > layout.parameter_numel:
            flat = self.binding.new_flat()
            self._server.copy_model(flat)
            with torch.no_grad():
                for entry, part, tensor in self.binding.parts(flat):
                    if entry.kind == "buffer":
                        tensor.copy_(part)

    def next_round(self, final: bool = False) -> None:
        """Push the round of the current worker, if it has one, and begin the round of the next worker.

        Args:
            final: whether the current worker has no more data.

        """
        worker = getattr(self, "worker", None)
        if worker is not None and worker.current_round is not None:
            self.simulator.push_round(worker, final)
        self.begin_next_round()

    def begin_next_round(self) -> None:
        """Begin the round of the next worker. That of the current worker is pushed."""
        next_worker = self.simulator.next_worker()
        if next_worker is None:
            self._end()
        else:
            self.worker = next_worker
            self.simulator.begin_round(next_worker)
            # Like the budget, this leaves out lost steps, which are taken again.
            self._steps_before_round = self._server.snapshot.progress + self.simulator.steps_in_transit

    @override
    def interrupt(self) -> None:
        # Showing and saving the global model takes no virtual time.
        return

    @override
    def continue_round(self) -> None:
        return

    @override
    def flush_round(self) -> bool:
        # At any time, most workers are in the middle of their rounds.
        return False

    @override
    def recall_rounds(self) -> bool:
        # Only the current worker has steps that are computed and not pushed. A replay takes its rounds from the log.
        steps = self._steps_before_round + self.worker.round_units
        interval, self._validated_steps = steps - self._validated_steps, steps
        if self._stopped or self._in_step or self.replays or self.worker.synchronous:
            return False
        return self.worker.round_units * _SHARE_OF_INTERVAL > interval

    @override
    def end_round(self) -> None:
        self.next_round()

    @override
    def finish(self, stop: bool) -> None:
        """End training with the steps that are computed. Rounds that are not computed yet are lost.

        Args:
            stop: whether the current worker asks that training end for all workers.

        """
        if not self._stopped:
            self.simulator.finish(self.worker, stop)
            self._end()

    @override
    def leave(self) -> None:
        # All workers are in this process.
        self.finish(stop=True)

    # -------------------------------------------------------------------- ending

    @override
    def sync_final_state(self, averaged: bool) -> bool:
        return not self.binding.changed_from(self.worker.model)

    @override
    def close(self, reason: str | None = None) -> None:
        self._server.close(reason)

    # ------------------------------------------------------------------ internal

    def _end(self) -> None:
        workers = self.simulator.live.values()
        worker = next(one for one in workers if one.pending_reply is not None and one.pending_reply.stop)
        self.worker = worker
        self.simulator.begin_round(worker)
        self.simulator.close()
        self._stopped = True
