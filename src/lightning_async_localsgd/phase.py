"""The asynchronous phase of a fit: what is built when training starts, used at every step and taken down at the end.

Every rank has a worker; rank 0 has the server as well, and, where there are other ranks, the wire's end that they dial.
Lightning is not known here: the strategy tells what happens and gets told what to do.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_async_localsgd.budget import Budget
from lightning_async_localsgd.buffers import BufferPool
from lightning_async_localsgd.coordinator import Coordinator, WorkerTotals
from lightning_async_localsgd.exchange import Exchange
from lightning_async_localsgd.global_model import GlobalModel
from lightning_async_localsgd.grace import GraceWindow
from lightning_async_localsgd.layout import Binding, Layout
from lightning_async_localsgd.pacing import SpeedAwareSteps
from lightning_async_localsgd.rendezvous import RendezvousError
from lightning_async_localsgd.server import LocalExchange, Server
from lightning_async_localsgd.worker import Worker

if TYPE_CHECKING:
    from lightning_async_localsgd.messages import Reply
    from lightning_async_localsgd.options import ExchangeOptions
    from lightning_async_localsgd.outer import OuterOptimizer
    from lightning_async_localsgd.rendezvous import Rendezvous
    from lightning_async_localsgd.wire import WireServer

_log = logging.getLogger(__name__)

_PATIENCE = 0.05
"""Seconds between two looks at whether all workers have joined."""


@dataclass(frozen=True)
class PhaseSettings:
    """What the strategy's options and the trainer say about the phase.

    Args:
        local_steps: H, local steps of the fastest worker's round.
        rule: the outer optimizer; belongs to the phase from now on.
        dynamic_local_steps: whether slower workers take fewer steps.
        grace: the grace window.
        exchange: transport, port, encryption.
        start_timeout: seconds to wait for all workers at the start.
        silence_timeout: seconds of silence after which a peer is given up.
        total: local steps of all workers together, or None for no end.
        done: steps that count as taken before (a checkpoint without a server's state).

    """

    local_steps: int
    rule: OuterOptimizer
    dynamic_local_steps: bool
    grace: GraceWindow
    exchange: ExchangeOptions
    start_timeout: float
    silence_timeout: float
    total: int | None
    done: int = 0


class AsyncPhase:
    """One rank's part in the asynchronous phase.

    Args:
        settings: see there.
        module: the model to train.
        rendezvous: the meeting point of the ranks; None in a world of one.
        rank: this rank.
        workers: ranks that take part.
        restored: the state of a server to go on from (rank 0 only), see :meth:`state_dict`.
        watch: called while waiting for others; raises if that has become pointless.

    Raises:
        ValueError: the module cannot be trained this way, or the restored state does not fit.
        RuntimeError: the port is taken, or a worker did not come.

    Attributes:
        worker: this rank's worker.
        server: on rank 0, the server.
        workers: ranks that took part at the start.

    """

    def __init__(
        self,
        settings: PhaseSettings,
        module: nn.Module,
        rendezvous: Rendezvous | None,
        rank: int,
        workers: int,
        restored: dict[str, Any] | None = None,
        watch: Callable[[], None] = lambda: None,
    ) -> None:
        self.workers = workers
        self.total = settings.total
        self.server: Server | None = None
        self._settings = settings
        self._rendezvous = rendezvous
        self._rank = rank
        self._wire: WireServer | None = None
        self._watch = watch
        self._module = module
        self._samples = 0
        self._held: list[Tensor] | None = None
        self._showing = False
        self._shown_version = 0
        layout = Layout.of(module)
        self._binding = Binding(layout, module)
        try:
            exchange = self._open(layout, restored)
            self.worker = Worker(rank, self._binding, exchange)
            if rank == 0:
                self._await_others()
            self.worker.join()
            self._started_at = time.monotonic()
            self._ended_at: float | None = None
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ running

    @property
    def stopped(self) -> bool:
        """Training is over and the module holds the final global model."""
        return self.worker.stopped

    @property
    def progress(self) -> float:
        """Local steps of all workers together that are done by now, as far as this rank can tell, per worker."""
        reply = self._reply
        done = reply.progress + self.worker.round_steps * reply.pace
        if self.total is not None:
            done = min(done, float(self.total))
        return done / self.workers

    def see_batch(self, samples: int) -> None:
        """A batch of ``samples`` samples is about to be trained on."""
        self._samples += samples

    def end_step(self) -> bool:
        """The loop has come to the end of an optimizer step; the round is exchanged if it is over.

        Returns:
            Whether a model was adopted.

        Raises:
            ExchangeError: the server cannot be reached any more.

        """
        if self.stopped:
            return False
        self.worker.end_step(self._samples)
        self._samples = 0
        self.worker.exchange.check()
        if not self.worker.due:
            return False
        self._end_round()
        return True

    def finish(self) -> None:
        """Ends training for everybody, if it has not ended yet, and adopts the final model."""
        if not self.stopped:
            self._end_round(final=True, stop=True)

    def request_stop(self) -> None:
        """Rank 0 has decided to stop: everybody is told now, and handed the final model at their next step."""
        if self.server is not None:
            self.server.stop()

    @property
    def seconds(self) -> float:
        """Since training started, or for as long as it lasted."""
        return (self._ended_at or time.monotonic()) - self._started_at

    @property
    def bytes_sent(self) -> int:
        """Rank 0: bytes that the server has sent to workers in other processes."""
        return 0 if self._wire is None else self._wire.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Rank 0: bytes that workers in other processes have sent to the server."""
        return 0 if self._wire is None else self._wire.bytes_received

    # --------------------------------------------------- rank 0: validate, save

    def show_global_model(self) -> None:
        """Puts the global model of this moment into the module, and the local weights aside."""
        if self.server is None or self.stopped:
            return
        self.server.pause(self._rank)
        tensors = self._binding.tensors()
        if self._held is None:
            self._held = [torch.empty_like(tensor) for tensor in tensors]
        with torch.no_grad():
            for held, tensor in zip(self._held, tensors, strict=True):
                held.copy_(tensor)
        snapshot = torch.empty(self._binding.layout.numel, dtype=torch.float32)
        self._shown_version = self.server.copy_model(snapshot)
        self._binding.load(snapshot)
        self._showing = True

    def hide_global_model(self) -> None:
        """Puts the local weights back, to go on with the round."""
        if not self._showing or self.server is None or self._held is None:
            return
        self._showing = False
        with torch.no_grad():
            for held, tensor in zip(self._held, self._binding.tensors(), strict=True):
                tensor.copy_(held)
        self.server.resume(self._rank)
        self.worker.interrupt()

    def global_tensors(self) -> tuple[dict[str, Tensor], int]:
        """Rank 0: the weights to save, fp32 by name, and their version.

        While a validation shows the global model these are the validated weights, otherwise those of this moment.
        """
        assert self.server is not None
        flat = torch.empty(self._binding.layout.numel, dtype=torch.float32)
        if self._showing:
            self._binding.read(flat)
            version = self._shown_version
        else:
            version = self.server.copy_model(flat)
            # A save between two steps takes time that is no computing.
            self.worker.interrupt()
        return self._binding.layout.views(flat), version

    def in_place_of(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """A module's ``state_dict`` with ``tensors`` (by name, fp32) where it shows the module's own.

        The module may have given its entries other names, or left some out; they are recognised by their memory, which
        also covers tied parameters.
        """
        names = {
            (tensor.data_ptr(), tensor.shape): entry.name
            for entry, tensor in zip(self._binding.layout.entries, self._binding.tensors(), strict=True)
            if tensor.numel() > 0
        }
        shown = dict(state)
        for key, value in state.items():
            if isinstance(value, Tensor) and (value.data_ptr(), value.shape) in names:
                shown[key] = tensors[names[value.data_ptr(), value.shape]].to(value.device, value.dtype)
        return shown

    def state_dict(self) -> dict[str, Any]:
        """Rank 0: the server's whole state, of one moment."""
        assert self.server is not None
        return {"format": 1, "initial_workers": self.workers, **self.server.state_dict()}

    def totals(self) -> dict[int, WorkerTotals]:
        """Rank 0: what each worker has done so far."""
        assert self.server is not None
        return self.server.totals()

    # -------------------------------------------------------------------- ending

    def survivors(self) -> set[int]:
        """Rank 0: the workers that are still there."""
        assert self.server is not None
        return set(self.server.ask(lambda coordinator: coordinator.live))

    def close(self, reason: str | None = None) -> None:
        """Takes everything down. Without an earlier :meth:`finish`, workers that are told so end with an error.

        Args:
            reason: why training ends here, told to the workers that go on.

        """
        worker = getattr(self, "worker", None)
        if worker is not None:
            worker.exchange.close()
        self._close_server(reason)

    # ------------------------------------------------------------------ internal

    @property
    def _reply(self) -> Reply:
        assert self.worker.reply is not None
        return self.worker.reply

    def _end_round(self, final: bool = False, stop: bool = False) -> None:
        self.worker.end_round(final=final, stop=stop)
        if self.stopped:
            self._ended_at = time.monotonic()

    def _open(self, layout: Layout, restored: dict[str, Any] | None) -> Exchange:
        rendezvous = self._rendezvous
        if self._rank > 0:
            assert rendezvous is not None
            from lightning_async_localsgd.wire import WireExchange

            near = rendezvous.one_host()
            local, distant = rendezvous.broadcast(None)
            share_integers(self._module, rendezvous)
            return WireExchange(
                local if near[self._rank] and local is not None else distant,
                layout,
                silence_timeout=self._settings.silence_timeout,
                connect_timeout=self._settings.start_timeout,
            )
        self.server = self._open_server(layout, restored)
        if rendezvous is not None:
            self._open_wire(rendezvous)
            share_integers(self._module, rendezvous)
        rule = self._settings.rule
        exact = rendezvous is None and rule.replaces_model and all(e.dtype == "torch.float32" for e in layout.entries)
        return LocalExchange(self.server, self._binding.read if exact else None, self._watch)

    def _open_server(self, layout: Layout, restored: dict[str, Any] | None) -> Server:
        settings = self._settings
        model = GlobalModel(layout, settings.rule, self.workers)
        self._binding.read(model.theta)
        coordinator = Coordinator(
            model,
            SpeedAwareSteps(settings.local_steps, settings.dynamic_local_steps),
            settings.grace,
            Budget(settings.total, settings.done),
            cohort=self.workers,
            incarnation=uuid.uuid4().hex,
        )
        if restored is not None:
            coordinator.load_state_dict(_rescaled(restored, self.workers))
        buffers = BufferPool(layout.numel, most=self.workers + 2)
        return Server(coordinator, buffers, threaded=self.workers > 1)

    def _open_wire(self, rendezvous: Rendezvous) -> None:
        from lightning_async_localsgd.wire import WireServer

        assert self.server is not None
        options = self._settings.exchange
        near = rendezvous.one_host()
        distant = [rank for rank, same in near.items() if not same]
        if options.transport == "ipc" and distant:
            raise ValueError(
                f"exchange.transport='ipc' reaches one host only, but rank(s) {distant} are on other hosts than rank "
                "0; use transport='auto' or 'tcp'"
            )
        self._wire = WireServer(
            self.server,
            ipc=options.transport != "tcp" and (len(distant) < self.workers - 1),
            tcp=options.transport == "tcp" or bool(distant),
            host=rendezvous.host,
            port=options.port,
            encrypt=bool(distant) if options.encrypt is None else options.encrypt,
            silence_timeout=self._settings.silence_timeout,
        )
        rendezvous.broadcast((self._wire.local_endpoints, self._wire.endpoints))

    def _await_others(self) -> None:
        """Rank 0: waits until every other worker of the first cohort has joined."""
        assert self.server is not None
        until = time.monotonic() + self._settings.start_timeout
        while missing := [rank for rank in self.server.missing if rank != self._rank]:
            self._watch()
            if time.monotonic() > until:
                raise RendezvousError(
                    f"worker(s) {', '.join(map(str, missing))} of {self.workers} did not join within "
                    f"start_timeout={self._settings.start_timeout:g} s; see what they printed"
                )
            time.sleep(_PATIENCE)

    def _close_server(self, reason: str | None = None) -> None:
        if self.server is not None:
            self.server.close(reason)
        if self._wire is not None:
            self._wire.close()


def _integers(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module that are saved with it but not exchanged, because they aren't floating-point."""
    return {
        name: tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor) and not tensor.is_floating_point()
    }


def share_integers(module: nn.Module, rendezvous: Rendezvous | None) -> None:
    """Gives every rank rank 0's values of the tensors that are not exchanged (counters, indices)."""
    if rendezvous is None:
        return
    mine = _integers(module)
    values = rendezvous.broadcast({name: tensor.detach().cpu() for name, tensor in mine.items()})
    with torch.no_grad():
        for name, tensor in mine.items():
            if name in values and values[name].shape == tensor.shape:
                tensor.copy_(values[name])


def _rescaled(state: dict[str, Any], workers: int) -> dict[str, Any]:
    """The state for ``workers`` workers: what is done stays the same share of the run."""
    before = int(state["initial_workers"])
    if before == workers:
        return state
    done = round(state["budget"]["done"] * workers / before)
    _log.info("the checkpoint was written with %d workers; going on with %d", before, workers)
    return {**state, "budget": {**state["budget"], "done": done}}
