"""The phase of a fit whose workers are virtual: all in this process, one at a time, in virtual time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.assembly import build_coordinator
from lightning_async_localsgd.buffers import BufferPool
from lightning_async_localsgd.connection import rescaled
from lightning_async_localsgd.layout import Binding, Layout
from lightning_async_localsgd.phase_base import Phase
from lightning_async_localsgd.server import About, Server
from lightning_async_localsgd.simulation.cluster import VirtualCluster
from lightning_async_localsgd.simulation.machine import VirtualClock
from lightning_async_localsgd.simulation.replay import Recording, Replay, ReplayServer

if TYPE_CHECKING:
    from torch import nn

    from lightning_async_localsgd.leases import LeaseStock
    from lightning_async_localsgd.settings import PhaseSettings
    from lightning_async_localsgd.simulation.devices import Cluster
    from lightning_async_localsgd.simulation.machine import VirtualWorker
    from lightning_async_localsgd.simulation.turns import Turns


class SimulatedPhase(Phase):
    """A phase of virtual workers. It is always the turn of one of them, which the module's weights are of.

    Args:
        settings: of the phase.
        script: the machines, or the run that is played again.
        module: the model to train.
        seed: of the times of steps.
        restored: the state of a server to go on from, see :meth:`state_dict`.

    Raises:
        ValueError: the module cannot be trained this way, or the restored state does not fit.

    Attributes:
        worker: at whose turn it is.

    """

    worker: VirtualWorker

    def __init__(
        self,
        settings: PhaseSettings,
        script: Cluster | Recording,
        module: nn.Module,
        seed: int,
        restored: dict[str, Any] | None = None,
    ) -> None:
        layout = Layout.of(module, settings.frozen)
        super().__init__(settings, module, Binding(layout, module), script.initial, alone=True)
        if isinstance(script, Recording):
            script.check(self.binding, settings.budget.total)
        coordinator = build_coordinator(settings, layout, self.workers, script.incarnation)
        coordinator.model.read(self.binding)
        if restored is not None:
            coordinator.load_state_dict(rescaled(restored, settings.budget, self.workers, virtual=True))
        simulated = {} if restored is None else restored.get("simulation", {})
        self._started_at = script.start
        self._clock = clock = VirtualClock(simulated.get("seconds", script.start))
        self._played = coordinator.budget.done
        self._stopped = False
        kind = ReplayServer if isinstance(script, Recording) else Server
        about = About(self.workers, settings.seed, settings.fit, settings.folder, unshared="")
        self._server = server = kind(coordinator, BufferPool(layout.numel), threaded=False, clock=clock, about=about)
        self.turns: Turns
        if isinstance(script, Recording):
            assert isinstance(server, ReplayServer)
            self.turns = Replay(server, clock, script, self.binding)
        else:
            self.turns = VirtualCluster(server, clock, script, self.binding, seed, simulated)
        self.turns.begin()
        self.next_turn()

    # ------------------------------------------------------------------ running

    @property
    def server(self) -> Server:
        """The server, without a thread."""
        return self._server

    @property
    def stopped(self) -> bool:
        """Training is over; the module holds the final global model."""
        return self._stopped

    @property
    def keeps_weights(self) -> bool:
        """With every turn the module holds the weights of another worker."""
        return False

    @property
    def heard(self) -> float:
        """Local steps of all workers that have been handed in."""
        return self._server.view.progress

    @property
    def progress(self) -> float:
        """Local steps of all workers that have been played, as :attr:`.Phase.progress` counts them."""
        if self._stopped:
            return self._per_worker(self._server.view.progress)
        return self._per_worker(self._played + self.worker.round_steps)

    @property
    def next_progress(self) -> float:
        """The same when one step more has been played."""
        return self._per_worker(self._played + self.worker.round_steps + 1)

    @property
    def next_progress_of_worker(self) -> float:
        """The run's progress as the worker at turn knows it, at its own virtual time, when it has taken a step more."""
        return self._progress_of_worker(self.worker.round_steps + 1)

    @property
    def progress_of_worker(self) -> float:
        """The same now."""
        return self._progress_of_worker(self.worker.round_steps)

    def _progress_of_worker(self, steps: int) -> float:
        reply = self.worker.reply
        assert reply is not None
        return self._estimated(reply.progress + steps * reply.pace)

    @property
    def virtual_seconds(self) -> float:
        """Virtual time from the start of training to what the server has decided last.

        That is when the global model was what it is now; the round that is being played ends later.
        """
        return self._clock.now - self._started_at

    @property
    def seconds(self) -> float:
        """The same: how long a real run would have taken."""
        return self.virtual_seconds

    @property
    def lost_workers(self) -> list[tuple[int, float, str]]:
        """Who was gone before training was over, when, and why."""
        return [(worker, when - self._started_at, why) for worker, when, why in self._server.lost_workers]

    @property
    def bytes_sent(self) -> int:
        """Bytes that the server would have sent."""
        return self.turns.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Bytes that workers would have sent."""
        return self.turns.bytes_received

    def lease_stock(self, stream: str, items: int, unit: int, ordered: bool) -> LeaseStock:
        """The share of the worker at turn in a data loader's items."""
        return self.worker.desk.stock(stream, items, unit, ordered)

    def end_step(self) -> bool:
        """The worker at turn has taken a step; returns whether its round is over, and :meth:`next_turn` is due."""
        samples, tokens = self._samples, self._tokens
        self._samples = self._tokens = 0
        self._in_step = False
        return self.turns.end_step(self.worker, samples, tokens)

    def next_turn(self, final: bool = False) -> None:
        """Hands in the round of the worker at turn, if there is one, and begins that of whose turn it is then.

        Args:
            final: the worker at turn has no more data: that was its last round.

        """
        worker = getattr(self, "worker", None)
        if worker is not None and worker.plan is not None:
            self.turns.hand_in(worker, final)
        following = self.turns.advance()
        if following is None:
            self._end()
        else:
            self.worker = following
            self.turns.adopt(following)
            # As the budget counts them: what is lost on its way to the server is trained on again.
            self._played = self._server.view.progress + self.turns.steps_on_their_way

    def pause(self) -> None:
        """Showing and saving the global model takes no virtual time."""

    def resume(self) -> None:
        """Likewise."""

    def settle(self) -> bool:
        """Workers are in the midst of their rounds all the time."""
        return False

    def finish(self, stop: bool) -> None:
        """Training ends with what has been played: the rounds of the workers who are not at turn are lost.

        Args:
            stop: somebody has asked for it.

        """
        if not self._stopped:
            self.turns.end(self.worker, stop)
            self._end()

    def leave(self) -> None:
        """The workers are all here: training ends."""
        self.finish(stop=True)

    # -------------------------------------------------------------------- ending

    def share_end(self, averaged: bool) -> bool:
        """Nobody else is there; returns whether the module still holds the final global model."""
        return not self.binding.changed_from(self.worker.model)

    def close(self, reason: str | None = None) -> None:
        """Takes the server down."""
        self._server.close(reason)

    # ------------------------------------------------------------------ internal

    def _end(self) -> None:
        worker = next(one for one in self.turns.live.values() if one.answer is not None and one.answer.stop)
        self.worker = worker
        self.turns.adopt(worker)
        self.turns.close()
        self._stopped = True
