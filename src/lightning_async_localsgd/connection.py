"""A rank's way to the server of its run: dialled by ranks above 0, opened by rank 0, which has the server with it."""

from __future__ import annotations

import logging
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.assembly import build_coordinator
from lightning_async_localsgd.buffers import BufferPool
from lightning_async_localsgd.local_exchange import LocalExchange
from lightning_async_localsgd.plan import restored_done
from lightning_async_localsgd.rendezvous import RendezvousError
from lightning_async_localsgd.restarts import JoinTicket
from lightning_async_localsgd.server import About, Server

if TYPE_CHECKING:
    from lightning_async_localsgd.exchange import Exchange
    from lightning_async_localsgd.layout import Binding
    from lightning_async_localsgd.plan import RunBudget
    from lightning_async_localsgd.rendezvous import Rendezvous
    from lightning_async_localsgd.settings import PhaseSettings
    from lightning_async_localsgd.wire import WireServer
    from lightning_async_localsgd.wire.auth import Endpoints

_log = logging.getLogger(__name__)

_PATIENCE = 0.05
"""Seconds between two looks at whether all workers have joined."""


class Connection:
    """One rank's connection; it begins with :meth:`open`, :meth:`meet` or :meth:`dial`.

    Args:
        settings: of the phase.
        binding: the module's exchanged tensors.
        workers: ranks that the run was started with.
        exact: whether an exchange is to leave the module as it was, to the last bit: one worker, an outer step of
            theta - g. Asked once the outer optimizer knows its model.

    Attributes:
        server: on rank 0, the server.
        wire: on rank 0, the end that other processes dial; None if none can.
        endpoints: how processes on this machine reach the server; None where nobody does.
        open_to: on rank 0, the address at which others may join; None where they cannot.

    """

    def __init__(self, settings: PhaseSettings, binding: Binding, workers: int, exact: Callable[[], bool]) -> None:
        self.server: Server | None = None
        self.wire: WireServer | None = None
        self.endpoints: Endpoints | None = None
        self.open_to: str | None = None
        self._settings = settings
        self._binding = binding
        self._workers = workers
        self._exact = exact

    @property
    def ticket(self) -> JoinTicket:
        """How a process of this rank's host joins."""
        way = self.endpoints
        if way is None:
            return JoinTicket("", "", False, self._settings.fit)
        return JoinTicket(way.address, way.token, way.encrypted, self._settings.fit)

    def open(
        self,
        rendezvous: Rendezvous | None,
        about: About,
        restored: dict[str, Any] | None,
        alone: bool,
        watch: Callable[[], None],
    ) -> Exchange:
        """Rank 0: opens the server, and the way to it unless nobody else takes part.

        Raises:
            ValueError: the options don't fit the hosts, or the restored state does not fit the model.
            RuntimeError: the port is taken.

        """
        self.server = self._open_server(about, restored, alone)
        if not alone:
            self._open_wire(self.server, rendezvous)
        return LocalExchange(self.server, self._binding.read if self._exact() else None, watch)

    def meet(self, rendezvous: Rendezvous) -> Exchange:
        """Ranks above 0: learn from rank 0 where its server is.

        Raises:
            ValueError: this rank was not given the token that rank 0 was given.

        """
        near = rendezvous.one_host()[rendezvous.rank]
        incarnation, (local, network), secret = rendezvous.broadcast(None)
        token = secret or self._settings.token
        if token is None:
            raise ValueError(
                f"rank 0 was given a token and rank {rendezvous.rank} was not; set ASYNC_LOCALSGD_TOKEN to the same for"
                " all"
            )
        from lightning_async_localsgd.wire.auth import Endpoints

        address, encrypted = local if near and local is not None else network
        address = _nearby(address) if near else address
        return self.dial(Endpoints.of(address, incarnation, token, encrypted=encrypted))

    def dial(self, endpoints: Endpoints) -> Exchange:
        """Reaches the server there. Nothing is sent yet."""
        from lightning_async_localsgd.wire import WireExchange

        self.endpoints = endpoints
        return WireExchange(
            endpoints,
            self._binding.layout,
            silence_timeout=self._settings.silence_timeout,
            connect_timeout=self._settings.start_timeout,
        )

    def await_others(self, watch: Callable[[], None]) -> None:
        """Rank 0: waits until every other worker of the first cohort has joined.

        Raises:
            RendezvousError: one has not come in time.

        """
        assert self.server is not None
        until = time.monotonic() + self._settings.start_timeout
        while missing := [rank for rank in self.server.missing if rank > 0]:
            watch()
            if time.monotonic() > until:
                raise RendezvousError(
                    f"worker(s) {', '.join(map(str, missing))} of {self._workers} did not join within "
                    f"start_timeout={self._settings.start_timeout:g} s; see what they printed"
                )
            time.sleep(_PATIENCE)

    def close(self, reason: str | None = None) -> None:
        """Rank 0: ends the server; workers that still wait are refused with ``reason``."""
        if self.server is not None:
            self.server.close(reason)
        if self.wire is not None:
            self.wire.close()

    # ------------------------------------------------------------------ internal

    def _open_server(self, about: About, restored: dict[str, Any] | None, alone: bool) -> Server:
        settings, layout = self._settings, self._binding.layout
        coordinator = build_coordinator(settings, layout, self._workers, uuid.uuid4().hex, exact=alone)
        coordinator.model.read(self._binding)
        if restored is not None:
            coordinator.load_state_dict(rescaled(restored, settings.budget, self._workers, virtual=False))
        buffers = BufferPool(layout.numel, most=self._workers + 2)
        return Server(coordinator, buffers, threaded=not alone, about=about)

    def _open_wire(self, server: Server, rendezvous: Rendezvous | None) -> None:
        from lightning_async_localsgd.wire import WireServer
        from lightning_async_localsgd.wire.auth import require_encryption

        options, token = self._settings.exchange, self._settings.token
        near = {} if rendezvous is None else rendezvous.one_host()
        distant = [rank for rank, same in near.items() if not same]
        if options.transport == "ipc" and distant:
            raise ValueError(
                f"exchange.transport='ipc' reaches one host only, but rank(s) {distant} are on other hosts than rank "
                "0; use transport='auto' or 'tcp'"
            )
        # With the user's token others may join from anywhere, so there is a way for them, too.
        anywhere = options.transport != "ipc" and (bool(distant) or token is not None)
        neighbours = sum(near.values()) > 1
        self.wire = WireServer(
            server,
            ipc=options.transport == "ipc" or (options.transport == "auto" and neighbours),
            tcp=options.transport == "tcp" or anywhere,
            host=_reached_as(rendezvous, token is not None),
            port=options.port,
            encrypt=require_encryption(options, anywhere),
            silence_timeout=self._settings.silence_timeout,
            token=token,
        )
        local, network = self.wire.local_endpoints, self.wire.endpoints
        way = local or network
        assert way is not None
        self.endpoints = replace(way, address=_nearby(way.address))
        if token is not None and network is not None:
            self.open_to = network.address
        if rendezvous is not None:
            # The store cannot be relied on to keep a secret: what all ranks have been given is not told there.
            if distant and token is None:
                _log.warning(
                    "the secret of this run reaches the other hosts through the rendezvous store, which is open to "
                    "whoever reaches MASTER_PORT; set ASYNC_LOCALSGD_TOKEN to the same random text on every host"
                )
            secret = self.endpoints.token if token is None else None
            addresses = [None if way is None else (way.address, way.encrypted) for way in (local, network)]
            rendezvous.broadcast((server.incarnation, addresses, secret))


def _reached_as(rendezvous: Rendezvous | None, anyone: bool) -> str:
    """The name or address by which workers reach this machine over the network."""
    host = "127.0.0.1" if rendezvous is None else rendezvous.host
    # Whoever joins from another machine cannot do so at this one's loopback, where a run of one host meets.
    return socket.gethostname() if anyone and host in ("127.0.0.1", "localhost") else host


def _nearby(address: str) -> str:
    """The same address as seen from this machine itself, where its own name need not lead anywhere."""
    if address.startswith("tcp://") and "[" not in address:
        return f"tcp://127.0.0.1:{address.rpartition(':')[2]}"
    return address


def rescaled(state: dict[str, Any], budget: RunBudget, workers: int, virtual: bool) -> dict[str, Any]:
    """The state for ``workers`` workers and a budget, see :func:`.restored_done`.

    Speeds that were measured in the other kind of time, real or virtual, are forgotten.
    """
    if ("simulation" in state) != virtual:
        state = {**state, "pacing": {"speeds": {}, "ratios": {}}}
    return {**state, "budget": {**state["budget"], "done": restored_done(state, budget, workers)}}
