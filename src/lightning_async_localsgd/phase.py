"""The asynchronous phase of a fit: what is built when training starts, used at every step and taken down at the end.

Every rank has a worker; rank 0 has the server as well, and, where there are other ranks, the wire's end that they dial.
Lightning is not known here: the strategy tells what happens and gets told what to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_async_localsgd.connection import Connection
from lightning_async_localsgd.layout import Binding, Layout
from lightning_async_localsgd.leases import LeaseDesk
from lightning_async_localsgd.server import About
from lightning_async_localsgd.share import counters, digests, not_exchanged, send, share_differing, unshared
from lightning_async_localsgd.worker import Worker

if TYPE_CHECKING:
    from lightning_async_localsgd.exchange import Exchange
    from lightning_async_localsgd.joining import Entry
    from lightning_async_localsgd.leases import LeaseStock
    from lightning_async_localsgd.messages import Reply
    from lightning_async_localsgd.records import WorkerTotals
    from lightning_async_localsgd.rendezvous import Rendezvous
    from lightning_async_localsgd.restarts import JoinTicket
    from lightning_async_localsgd.server import Server
    from lightning_async_localsgd.settings import PhaseSettings


class AsyncPhase:
    """One rank's part in the asynchronous phase.

    Args:
        settings: see there.
        module: the model to train.
        rendezvous: the meeting point of the ranks; None in a world of one, and for a stranger who joins.
        rank: this rank.
        workers: ranks that the run was started with.
        restored: the state of a server to go on from (rank 0 only), see :meth:`state_dict`.
        watch: called while waiting for others; raises if that has become pointless.
        entry: the way into a training that runs already; None where this rank has been there from the beginning.

    Raises:
        ValueError: the module cannot be trained this way, or the restored state does not fit.
        RuntimeError: the port is taken, or a worker did not come.

    Attributes:
        worker: this rank's worker.
        module: the model.
        binding: its exchanged tensors.
        workers: ranks that took part at the start.
        alone: there is one worker, and none can join.

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
        entry: Entry | None = None,
    ) -> None:
        self.workers = workers
        self.alone = workers == 1 and settings.token is None
        self.total = settings.total
        self._settings = settings
        self._rendezvous = rendezvous
        self._rank = rank
        self.module = module
        self._samples = 0
        self._in_step = False
        self._left = False
        self._digests: dict[str, str] = {}
        self._held: list[Tensor] | None = None
        self._showing = False
        self._shown_version = 0
        layout = Layout.of(module, settings.frozen)
        self.binding = Binding(layout, module)
        tensors = not_exchanged(module, layout)
        if not self.alone:
            self._digests = digests(tensors)
        self._connection = Connection(settings, self.binding, workers, lambda: self.keeps_weights)
        try:
            about = About(workers, settings.seed, settings.fit, settings.folder, unshared(module, self._digests))
            if entry is not None:
                exchange = self._join(entry, about)
            elif rank > 0:
                assert rendezvous is not None
                exchange = self._connection.meet(rendezvous)
            else:
                exchange = self._connection.open(rendezvous, about, restored, self.alone, watch)
            self.worker = Worker(rank, self.binding, exchange)
            self._leases = LeaseDesk(exchange, rank, self.worker.session)
            self.worker.used = self._leases.used
            if rank == 0:
                self._connection.await_others(watch)
            self.worker.join()
            if rendezvous is not None and entry is None:
                # After joining: there a model that is another one is named with its first differences.
                share_differing(tensors, self._digests, rendezvous)
            self._started_at = time.monotonic()
            self._ended_at: float | None = None
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ running

    @property
    def server(self) -> Server | None:
        """On rank 0, the server."""
        return self._connection.server

    @property
    def stopped(self) -> bool:
        """Training is over for this rank; the module holds the final global model, or that of when it left."""
        return self.worker.stopped or self._left

    @property
    def keeps_weights(self) -> bool:
        """Whether an exchange leaves the module as it was, to the last bit: one worker, an outer step of theta - g."""
        exact = all(entry.dtype == "torch.float32" for entry in self.binding.layout.entries)
        return exact and self.alone and self._settings.rule.replaces_model

    @property
    def progress(self) -> float:
        """Local steps of all workers that are done by now, as far as this rank can tell, per worker.

        Where the run has an end this is a share of the steps that were planned for each worker, and all of them then.
        """
        return self._progress_after(self.worker.round_steps)

    @property
    def next_progress(self) -> float:
        """What :attr:`progress` will be when this rank has taken one step more."""
        return self._progress_after(self.worker.round_steps + 1)

    def _progress_after(self, steps: int) -> float:
        reply = self._reply
        done = reply.progress + steps * reply.pace
        if self.total is None or not self._settings.planned:
            return done / self.workers
        return min(done / self.total, 1.0) * self._settings.planned

    def lease_stock(self, stream: str, items: int, unit: int, ordered: bool) -> LeaseStock:
        """This rank's share of a data loader's items, see :meth:`.LeaseDesk.stock`."""
        return self._leases.stock(stream, items, unit, ordered)

    def begin_epoch(self, epoch: int) -> None:
        """This rank begins an epoch; where it is rank 0, whoever joins begins with the same."""
        if self.server is not None:
            self.server.about = replace(self.server.about, epoch=epoch)

    @property
    def in_step(self) -> bool:
        """Whether an optimizer step has begun and not ended; batches are accumulated for one, for example."""
        return self._in_step

    @property
    def ticket(self) -> JoinTicket:
        """How a process of this rank's host joins."""
        return self._connection.ticket

    def may_restart(self, worker: int) -> bool:
        """Whether a worker may come back, as far as this rank can tell."""
        return not self.stopped and (self.server is None or worker not in self.server.quarantined)

    def see_batch(self, samples: int) -> None:
        """A batch of ``samples`` samples is about to be trained on."""
        self._samples += samples
        self._in_step = True

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
        self._in_step = False
        self.worker.exchange.check()
        if not self.worker.due:
            return False
        self._end_round()
        return True

    def settle(self) -> bool:
        """A single worker ends its round early, so that the global model holds everything that it has learned.

        Called before the global model is shown or saved. In the middle of a step, where weights must not change, and
        with several workers, which are in the midst of their rounds all the time, nothing happens.

        Returns:
            Whether a model was adopted.

        """
        if not self.alone or self.stopped or self._in_step or self._showing or self.worker.round_steps == 0:
            return False
        self._end_round()
        return True

    def finish(self, stop: bool) -> None:
        """Hands in what there is, waits until everybody has, and adopts the final model.

        Args:
            stop: ends training for everybody; otherwise the others go on for as long as they have something to do.

        """
        if not self.stopped:
            self._end_round(final=True, stop=stop)

    def leave(self) -> None:
        """Hands in what there is and has no more part in the training, which goes on."""
        if not self.stopped and self.worker.round_steps > 0:
            self._end_round()
        if not self.stopped:
            self._left = True
            self.worker.exchange.close()

    def request_stop(self) -> None:
        """Rank 0 has decided to stop: everybody is told now, and handed the final model at their next step."""
        if self.server is not None:
            self.server.stop()

    @property
    def seconds(self) -> float:
        """Since training started, or for as long as it lasted."""
        return (self._ended_at or time.monotonic()) - self._started_at

    @property
    def lost_workers(self) -> list[tuple[int, float, str]]:
        """Rank 0: who was gone before training was over, seconds after its start, and why."""
        assert self.server is not None
        return [(worker, when - self._started_at, why) for worker, when, why in tuple(self.server.lost_workers)]

    @property
    def bytes_sent(self) -> int:
        """Rank 0: bytes that the server has sent to workers in other processes."""
        wire = self._connection.wire
        return 0 if wire is None else wire.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Rank 0: bytes that workers in other processes have sent to the server."""
        wire = self._connection.wire
        return 0 if wire is None else wire.bytes_received

    # --------------------------------------------------- rank 0: validate, save

    def show_global_model(self) -> None:
        """Puts the global model of this moment into the module, and the local weights aside."""
        if self.server is None or self.stopped:
            return
        self.server.pause(self._rank)
        tensors = self.binding.tensors()
        if self._held is None:
            self._held = [torch.empty_like(tensor) for tensor in tensors]
        with torch.no_grad():
            for held, tensor in zip(self._held, tensors, strict=True):
                held.copy_(tensor)
        snapshot = torch.empty(self.binding.layout.numel, dtype=torch.float32)
        self._shown_version = self.server.copy_model(snapshot)
        self.binding.load(snapshot)
        self._showing = True

    def hide_global_model(self) -> None:
        """Puts the local weights back, to go on with the round."""
        if not self._showing or self.server is None or self._held is None:
            return
        self._showing = False
        with torch.no_grad():
            for held, tensor in zip(self._held, self.binding.tensors(), strict=True):
                tensor.copy_(held)
        self.server.resume(self._rank)
        self.worker.interrupt()

    def global_tensors(self) -> tuple[dict[str, Tensor], int]:
        """Rank 0: the weights to save, fp32 by name, and their version.

        While a validation shows the global model these are the validated weights, otherwise those of this moment.
        """
        assert self.server is not None
        flat = torch.empty(self.binding.layout.numel, dtype=torch.float32)
        if self._showing:
            self.binding.read(flat)
            version = self._shown_version
        else:
            version = self.server.copy_model(flat)
            # A save between two steps takes time that is no computing.
            self.worker.interrupt()
        return self.binding.layout.views(flat), version

    def in_place_of(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[Tensor]]:
        """A module's ``state_dict`` with ``tensors`` (by name, fp32) where it shows the module's own.

        The module may have given its entries other names, or left some out; they are recognised by their memory, which
        also covers tied parameters. Whatever training may still change is a copy, with memory of its own.

        Returns:
            The state, and those of its tensors that restore the exchanged model to the last bit; none if they don't,
            because some are rounded from fp32 or left out.

        """
        names = self._names()
        frozen = {parameter.data_ptr() for parameter in self.module.parameters() if not parameter.requires_grad}
        copies: dict[str, Tensor] = {}
        shown = dict(state)
        for key, value in state.items():
            if not isinstance(value, Tensor):
                continue
            name = names.get((value.data_ptr(), value.shape))
            if name is None:
                shown[key] = value if value.data_ptr() in frozen else value.clone()
            else:
                if name not in copies:
                    copies[name] = tensors[name].to(value.device, value.dtype, copy=True)
                shown[key] = copies[name]
        return shown, list(copies.values()) if self.restored_by(state) else []

    def restored_by(self, state: Mapping[str, Any]) -> bool:
        """Whether a module's ``state_dict``, loaded again, restores the exchanged tensors to the last bit."""
        shown = {(value.data_ptr(), value.shape) for value in state.values() if isinstance(value, Tensor)}
        entries = self.binding.layout.entries
        return all(entry.dtype == "torch.float32" for entry in entries) and self._names().keys() <= shown

    def _names(self) -> dict[tuple[int, torch.Size], str]:
        """The names of the exchanged tensors by their memory."""
        return {
            (tensor.data_ptr(), tensor.shape): entry.name
            for entry, tensor in zip(self.binding.layout.entries, self.binding.tensors(), strict=True)
            if tensor.numel() > 0
        }

    def state_dict(self) -> dict[str, Any]:
        """Rank 0: the server's whole state, of one moment."""
        assert self.server is not None
        return {"format": 1, "initial_workers": self.workers, **self.server.state_dict()}

    def totals(self) -> dict[int, WorkerTotals]:
        """Rank 0: what each worker has done so far."""
        assert self.server is not None
        return self.server.totals()

    # -------------------------------------------------------------------- ending

    def share_end(self, averaged: bool) -> bool:
        """After the end: all ranks take what rank 0 has where it is not exchanged, or where hooks have changed it.

        Args:
            averaged: whether a callback has put averages into rank 0's module, frozen parameters included.

        Returns:
            On rank 0, whether the module still holds the final global model.

        """
        final = self.worker.model
        changed = self.binding.changed_from(final)
        if self._rendezvous is None:
            if self._rank > 0:
                self.binding.load(final)
            return not changed
        tensors = not_exchanged(self.module, self.binding.layout)
        names = list(changed)
        if self._rank == 0 and averaged:
            names += [name for name, digest in digests(tensors).items() if self._digests[name] != digest]
        names = self._rendezvous.broadcast(names)
        if self._rank > 0:
            self.binding.load(final)
        tensors.update(self.binding.named())
        send({**{name: tensors[name] for name in names}, **counters(self.module)}, self._rendezvous)
        return not changed

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
        self._connection.close(reason)

    # ------------------------------------------------------------------ internal

    @property
    def _reply(self) -> Reply:
        assert self.worker.reply is not None
        return self.worker.reply

    def _end_round(self, final: bool = False, stop: bool = False) -> None:
        self.worker.end_round(final=final, stop=stop)
        if self.stopped:
            self._ended_at = time.monotonic()

    def _join(self, entry: Entry, about: About) -> Exchange:
        if about.unshared != entry.facts.unshared:
            raise ValueError(
                f"worker {self._rank} joins a training whose frozen parameters are not those of its own module, and "
                "these are not exchanged; load the same weights, or call seed_everything() before the module is made"
            )
        return self._connection.dial(entry.endpoints)
