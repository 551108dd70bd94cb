"""The server's end of the wire: the sockets, and the one thread that serves them.

Beats come over connections of their own, but to the same address, so that only one port must be reachable. Connections
are served in turn: a beat waits for a frame or two, never for a transfer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

import zmq

from lightning_async_localsgd.wire.auth import Endpoints, Gatekeeper, Secrets, new_token
from lightning_async_localsgd.wire.frames import Waker, keep_freed_memory, milliseconds
from lightning_async_localsgd.wire.hub import Hub
from lightning_async_localsgd.wire.way import Address, Tally, Way, local_address, network_address

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_async_localsgd.wire.protocol import ServerPort

_log = logging.getLogger(__name__)

_TICK_SECONDS = 0.1
"""How often the thread looks at clocks and flags when nothing happens."""

_RETRY_SECONDS = 0.003
"""How soon it asks again for a buffer that an upload waits for."""

_BATCH = 64
"""Messages read before the thread looks at anything else."""

_DRAIN_SECONDS = 10.0
"""For how long a worker may be silent in mid-download when the server closes."""

_GOODBYE_SECONDS = 1.0
"""How long the last messages may take to leave."""


class WireServer:
    """Lets workers of other processes take part in a server's run.

    Args:
        server: is told what happens, and answers.
        ipc: whether there is a way of their own for workers on this machine.
        tcp: whether there is a way over the network.
        host: name or address by which workers reach this machine over the network.
        port: TCP port; 0 takes a free one.
        encrypt: whether the network traffic is encrypted, and its peers authenticated by keys.
        silence_timeout: seconds without a sign of life from a worker, or without a movement of its transfer, after
            which the server is told that it is lost.
        token: secret of the run; None makes a random one.

    Raises:
        ValueError: no way is asked for, or the time-out is not positive.
        RuntimeError: the port is taken.

    Attributes:
        local_endpoints: for workers on this machine; None without ``ipc``.
        endpoints: for workers anywhere; None without ``tcp``.

    """

    def __init__(
        self,
        server: ServerPort,
        *,
        ipc: bool = True,
        tcp: bool = False,
        host: str = "127.0.0.1",
        port: int = 0,
        encrypt: bool = False,
        silence_timeout: float,
        token: str | None = None,
    ) -> None:
        if not (ipc or tcp):
            raise ValueError("ipc=False and tcp=False: nobody could reach the server; turn one of them on")
        if not silence_timeout > 0:
            raise ValueError(f"silence_timeout={silence_timeout!r} must be a positive number of seconds")
        keep_freed_memory()
        self._secrets = Secrets(token if token is not None else new_token(), encrypt)
        self._incarnation = server.incarnation
        self._silence_timeout = silence_timeout
        self._rejected = Tally("connections refused")
        self._hub = Hub(server, self._secrets.token, silence_timeout, self._post)
        self._ways: list[Way] = []
        self._commands: deque[Callable[[], None]] = deque()
        self._closing = False
        self._ended = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._waker = Waker()
        # Before the first socket is bound: whoever calls must find somebody who asks for credentials.
        self._gatekeeper = Gatekeeper(self._context, self._secrets)
        self.local_endpoints: Endpoints | None = None
        self.endpoints: Endpoints | None = None
        try:
            if ipc:
                self.local_endpoints = self._open(local_address(), encrypted=False)
            if tcp:
                self.endpoints = self._open(network_address(host, port), encrypted=encrypt)
        except BaseException:
            self._free()
            raise
        self._thread = threading.Thread(target=self._run, name="async_localsgd-wire", daemon=True)
        self._thread.start()

    @property
    def rejected_connections(self) -> int:
        """Connections that ended before their other side had introduced itself as a worker."""
        return self._rejected.count

    @property
    def rejected_messages(self) -> int:
        """Messages that should not have been sent, or not like this."""
        return self._hub.rejected.count

    @property
    def bytes_sent(self) -> int:
        """Bytes sent to all workers together."""
        return self._hub.sent

    @property
    def bytes_received(self) -> int:
        """Bytes received from all workers together."""
        return self._hub.received

    def close(self) -> None:
        """Lets models that are on their way arrive, then ends the thread and frees everything. May be called twice."""
        self._closing = True
        self._waker.wake()
        self._thread.join()
        self._run_commands()

    def _open(self, address: Address, encrypted: bool) -> Endpoints:
        way = Way(self._context, address, self._secrets, encrypted, self._silence_timeout, self._rejected)
        self._ways.append(way)
        return Endpoints.of(way.address, self._incarnation, self._secrets.token, encrypted)

    def _post(self, command: Callable[[], None]) -> None:
        """Has ``command`` run by the thread; by the caller once there is no thread, when it can only free things."""
        self._commands.append(command)
        if self._ended:
            self._run_commands()
        else:
            self._waker.wake()

    # ------------------------------------------------------------------ thread

    def _run(self) -> None:
        try:
            poller = zmq.Poller()
            poller.register(self._waker.fileno(), zmq.POLLIN)
            poller.register(self._gatekeeper.socket, zmq.POLLIN)
            for way in self._ways:
                poller.register(way.monitor, zmq.POLLIN)
                poller.register(way.socket, zmq.POLLIN)
            self._serve(poller)
        except Exception:
            _log.exception("the wire of the asynchronous run failed; its workers are lost")
            self._hub.lose_all("the wire of the server failed")
        finally:
            self._hub.retire_all()
            self._ended = True
            self._free()
            self._run_commands()

    def _serve(self, poller: zmq.Poller) -> None:
        ticked_at = 0.0
        while True:
            timeout = _RETRY_SECONDS if self._hub.waiting else _TICK_SECONDS
            poller.poll(milliseconds(timeout))
            self._waker.clear()
            # Looking at everything costs microseconds; telling what is ready costs more than that.
            self._run_commands()
            self._gatekeeper.answer()
            for way in self._ways:
                self._hub.note_ends(way)
                for _ in range(_BATCH):
                    if not self._hub.receive(way):
                        break
            self._hub.forget_ended()
            self._hub.serve_waiting()
            if time.monotonic() - ticked_at > _TICK_SECONDS:
                self._hub.tick()
                ticked_at = time.monotonic()
            if self._closing and not self._commands:
                self._hub.drop_silent_downloads(min(_DRAIN_SECONDS, self._silence_timeout))
                if not self._hub.delivering:
                    return

    def _run_commands(self) -> None:
        while self._commands:
            try:
                command = self._commands.popleft()
            except IndexError:
                return  # At the very end the last one was taken by another thread that is here, too.
            command()

    def _free(self) -> None:
        for way in self._ways:
            way.close(_GOODBYE_SECONDS)
        self._gatekeeper.socket.close(0)
        self._waker.close()
        self._context.term()
