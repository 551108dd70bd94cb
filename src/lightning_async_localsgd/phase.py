"""The asynchronous phase of a fit: what is built when training starts, used at every step and taken down at the end.

Every rank has a worker; rank 0 has the server as well, and, where there are other ranks, the wire's end that they dial.
Lightning is not known here: the strategy tells what happens and gets told what to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_async_localsgd.connection import Connection
from lightning_async_localsgd.layout import Binding, Layout
from lightning_async_localsgd.leases import LeaseDesk
from lightning_async_localsgd.phase_base import Phase
from lightning_async_localsgd.server import About
from lightning_async_localsgd.share import counters, digests, not_exchanged, send, share_differing, unshared
from lightning_async_localsgd.worker import Worker

if TYPE_CHECKING:
    from lightning_async_localsgd.exchange import Exchange
    from lightning_async_localsgd.joining import Entry
    from lightning_async_localsgd.leases import LeaseStock
    from lightning_async_localsgd.messages import Reply
    from lightning_async_localsgd.rendezvous import Rendezvous
    from lightning_async_localsgd.restarts import JoinTicket
    from lightning_async_localsgd.server import Server
    from lightning_async_localsgd.settings import PhaseSettings


class AsyncPhase(Phase):
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
        alone = workers == 1 and settings.token is None
        layout = Layout.of(module, settings.frozen)
        super().__init__(settings, module, Binding(layout, module), workers, alone)
        self._rendezvous = rendezvous
        self._rank = rank
        self._left = False
        self._digests: dict[str, str] = {}
        tensors = not_exchanged(module, layout)
        if not self.alone:
            self._digests = digests(tensors)
        self._connection = Connection(settings, self.binding, workers, lambda: self.keeps_weights)
        try:
            about = About(
                workers,
                settings.seed,
                settings.fit,
                settings.folder,
                unshared(module, self._digests),
                ahead=settings.ahead,
            )
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
        exact = exact and self._settings.merge.clip_norm is None
        return exact and self.alone and self._settings.rule.replaces_model

    @property
    def heard(self) -> float:
        """Local steps of all workers that were done by the time of the last reply."""
        return self._reply.progress

    @property
    def progress(self) -> float:
        """Local steps of all workers that are done by now, as far as this rank can tell, per worker.

        Where the run has an end this is a share of the steps that were planned for each worker, and all of them then.
        """
        return self._estimated(self._reply.progress + self.worker.round_steps * self._reply.pace)

    @property
    def next_progress(self) -> float:
        """What :attr:`progress` will be when this rank has taken one step more."""
        return self._estimated(self._reply.progress + (self.worker.round_steps + 1) * self._reply.pace)

    def lease_stock(self, stream: str, items: int, unit: int, ordered: bool) -> LeaseStock:
        """This rank's share of a data loader's items, see :meth:`.LeaseDesk.stock`."""
        return self._leases.stock(stream, items, unit, ordered)

    @property
    def ticket(self) -> JoinTicket:
        """How a process of this rank's host joins."""
        return self._connection.ticket

    @property
    def open_to(self) -> str | None:
        """On rank 0, the address at which others may join; None where they cannot."""
        return self._connection.open_to

    def may_restart(self, worker: int) -> bool:
        """Whether a worker may come back, as far as this rank can tell."""
        return not self.stopped and (self.server is None or worker not in self.server.quarantined)

    def end_step(self) -> bool:
        """The loop has come to the end of an optimizer step; the round is exchanged if it is over.

        Returns:
            Whether a model was adopted.

        Raises:
            ExchangeError: the server cannot be reached any more.

        """
        if self.stopped:
            return False
        self.worker.end_step(self._samples, self._tokens)
        self._samples = 0
        self._tokens = 0
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

    def finish_and_ask(self) -> None:
        """The same, and rank 0 is to end training for everybody as soon as it finds a minimum reached."""
        if not self.stopped:
            self._end_round(final=True, asks=True)

    @property
    def asked_to_stop(self) -> bool:
        """See :attr:`.phase_base.Phase.asked_to_stop`."""
        return self.server is not None and self.server.view.asked_to_stop

    def leave(self) -> None:
        """Hands in what there is and has no more part in the training, which goes on."""
        if not self.stopped and self.worker.round_steps > 0:
            self._end_round()
        if not self.stopped:
            self._left = True
            self.worker.exchange.close()

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

    def _end_round(self, final: bool = False, stop: bool = False, asks: bool = False) -> None:
        self.worker.end_round(final=final, stop=stop, asks=asks)
        if self.stopped:
            self._ended_at = time.monotonic()

    def _join(self, entry: Entry, about: About) -> Exchange:
        if about.unshared != entry.facts.unshared:
            raise ValueError(
                f"worker {self._rank} joins a training whose frozen parameters are not those of its own module, and "
                "these are not exchanged; load the same weights, or call seed_everything() before the module is made"
            )
        return self._connection.dial(entry.endpoints)
