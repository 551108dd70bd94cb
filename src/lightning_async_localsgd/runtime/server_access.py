"""A rank's access to the server of its run. Rank 0 opens the server, the other ranks connect to it."""

from __future__ import annotations

import logging
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.launch.rendezvous import RendezvousError
from lightning_async_localsgd.launch.restarts import JoinTicket
from lightning_async_localsgd.protocol.buffers import BufferPool
from lightning_async_localsgd.protocol.codecs import codec_of
from lightning_async_localsgd.runtime.assembly import adapt_saved_state, build_coordinator
from lightning_async_localsgd.runtime.local_exchange import LocalExchange
from lightning_async_localsgd.server.server import Server
from lightning_async_localsgd.server.shared_values import SharedValues
from lightning_async_localsgd.server.traffic import Traffic

if TYPE_CHECKING:
    from lightning_async_localsgd.launch.rendezvous import Rendezvous
    from lightning_async_localsgd.protocol.layout import Binding
    from lightning_async_localsgd.protocol.messages import JoinInfo
    from lightning_async_localsgd.runtime.settings import RuntimeSettings
    from lightning_async_localsgd.wire import WireExchange, WireServer
    from lightning_async_localsgd.wire.auth import Endpoints

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
"""Seconds between two checks of whether all workers have joined."""


class ServerAccess:
    """One rank's access to the server. Call :meth:`open_server`, :meth:`find_server` or :meth:`connect` first.

    Args:
        settings: policies and numbers of the run.
        binding: exchanged tensors of the module.
        workers: number of workers that the run begins with.
        ranks: how many of these are ranks, which are started together. The others join.
        exact: returns whether an exchange leaves the module's weights unchanged, to the last bit. Called once the
            outer optimizer knows its model.
        frozen_sizes: number of elements of each frozen parameter that workers may have to exchange.

    Attributes:
        server: the server on rank 0; None on other ranks.
        wire: on rank 0, the wire server that other processes connect to; None if no other process can.
        endpoints: how processes on this host reach the server; None if no other process can.
        join_address: on rank 0, the address at which workers may join while training runs; None if they cannot.

    """

    def __init__(
        self,
        settings: RuntimeSettings,
        binding: Binding,
        workers: int,
        ranks: int,
        exact: Callable[[], bool],
        frozen_sizes: Sequence[int] = (),
    ) -> None:
        self.server: Server | None = None
        self.wire: WireServer | None = None
        self.endpoints: Endpoints | None = None
        self.join_address: str | None = None
        self._settings = settings
        self._binding = binding
        self._workers = workers
        self._ranks = ranks
        self._exact = exact
        self._frozen_sizes = frozen_sizes

    @property
    def ticket(self) -> JoinTicket:
        """What another process on this host needs to join the run."""
        endpoints = self.endpoints
        if endpoints is None:
            return JoinTicket("", "", False, self._settings.fit_number)
        return JoinTicket(endpoints.address, endpoints.token, endpoints.encrypted, self._settings.fit_number)

    def open_server(
        self,
        rendezvous: Rendezvous | None,
        info: JoinInfo,
        restored: dict[str, Any] | None,
        single_worker: bool,
    ) -> LocalExchange:
        """Open the server on rank 0, and publish its endpoints to the other ranks.

        Args:
            rendezvous: meeting point of the ranks; None if there is only one rank.
            info: what the ranks have agreed on, for workers that join later.
            restored: server state to resume from.
            single_worker: whether only one worker trains and none can join. If so, no endpoint is opened.

        Raises:
            ValueError: An option does not fit the hosts, or ``restored`` does not fit the model.
            RuntimeError: The port is taken.

        """
        self.server = self._make_server(info, restored, single_worker)
        if not single_worker:
            self._open_wire(self.server, rendezvous)
        read_weights = self._binding.read if self._exact() else None
        return LocalExchange(self.server, read_weights, self._settings.check_wait)

    def find_server(self, rendezvous: Rendezvous) -> WireExchange:
        """Connect a rank above 0 to the server whose endpoints rank 0 has published.

        Raises:
            ValueError: Rank 0 has a token and this rank does not.

        """
        same_host = rendezvous.on_host_of_rank_0()[rendezvous.rank]
        incarnation, (local, network), secret = rendezvous.broadcast(None)
        token = secret or self._settings.token
        if token is None:
            raise ValueError(
                f"rank 0 has a token and rank {rendezvous.rank} does not; set ASYNC_LOCALSGD_TOKEN to the same value "
                "on all ranks"
            )
        from lightning_async_localsgd.wire.auth import Endpoints

        address, encrypted = local if same_host and local is not None else network
        address = _through_loopback(address) if same_host else address
        return self.connect(Endpoints.from_token(address, incarnation, token, encrypted=encrypted))

    def connect(self, endpoints: Endpoints) -> WireExchange:
        """Make an exchange with the server at ``endpoints``. This sends nothing yet."""
        from lightning_async_localsgd.wire import WireExchange

        self.endpoints = endpoints
        return WireExchange(
            endpoints,
            self._binding.layout,
            silence_timeout=self._settings.exchange.silence_timeout,
            connect_timeout=self._settings.exchange.start_timeout,
            download=codec_of(self._binding.layout, self._settings.exchange.download),
            check_wait=self._settings.check_wait,
        )

    def wait_for_workers(self) -> None:
        """Wait for all other workers with which the run begins, and for the evaluator. Rank 0 only.

        Raises:
            RendezvousError: A worker or the evaluator has not joined in time.
            ExchangeError: The evaluator cannot validate.

        """
        assert self.server is not None
        timeout = self._settings.exchange.start_timeout
        deadline = time.monotonic() + timeout
        if joiners := self.server.missing_joiners:
            _log.warning(
                "waiting for %d worker(s) to join at %s, so that training begins with expected_workers=%d",
                joiners, self.join_address, self._workers,
            )  # fmt: skip
        while missing := self._missing():
            self.server.raise_failure()
            if self._settings.evaluator is not None:
                self._settings.evaluator.raise_if_ended()
            self._settings.check_wait()
            if time.monotonic() > deadline:
                raise RendezvousError(
                    f"{', '.join(missing)} did not join within exchange.start_timeout={timeout:g} s, and training "
                    f"begins with {self._workers} worker(s); see the output of the missing processes"
                )
            time.sleep(_POLL_SECONDS)

    def _missing(self) -> list[str]:
        """Return what has to join before training begins. Rank 0's own worker joins last."""
        assert self.server is not None
        names = [f"worker {rank}" for rank in self.server.missing if rank > 0]
        if joiners := self.server.missing_joiners:
            names.append(f"{joiners} worker(s) that join")
        if self._settings.evaluator is not None and not self.server.evaluations.present:
            names.append("the evaluator")
        return names

    def close(self, reason: str | None = None) -> None:
        """Close the server on rank 0. Workers that still wait for it are refused with ``reason``."""
        if self.server is not None:
            self.server.close(reason)
        if self.wire is not None:
            self.wire.close()

    # ------------------------------------------------------------------ internal

    def _make_server(self, info: JoinInfo, restored: dict[str, Any] | None, single_worker: bool) -> Server:
        settings, layout = self._settings, self._binding.layout
        name = uuid.uuid4().hex
        coordinator = build_coordinator(settings, layout, self._workers, name, single_worker, self._ranks)
        coordinator.model.read(self._binding)
        if restored is not None:
            coordinator.load_state_dict(adapt_saved_state(restored, settings.budget, self._workers, virtual=False))
        buffers = BufferPool(layout.numel, max_total=self._workers + 2)
        options = settings.exchange
        traffic = Traffic(layout, buffers, options.upload, options.download, self._workers)
        return Server(
            coordinator,
            buffers,
            threaded=not single_worker,
            join_info=info,
            observers=settings.observers,
            shared=SharedValues(self._frozen_sizes),
            traffic=traffic,
        )

    def _open_wire(self, server: Server, rendezvous: Rendezvous | None) -> None:
        from lightning_async_localsgd.wire import WireServer
        from lightning_async_localsgd.wire.auth import require_encryption

        options, token = self._settings.exchange, self._settings.token
        on_this_host = {} if rendezvous is None else rendezvous.on_host_of_rank_0()
        remote = [rank for rank, same_host in on_this_host.items() if not same_host]
        if options.transport == "ipc" and remote:
            raise ValueError(
                f"exchange.transport='ipc' works on one host only, but rank(s) {remote} run on other hosts than rank "
                "0; use transport='auto' or 'tcp'"
            )
        # With the user's token, workers may also join from other hosts.
        needs_network = options.transport != "ipc" and (bool(remote) or token is not None)
        has_local_ranks = sum(on_this_host.values()) > 1 or self._settings.evaluator is not None
        self.wire = WireServer(
            server,
            ipc=options.transport == "ipc" or (options.transport == "auto" and has_local_ranks),
            tcp=options.transport == "tcp" or needs_network,
            host=_network_host(rendezvous, open_to_others=token is not None),
            port=options.port,
            encrypt=require_encryption(options, needs_network),
            silence_timeout=self._settings.exchange.silence_timeout,
            token=token,
        )
        local, network = self.wire.local_endpoints, self.wire.endpoints
        endpoints = local or network
        assert endpoints is not None
        self.endpoints = replace(endpoints, address=_through_loopback(endpoints.address))
        if token is not None and network is not None:
            self.join_address = network.address
        if rendezvous is not None:
            # The store cannot keep a secret, so a token that all ranks have from the user is not published there.
            if remote and token is None:
                _log.warning(
                    "The secret of this run is sent to the other hosts through the rendezvous store, which everyone "
                    "who can reach MASTER_PORT can read. To avoid this, set ASYNC_LOCALSGD_TOKEN to the same random "
                    "value on every host."
                )
            secret = self.endpoints.token if token is None else None
            addresses = [None if one is None else (one.address, one.encrypted) for one in (local, network)]
            rendezvous.broadcast((server.incarnation, addresses, secret))


def _network_host(rendezvous: Rendezvous | None, open_to_others: bool) -> str:
    """Return the host name or address at which workers reach this machine over the network."""
    host = "127.0.0.1" if rendezvous is None else rendezvous.host
    # A run on one host meets at the loopback address, which workers on other hosts cannot reach.
    return socket.gethostname() if open_to_others and host in ("127.0.0.1", "localhost") else host


def _through_loopback(address: str) -> str:
    """Return an address of this machine for its own processes. Its host name may not be resolvable on the machine."""
    if address.startswith("tcp://") and "[" not in address:
        return f"tcp://127.0.0.1:{address.rpartition(':')[2]}"
    return address
