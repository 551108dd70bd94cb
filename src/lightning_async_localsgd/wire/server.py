"""The server's end of the wire: the sockets, and the thread that serves them.

Pings come over connections of their own, but to the same address, so that only one port must be reachable. Connections
are served in turn: a ping waits for a frame or two, never for a whole transfer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

import zmq

from lightning_async_localsgd.wire.auth import Authenticator, Endpoints, Secrets, new_token
from lightning_async_localsgd.wire.frames import Waker, keep_freed_memory, milliseconds
from lightning_async_localsgd.wire.hub import Hub
from lightning_async_localsgd.wire.listener import Address, Listener, RefusalLog, local_address, network_address

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_async_localsgd.protocol.ports import ServerPort

_log = logging.getLogger(__name__)

_TICK_SECONDS = 0.1
"""Seconds between two checks of timeouts and flags when no message arrives."""

_BUFFER_RETRY_SECONDS = 0.003
"""Seconds until the thread asks again for a buffer that an upload waits for."""

_MAX_BATCH = 64
"""Messages read from one listener before the thread looks at anything else."""

_DRAIN_SECONDS = 10.0
"""Seconds for which a download may stall when the server closes."""

_LINGER_SECONDS = 1.0
"""Seconds that the last messages may take to be sent."""


class WireServer:
    """Connects workers in other processes to a server.

    Args:
        server: answers the workers.
        ipc: listen on a local socket, for workers on this machine.
        tcp: listen on the network.
        host: name or address by which workers reach this machine over the network.
        port: TCP port; 0 for a free one.
        encrypt: encrypt the network traffic, and authenticate its peers by keys.
        silence_timeout: seconds without a sign of life from a worker, or without progress of its transfer, after which
            the worker is lost.
        token: secret of the run; None for a random one.

    Raises:
        ValueError: neither ``ipc`` nor ``tcp`` is on, or the timeout is not positive.
        RuntimeError: the port is in use.

    Attributes:
        local_endpoints: endpoints for workers on this machine; None without ``ipc``.
        endpoints: endpoints for all workers; None without ``tcp``.

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
            raise ValueError("ipc=False and tcp=False: no worker could reach the server; set one of them to True")
        if not silence_timeout > 0:
            raise ValueError(f"silence_timeout={silence_timeout!r} must be a positive number of seconds")
        keep_freed_memory()
        self._secrets = Secrets(token if token is not None else new_token(), encrypt)
        self._incarnation = server.incarnation
        self._silence_timeout = silence_timeout
        self._rejected = RefusalLog("connections refused")
        self._hub = Hub(server, self._secrets.token, silence_timeout, self._post)
        self._listeners: list[Listener] = []
        self._commands: deque[Callable[[], None]] = deque()
        self._closing = False
        self._ended = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._waker = Waker()
        # Before the first socket is bound, so that every peer is asked for credentials.
        self._authenticator = Authenticator(self._context, self._secrets)
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
        """Connections that ended before the peer had sent a worker's message."""
        return self._rejected.count

    @property
    def rejected_messages(self) -> int:
        """Messages that broke the protocol."""
        return self._hub.rejected.count

    @property
    def bytes_sent(self) -> int:
        """Bytes sent to all workers."""
        return self._hub.sent

    @property
    def bytes_received(self) -> int:
        """Bytes received from all workers."""
        return self._hub.received

    def send_recalls(self) -> None:
        """Send recalls at once, for a caller that waits for the recalled workers."""
        self._post(self._hub.send_recalls)

    def close(self) -> None:
        """Finish the running downloads, then end the thread and free everything. May be called twice."""
        self._closing = True
        self._waker.wake()
        self._thread.join()
        self._run_commands()

    def _open(self, address: Address, encrypted: bool) -> Endpoints:
        listener = Listener(self._context, address, self._secrets, encrypted, self._silence_timeout, self._rejected)
        self._listeners.append(listener)
        return Endpoints.from_token(listener.address, self._incarnation, self._secrets.token, encrypted)

    def _post(self, command: Callable[[], None]) -> None:
        """Run ``command`` in the thread. Once the thread has ended, run it in the caller: it then only frees things."""
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
            poller.register(self._authenticator.socket, zmq.POLLIN)
            for listener in self._listeners:
                poller.register(listener.monitor, zmq.POLLIN)
                poller.register(listener.socket, zmq.POLLIN)
            self._serve(poller)
        except Exception:
            _log.exception("the server's connection to its workers failed; all workers are lost")
            self._hub.lose_all("the server's connection to its workers failed")
        finally:
            self._hub.deactivate_all()
            self._ended = True
            self._free()
            self._run_commands()

    def _serve(self, poller: zmq.Poller) -> None:
        ticked_at = 0.0
        while True:
            timeout = _BUFFER_RETRY_SECONDS if self._hub.has_waiting_uploads else _TICK_SECONDS
            poller.poll(milliseconds(timeout))
            self._waker.clear()
            # Serving everything costs microseconds, less than finding out what is ready.
            self._run_commands()
            self._authenticator.answer()
            for listener in self._listeners:
                self._hub.collect_closed(listener)
                for _ in range(_MAX_BATCH):
                    if not self._hub.receive(listener):
                        break
            self._hub.handle_closed()
            self._hub.assign_buffers()
            if time.monotonic() - ticked_at > _TICK_SECONDS:
                self._hub.tick()
                ticked_at = time.monotonic()
            if self._closing and not self._commands:
                self._hub.drop_stalled_downloads(min(_DRAIN_SECONDS, self._silence_timeout))
                if not self._hub.has_downloads:
                    return

    def _run_commands(self) -> None:
        while self._commands:
            try:
                command = self._commands.popleft()
            except IndexError:
                return  # At the end another thread may have run the last command.
            command()

    def _free(self) -> None:
        for listener in self._listeners:
            listener.close(_LINGER_SECONDS)
        self._authenticator.socket.close(0)
        self._waker.close()
        self._context.term()
