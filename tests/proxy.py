"""A TCP road to a server that can be made slow, long, silent or impassable at will, and on which nothing else is lost.

It runs in a thread of the test's own process. All its methods may be called from any thread and return when they have
taken effect.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

_PACKET = 64 * 1024
_IN_FLIGHT = 256
"""Packets of one direction that may be on a long road."""
_BURST_SECONDS = 0.02
"""An idle road carries as many bytes at once as it would have carried in this time."""


@dataclass
class Recording:
    """What one connection has carried."""

    to_server: bytearray = field(default_factory=bytearray)
    to_client: bytearray = field(default_factory=bytearray)


class _Lane:
    """One direction of the road, shared by all connections like the bandwidth of a link: each gets its fair part."""

    def __init__(self) -> None:
        self.free_at = 0.0

    def slot(self, size: int, rate: float | None, now: float) -> float:
        """When ``size`` bytes that come now have passed. What a late wake-up has left unused is caught up with."""
        self.free_at = max(self.free_at, now - _BURST_SECONDS) + (size / rate if rate else 0.0)
        return self.free_at


class Proxy:
    """Listens on a free port of the loopback interface and passes everything on to ``target``, at first unhindered.

    Use it as a context manager, or :meth:`close` it.

    Args:
        target: ``tcp://host:port`` of the server.
        record: keep a copy of everything, in :attr:`recordings`.

    Attributes:
        address: ``tcp://127.0.0.1:port``, to be dialled instead of ``target``.
        recordings: of the connections, in the order in which they came.
        connections: how many have been carried so far.
        carried: bytes that have come out at the server's end so far.

    """

    def __init__(self, target: str, record: bool = False) -> None:
        host, _, port = target.removeprefix("tcp://").rpartition(":")
        self._target = (host.strip("[]"), int(port))
        self._record = record
        self.recordings: list[Recording] = []
        self.connections = 0
        self.carried = 0
        self._rate: float | None = None
        self._delay = 0.0
        self._refusing = False
        self._break_after: int | None = None
        self._lanes = (_Lane(), _Lane())
        self._ends: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        # Small, so that a slow road's traffic waits at its sender, not in here.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * _PACKET)
        self.address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._run(self._open(listener))

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ controls

    def throttle(self, bytes_per_second: float | None) -> None:
        """Limits each direction, all connections together; None lifts the limit. 10 Mbit/s are 1.25e6."""
        self._rate = bytes_per_second

    def delay(self, seconds: float) -> None:
        """Everything takes so long in each direction; a round trip takes twice that."""
        self._delay = seconds

    def freeze(self) -> None:
        """Connections stay open and new ones are accepted, but nothing is carried: packets get lost somewhere."""
        self._run(self._set_flowing(False))

    def cut(self) -> None:
        """All connections are reset, and so are new ones as soon as they are made, until :meth:`restore`."""
        self._refusing = True
        self.break_()

    def break_(self) -> None:
        """All present connections are reset; new ones may be made at once."""
        self._run(self._reset_all())

    def break_after(self, count: int) -> None:
        """All connections are reset once, when ``count`` more bytes have come out at the server's end."""
        self._break_after = self.carried + count

    def restore(self) -> None:
        """After :meth:`cut` connections can be made again; after :meth:`freeze` everything that waited goes on."""
        self._refusing = False
        self._run(self._set_flowing(True))

    def close(self) -> None:
        """Ends it all."""
        if self._loop.is_closed():
            return
        self._run(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # ---------------------------------------------------------- the proxy's thread

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _open(self, listener: socket.socket) -> None:
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server = await asyncio.start_server(self._welcome, sock=listener, limit=_PACKET)

    async def _set_flowing(self, flowing: bool) -> None:
        if flowing:
            self._flowing.set()
        else:
            self._flowing.clear()

    async def _reset_all(self) -> None:
        for end in list(self._ends):
            _reset(end)

    async def _shut(self) -> None:
        self._server.close()
        self._flowing.set()
        await self._reset_all()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            _reset(writer)
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._ends.add(writer)
        far_writer: asyncio.StreamWriter | None = None
        try:
            await self._flowing.wait()
            far_reader, far_writer = await asyncio.open_connection(*self._target, limit=_PACKET)
            self._ends.add(far_writer)
            if self._refusing:
                return
            self.connections += 1
            recording = Recording()
            self.recordings.append(recording)
            lines = [asyncio.Queue[tuple[float, bytes]](_IN_FLIGHT) for _ in self._lanes]
            carriers = [
                asyncio.ensure_future(part)
                for part in (
                    self._take(reader, lines[0], 0),
                    self._take(far_reader, lines[1], 1),
                    self._hand_out(lines[0], far_writer, recording.to_server, self._count),
                    self._hand_out(lines[1], writer, recording.to_client),
                )
            ]
            try:
                await asyncio.wait(carriers, return_when=asyncio.FIRST_EXCEPTION)
            finally:
                for carrier in carriers:
                    carrier.cancel()
                await asyncio.gather(*carriers, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for end in (writer, far_writer):
                if end is not None:
                    self._ends.discard(end)
                    _reset(end)
            self._tasks.discard(task)

    async def _take(self, source: asyncio.StreamReader, line: asyncio.Queue[tuple[float, bytes]], lane: int) -> None:
        data = b"?"
        while data:
            await self._flowing.wait()
            data = await source.read(self._packet)
            passed = self._lanes[lane].slot(len(data), self._rate, self._loop.time())
            # The next packet is taken when this one has passed, so that others get their turn in between.
            await self._sleep_until(passed)
            await line.put((passed + self._delay, data))

    async def _hand_out(
        self,
        line: asyncio.Queue[tuple[float, bytes]],
        sink: asyncio.StreamWriter,
        recorded: bytearray,
        count: Callable[[int], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        while True:
            due, data = await line.get()
            await self._sleep_until(due)
            await self._flowing.wait()
            if not data:
                # The other direction ends as well: no peer here uses half of a connection.
                sink.close()
                await sink.wait_closed()
                raise EOFError
            if self._record:
                recorded += data
            sink.write(data)
            await sink.drain()
            if count is not None:
                await count(len(data))

    async def _count(self, size: int) -> None:
        self.carried += size
        if self._break_after is not None and self.carried >= self._break_after:
            self._break_after = None
            await self._reset_all()

    @property
    def _packet(self) -> int:
        return _PACKET if self._rate is None else max(256, min(_PACKET, int(self._rate / 250)))

    async def _sleep_until(self, due: float) -> None:
        left = due - self._loop.time()
        if left > 0:
            await asyncio.sleep(left)


def _reset(end: asyncio.StreamWriter) -> None:
    """Ends a connection as if its host had gone: what was on its way is lost."""
    connection = end.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.transport.abort()
