"""One rank's part in asynchronous training: created when training starts, called at every step, closed at the end.

Every rank has a worker. Rank 0 also has the server and, if there are other ranks, the wire server to which they
connect. This module does not know Lightning: the strategy reports what happens and calls its methods.
"""

from __future__ import annotations

import logging
import math
import socket
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_async_localsgd.protocol.exchange import ExchangeError
from lightning_async_localsgd.protocol.frozen import FrozenParameters
from lightning_async_localsgd.protocol.layout import Binding, Layout
from lightning_async_localsgd.protocol.messages import JoinInfo
from lightning_async_localsgd.runtime.base import RESIDUAL, Runtime, warn_of_own_buffer
from lightning_async_localsgd.runtime.leases import LeaseClient
from lightning_async_localsgd.runtime.server_access import ServerAccess
from lightning_async_localsgd.runtime.shared_parameters import SharedParameters
from lightning_async_localsgd.runtime.sync_state import (
    broadcast_tensors,
    frozen_digest,
    persistent_buffers,
    same_frozen,
    set_buffer,
    sync_buffers,
    sync_differing,
    tensor_digests,
    unexchanged_tensors,
)
from lightning_async_localsgd.runtime.worker import Worker

if TYPE_CHECKING:
    from lightning_async_localsgd.launch.joining import JoinGrant
    from lightning_async_localsgd.launch.rendezvous import Rendezvous
    from lightning_async_localsgd.launch.restarts import JoinTicket
    from lightning_async_localsgd.protocol.messages import Reply, Share
    from lightning_async_localsgd.runtime.leases import LeaseBuffer
    from lightning_async_localsgd.runtime.local_exchange import LocalExchange
    from lightning_async_localsgd.runtime.settings import RuntimeSettings
    from lightning_async_localsgd.server.server import Server
    from lightning_async_localsgd.wire import WireExchange

_log = logging.getLogger(__name__)


class LiveRuntime(Runtime):
    """One rank's part in asynchronous training.

    Args:
        settings: policies and numbers of the run.
        module: the model to train.
        rendezvous: meeting point of the ranks; None if there is only one rank, and for a worker that joins later.
        rank: number of this rank.
        workers: number of workers that the run begins with.
        ranks: how many of these are ranks, which are started together. The others join.
        restored: server state to resume from, see :meth:`state_dict`. Rank 0 only.
        grant: the server's answer to a worker that joins a running training; None for all other ranks.

    Raises:
        ValueError: The module cannot be trained this way, or ``restored`` does not fit the model.
        RuntimeError: The port is taken, or a worker did not join in time.

    """

    worker: Worker

    def __init__(
        self,
        settings: RuntimeSettings,
        module: nn.Module,
        rendezvous: Rendezvous | None,
        rank: int,
        workers: int,
        ranks: int,
        restored: dict[str, Any] | None = None,
        grant: JoinGrant | None = None,
    ) -> None:
        self._single_worker = workers == 1 and settings.token is None and settings.evaluator is None
        moments = None if self._single_worker else settings.moments
        layout = Layout.of(module, settings.exchange_frozen, moments)
        binding = Binding(layout, module, moments)
        super().__init__(settings, module, binding, workers, single_process=self._single_worker)
        self._rendezvous = rendezvous
        self._rank = rank
        self._left = False
        self._missed: Reply | None = None
        if rank == 0 and not self._single_worker:
            binding.on_own = warn_of_own_buffer
        self._digests: dict[str, str] = {}
        tensors = unexchanged_tensors(module, layout)
        if not self.single_process:
            self._digests = tensor_digests(tensors)
        frozen = None if self.single_process else FrozenParameters(module, layout)
        sizes = [] if frozen is None else frozen.sizes
        self._access = ServerAccess(settings, self.binding, workers, ranks, lambda: self.keeps_weights, sizes)
        try:
            info = JoinInfo(
                workers,
                settings.seed,
                settings.fit_number,
                settings.run_name,
                frozen_digest(module, tensors, self._digests),
                step_offset=settings.step_offset,
                batch_size=settings.batch_size,
            )
            exchange: LocalExchange | WireExchange
            if grant is not None:
                exchange = self._join(grant, info)
            elif rank > 0:
                assert rendezvous is not None
                exchange = self._access.find_server(rendezvous)
            else:
                exchange = self._access.open_server(rendezvous, info, restored, self._single_worker)
                if settings.evaluator is not None:
                    settings.evaluator.start(self._access.ticket)
            self.worker = Worker(rank, self.binding, exchange, exchange_options=settings.exchange)
            self.worker.step_samples = settings.samples_of(rank)
            if restored is not None and self.worker.uplink is not None:
                self.worker.uplink.restore(restored.get(RESIDUAL))
            if frozen is not None and frozen.names:
                keeps_own = settings.exchange.frozen is False
                self.worker.shared = SharedParameters(frozen, self._share, keeps_own)
            self.worker.optimizer_weights = settings.optimizer_weights
            self.worker.traits = settings.traits
            self._leases = LeaseClient(exchange, rank, self.worker.session)
            self.worker.items_used = self._leases.items_used
            if rank == 0:
                self._access.wait_for_workers()
            self.worker.join()
            if rendezvous is not None and grant is None:
                # Only after joining: the server refuses another model with an error that names the differences.
                sync_differing(tensors, self._digests, rendezvous)
            if frozen is not None:
                frozen.watch()  # Only now: synchronization is no change in training.
            self._started_at = time.monotonic()
            self._ended_at: float | None = None
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ running

    @property
    @override
    def server(self) -> Server | None:
        return self._access.server

    @property
    @override
    def stopped(self) -> bool:
        return self.worker.stopped or self._left

    @property
    @override
    def keeps_weights(self) -> bool:
        # A single worker whose outer step is theta - g gets its own weights back.
        exact = all(spec.dtype == "torch.float32" for spec in self.binding.layout.entries)
        exact = exact and self._settings.merge.options.clip_norm is None and self._settings.exchange.exact
        return exact and self._single_worker and self._settings.outer_optimizer.replaces_model

    @property
    @override
    def confirmed_steps(self) -> float:
        return self._reply.progress

    @property
    @override
    def global_steps(self) -> float:
        return self._global_steps_after(self.worker.steps_since_reply)

    @property
    @override
    def next_global_steps(self) -> float:
        return self._global_steps_after(self.worker.steps_since_reply + 1)

    @override
    def lease_buffer(self, stream: str, items: int, unit: int, ordered: bool, own_unit: bool) -> LeaseBuffer:
        return self._leases.buffer(stream, items, unit, ordered, own_unit)

    @property
    def ticket(self) -> JoinTicket:
        """What another process on this host needs to join the run."""
        return self._access.ticket

    @property
    def join_address(self) -> str | None:
        """On rank 0, the address at which workers may join while training runs; None if they cannot."""
        return self._access.join_address

    def may_restart(self, worker: int) -> bool:
        """Return whether a worker may be restarted, as far as this rank knows."""
        return not self.stopped and (self.server is None or worker not in self.server.quarantined)

    @override
    def end_step(self) -> bool:
        """End an optimizer step, and exchange the round if the round is over. Adopt an answer that has arrived.

        Returns:
            Whether a model was adopted.

        Raises:
            ExchangeError: The server cannot be reached any more.

        """
        if self.stopped:
            return False
        self.worker.end_step(self._samples, self._tokens)
        self._samples = 0
        self._tokens = 0
        self._in_step = False
        self.worker.check()
        adopted = self.worker.adopt_answer()
        if self.worker.due:
            adopted = self.worker.end_round() or adopted
        self._note_end()
        return adopted

    @override
    def average_gradients(self, factor: float) -> None:
        reply = self.worker.average_gradients(factor)
        self._missed = None if reply.averaged else reply

    @override
    def end_synchronous_step(self) -> bool:
        self._in_step = False
        missed, self._missed = self._missed, None
        if missed is not None:
            self.worker.adopt(missed)
            adopted = True
        else:
            assert self.worker.reply is not None
            self.worker.check()
            adopted = self.worker.reply.local_steps == 0 and self.worker.end_round()
        self._note_end()
        return adopted

    def _load_weights(self) -> None:
        """Give the server the weights of rank 0's worker, which are those of the run in its synchronous beginning."""
        assert self.server is not None
        flat, weights = torch.empty(self.binding.layout.numel, dtype=torch.float32), self.optimizer_weights
        left = weights.leave() if weights is not None else []
        self.binding.read(flat)
        flat[self.binding.layout.model_numel :].fill_(math.nan)
        if weights is not None:
            weights.arrive(left)
        self.server.load_weights(self.worker.number, flat)

    @override
    def flush_round(self) -> bool:
        """End the round of a single worker early, so that the global model holds everything that was learned.

        In the synchronous beginning, the server gets the weights that the workers have reached.

        Does nothing in the middle of a step, where weights must not change. Does nothing with several workers either,
        see :meth:`recall_rounds`.

        Returns:
            Whether a model was adopted.

        """
        if self.server is not None and self.worker.synchronous and not self._shows_global_model:
            self._load_weights()
        if (
            not self._single_worker
            or self.stopped
            or self._in_step
            or self._shows_global_model
            or self.worker.round_steps == 0
        ):
            return False
        return self._end_round()

    @override
    def recall_rounds(self) -> bool:
        if self.server is None or self._single_worker or self.stopped or self._in_step or self._shows_global_model:
            return False
        if self.worker.synchronous:  # The model has all steps.
            return False
        recalled = self.server.recall()
        if not recalled or (recalled == {0} and self.worker.round_steps == 0):
            return False
        if self._access.wire is not None:
            self._access.wire.send_recalls()
        return True

    @override
    def end_round(self) -> None:
        # If rounds were recalled, the dispatch waits for the other workers, at most for a few of their steps.
        self._end_round()
        self.worker.adopt_answer(wait=True)
        self._note_end()

    @override
    def finish(self, stop: bool) -> None:
        """Push the steps of the unfinished round, wait until all workers have done the same, and adopt the final model.

        Args:
            stop: whether training ends for all workers. Otherwise, the other workers continue until the budget or
                the data is used up.

        """
        if not self.stopped:
            self._end_round(final=True, stop=stop)

    @override
    def finish_and_request_stop(self) -> None:
        if not self.stopped:
            self._end_round(final=True, request_stop=True)

    @property
    @override
    def stop_requested(self) -> bool:
        return self.server is not None and self.server.snapshot.stop_requested

    @override
    def leave(self) -> None:
        if not self.stopped:
            self.worker.adopt_answer(wait=True)
        # A step of the synchronous beginning cannot be ended early: its accumulated gradients are lost, as under DDP.
        if not self.stopped and self.worker.round_steps > 0 and not self.worker.synchronous:
            self._end_round()
        if not self.stopped:
            self.worker.adopt_answer(wait=True)
            self._left = True
            self.worker.close()

    @property
    @override
    def seconds(self) -> float:
        return (self._ended_at or time.monotonic()) - self._started_at

    @property
    @override
    def lost_workers(self) -> list[tuple[int, float, str]]:
        assert self.server is not None
        return [(worker, when - self._started_at, why) for worker, when, why in tuple(self.server.lost_workers)]

    @property
    @override
    def bytes_sent(self) -> int:
        wire = self._access.wire
        return 0 if wire is None else wire.bytes_sent

    @property
    @override
    def bytes_received(self) -> int:
        wire = self._access.wire
        return 0 if wire is None else wire.bytes_received

    @override
    def state_dict(self) -> dict[str, Any]:
        state, uplink = super().state_dict(), self.worker.uplink
        return state if uplink is None else {**state, RESIDUAL: uplink.copy_residual()}

    # -------------------------------------------------------------------- ending

    @override
    def sync_final_state(self, averaged: bool) -> bool:
        final = self.worker.model
        changed = self.binding.changed_from(final)
        if self._rendezvous is None:
            if self._rank > 0:
                self.binding.load(final)
            return not changed
        tensors = unexchanged_tensors(self.module, self.binding.layout)
        shared = self.worker.shared
        names = [*changed, *(shared.differing() if shared is not None else ())]
        if self._rank == 0 and averaged:
            names += [name for name, digest in tensor_digests(tensors).items() if self._digests.get(name) != digest]
        buffers = persistent_buffers(self.module)
        exchanged = self.binding.named()
        own = [name for name in buffers if name in names or name not in exchanged]
        names = self._rendezvous.broadcast([name for name in names if name not in own])
        if self._rank > 0:
            self.binding.load(final)
            views = self.binding.layout.views(final, "buffer")
            for name in self.binding.own:  # On rank 0, it may still be exchanged.
                set_buffer(self.module, name, views[name].clone())
        tensors.update(exchanged)
        broadcast_tensors({name: tensors[name] for name in names}, self._rendezvous)
        sync_buffers(self.module, own, self._rendezvous)
        return not changed

    @override
    def close(self, reason: str | None = None) -> None:
        worker = getattr(self, "worker", None)
        if worker is not None:
            worker.close(reason or "")
        self._access.close(reason)

    # ------------------------------------------------------------------ internal

    @property
    def _reply(self) -> Reply:
        assert self.worker.reply is not None
        return self.worker.reply

    def _global_steps_after(self, steps: int) -> float:
        """Estimate global steps after ``steps`` steps since the last reply, from the progress in the reply."""
        return self._estimate_global_steps(self._reply.progress + steps * self._reply.progress_per_step)

    def _end_round(self, final: bool = False, stop: bool = False, request_stop: bool = False) -> bool:
        self.worker.adopt_answer(wait=True)
        if not self.stopped:
            self.worker.end_round(final=final, stop=stop, request_stop=request_stop)
        self._note_end()
        return True

    def _note_end(self) -> None:
        if self.worker.stopped and self._ended_at is None:
            self._ended_at = time.monotonic()

    def _share(self, share: Share, values: Tensor) -> Reply:
        try:
            return self.worker.exchange.share(share, values)
        except ExchangeError as error:
            if share.merge or self._rendezvous is not None:
                raise
            # The other ranks do not wait for a late joiner at the end of training, and its model is not needed.
            _log.warning("worker %d could not get the last values of frozen parameters: %s", self._rank, error)
            return self._reply

    def _join(self, grant: JoinGrant, info: JoinInfo) -> WireExchange:
        if not same_frozen(info.frozen_digest, grant.info.frozen_digest):
            raise ValueError(
                f"worker {self._rank} cannot join: its frozen parameters differ from those of the run, and frozen "
                "parameters are not exchanged; load the same weights, or call seed_everything() before the module is "
                "created. If one of them has precision='16-true', use 'bf16-true' instead"
            )
        if info.batch_size != grant.info.batch_size:
            raise ValueError(
                f"worker {self._rank} on host {socket.gethostname()} cannot join: it has "
                f"{info.batch_size or 'no batch_size'}, but the run has {grant.info.batch_size or 'no batch_size'}; "
                "use the same option batch_size, and the same batches of the data loader, on every host"
            )
        return self._access.connect(grant.endpoints)
