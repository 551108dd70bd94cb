"""Fault injection: faults at chosen moments of a run, to measure what they cost in your own setup.

This module defines the faults, and injects them in a worker's own process. docs/faults.md describes the failure model.

The faults are real: signals, closed sockets, invalid bytes. They enter in three places: the exchange has an observer
for the moments of a round, connections have hooks that run before they are opened, and files have watchers that run
before the files get their names. All of them are empty in a run without faults. This module does not need Lightning;
the callback is :class:`.FaultInjection`.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_async_localsgd.protocol.exchange import Exchange
from lightning_async_localsgd.protocol.ports import Moment
from lightning_async_localsgd.runtime import durable
from lightning_async_localsgd.runtime.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_async_localsgd import FaultInjection
    from lightning_async_localsgd.protocol.messages import Hello, Push, Reply, Share
    from lightning_async_localsgd.runtime.worker_base import WorkerBase
    from lightning_async_localsgd.wire.connection import Connection

__all__ = ["MOMENTS", "Fault", "FaultInjection", "FaultKind", "Moment"]

_log = logging.getLogger(__name__)


def __getattr__(name: str) -> Any:
    # Imported lazily: only the callback needs Lightning.
    if name == "FaultInjection":
        from lightning_async_localsgd import FaultInjection

        return FaultInjection
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class FaultKind(Enum):
    """The kinds of faults.

    * ``KILL``: the worker's process is killed (SIGKILL), as by the system when memory runs out.
    * ``STOP``: the process is stopped for ``seconds`` (SIGSTOP), as on a machine that swaps or is suspended.
    * ``DELAY``: the worker's main thread sleeps for ``seconds``. Its heartbeat continues.
    * ``DROP_LINK``: all connections to the server are closed, and none can be opened for ``seconds``.
    * ``SLOW_LINK``: the rest of the exchange is limited to ``bytes_per_second``.
    * ``LOSE_REPLY``: the connection breaks after the server has applied the push, before its reply is read.
    * ``DUPLICATE``: the push is sent twice.
    * ``CORRUPT``: bytes that are not a message of the protocol are sent during the push.
    * ``NAN``: the pseudo-gradient holds a NaN, set in the push (``"mid-push"``) or in a weight (``"computing"``).
    """

    KILL = "KILL"
    STOP = "STOP"
    DELAY = "DELAY"
    DROP_LINK = "DROP_LINK"
    SLOW_LINK = "SLOW_LINK"
    LOSE_REPLY = "LOSE_REPLY"
    DUPLICATE = "DUPLICATE"
    CORRUPT = "CORRUPT"
    NAN = "NAN"


_EXCHANGING: tuple[Moment, ...] = ("mid-push", "before reply", "mid-pull")
_ROUND: tuple[Moment, ...] = ("computing", "before round", *_EXCHANGING)

MOMENTS: dict[FaultKind, tuple[Moment, ...]] = {
    FaultKind.KILL: (*_ROUND, "saving"),
    FaultKind.STOP: (*_ROUND, "saving"),
    FaultKind.DELAY: (*_ROUND, "saving"),
    FaultKind.DROP_LINK: _ROUND,
    FaultKind.SLOW_LINK: ("mid-push", "mid-pull"),
    FaultKind.LOSE_REPLY: ("before reply",),
    FaultKind.DUPLICATE: ("mid-push",),
    FaultKind.CORRUPT: ("mid-push",),
    FaultKind.NAN: ("mid-push", "computing"),
}
"""The moments at which each kind can be injected. The first moment is the default."""

_LASTING = (FaultKind.STOP, FaultKind.DELAY, FaultKind.DROP_LINK)
_NETWORK = (FaultKind.DROP_LINK, FaultKind.SLOW_LINK, FaultKind.LOSE_REPLY, FaultKind.DUPLICATE, FaultKind.CORRUPT)

_NO_MESSAGE = b"\xff" * 17
"""Bytes that are not a message of the protocol: no kind of message begins like this."""


@dataclass(frozen=True)
class Fault:
    """One fault of one worker.

    Args:
        kind: the kind of fault.
        worker: number of the worker: its global rank, or the number that it was given when it joined later.
        round: the round of this life of the worker, counted from 1. If the moment does not come in this round (a round
            may be recalled early, and not every round is saved), the fault is injected at the next occasion.
        moment: the moment in the round:

            * ``"before round"``: before its first batch;
            * ``"computing"``: in its middle, after a backward pass;
            * ``"mid-push"``: half of the pseudo-gradient has been sent; if it is sent in one part, only its header;
            * ``"before reply"``: the server has replied, and nothing of the reply has been read;
            * ``"mid-pull"``: the reply and half of the model have been read;
            * ``"saving"``: a file (rank 0's checkpoint, another worker's optimizer state) is written but not renamed
              to its final name yet.

            ``None`` is the first moment that the kind allows, see :data:`MOMENTS`.
        seconds: how long the fault lasts, for ``STOP``, ``DELAY`` and ``DROP_LINK``.
        bytes_per_second: the limit of a ``SLOW_LINK``.
        life: how often the worker has been restarted before. With the default 0, a worker that was killed is not killed
            again after its restart. If the whole job was restarted, that is life 1.

    Raises:
        ValueError: the values do not fit together. The text says which, and why.

    Example::

        >>> from lightning_async_localsgd.faults import Fault, FaultKind
        >>> Fault(FaultKind.LOSE_REPLY, worker=2, round=3).moment
        'before reply'

    """

    kind: FaultKind
    worker: int = 1
    round: int = 1
    moment: Moment | None = None
    seconds: float | None = None
    bytes_per_second: float | None = None
    life: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.kind, FaultKind):
            raise ValueError(f"kind={self.kind!r} must be a FaultKind: {', '.join(kind.name for kind in FaultKind)}")
        allowed = MOMENTS[self.kind]
        if self.moment is None:
            object.__setattr__(self, "moment", allowed[0])
        for name, least in (("worker", 0), ("round", 1), ("life", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} of a {self.kind.name} fault must be an integer >= {least}")
        if self.moment not in allowed:
            raise ValueError(
                f"moment={self.moment!r} is not possible for a {self.kind.name} fault; use one of "
                + ", ".join(map(repr, allowed))
            )
        if self.worker == 0 and (self.kind in _NETWORK or self.moment in _EXCHANGING):
            raise ValueError(
                f"a {self.kind.name} fault at {self.moment!r} is not possible for worker=0, which runs in the server's "
                "process and has no connection; use another worker or moment"
            )
        _check_number("seconds", self.seconds, self.kind, needed=self.kind in _LASTING)
        _check_number("bytes_per_second", self.bytes_per_second, self.kind, needed=self.kind is FaultKind.SLOW_LINK)

    def __str__(self) -> str:
        lasting = f" for {self.seconds:g} s" if self.seconds is not None else ""
        return f"{self.kind.name}{lasting} of worker {self.worker}, round {self.round}, {self.moment!r}"


def _check_number(name: str, value: float | None, kind: FaultKind, needed: bool) -> None:
    if value is None and needed:
        raise ValueError(f"a {kind.name} fault needs {name}=...")
    if value is not None and not needed:
        raise ValueError(f"{name}={value!r} has no effect on a {kind.name} fault; leave it out")
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} of a {kind.name} fault must be a positive, finite number")


class FaultInjector:
    """Injects the faults of one worker until :meth:`uninstall`.

    Args:
        faults: the faults of this worker in this life.
        worker: the worker, which has joined.

    Attributes:
        pending: faults that were not injected yet.

    """

    def __init__(self, faults: Sequence[Fault], worker: WorkerBase) -> None:
        self.pending = list(faults)
        self._worker = worker
        self._round = 0
        self._exchange: FaultyExchange | None = None
        self._installed = True
        durable.watchers.append(self._on_save)
        if worker.number > 0:
            # Worker 0 runs in the server's process: faults of its exchange are not possible.
            assert isinstance(worker, Worker)
            self._exchange = FaultyExchange(worker, self)

    def uninstall(self) -> None:
        """Remove everything that was installed. May be called twice."""
        if not self._installed:
            return
        self._installed = False
        durable.watchers.remove(self._on_save)
        if self._exchange is not None:
            self._exchange.uninstall()

    # ------------------------------------------------------------------ moments

    def before_batch(self) -> None:
        """Inject faults at the start of a round. To be called before each batch."""
        if self._worker.round > self._round and not self._worker.stopped:
            self._round = self._worker.round
            self.inject("before round")

    @property
    def is_mid_round(self) -> bool:
        """Whether at least half of the round is computed."""
        reply = self._worker.reply
        return reply is not None and not reply.stop and self._worker.round_steps >= reply.local_steps // 2

    def inject(self, moment: Moment, round: int | None = None) -> None:
        """Inject the faults that are due at ``moment``. May be called from any thread.

        Args:
            moment: the moment.
            round: number of the round to which it belongs; the present one, if not given.

        """
        for kind in (FaultKind.DELAY, FaultKind.STOP, FaultKind.DROP_LINK, FaultKind.KILL):
            fault = self.pop(kind, moment, round)
            if fault is None:
                continue
            if kind is FaultKind.KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            elif kind is FaultKind.DROP_LINK:
                if self._exchange is not None:
                    self._exchange.cut(fault.seconds or 0.0)
            elif kind is FaultKind.STOP:
                suspend_process(fault.seconds or 0.0)
            else:
                time.sleep(fault.seconds or 0.0)

    def pop(self, kind: FaultKind, moment: Moment, round: int | None = None) -> Fault | None:
        """Remove a due fault of this kind from the pending ones, log it and return it. None if no fault is due."""
        present = self._round if round is None else round
        for fault in self.pending:
            if fault.kind is kind and fault.moment == moment and fault.round <= present:
                self.pending.remove(fault)
                _log.warning("injected: %s", fault)
                return fault
        return None

    def _on_save(self) -> None:
        """Inject the faults of the moment "saving", in the thread that writes the file."""
        self.inject("saving")


class FaultyExchange(Exchange):
    """Wraps the exchange of a worker, and injects faults into it until :meth:`uninstall`.

    Args:
        worker: the worker, which has joined. This exchange replaces its own.
        injector: knows which faults are due.

    """

    def __init__(self, worker: Worker, injector: FaultInjector) -> None:
        from lightning_async_localsgd.wire import connection, frames
        from lightning_async_localsgd.wire.client import WireExchange

        assert isinstance(worker.exchange, WireExchange)
        self._worker = worker
        self._injector = injector
        self._exchange = worker.exchange
        self._parts = frames.frame_count(4 * worker.model.numel())
        self._bytes_per_second: float | None = None
        self._bytes_moved = 0
        self._parts_seen: dict[str, int] = {}
        # The round whose push was made last. With overlap, the worker may be in the next round.
        self._pushed_round = 0
        self._cut_until = -math.inf
        worker.exchange = self
        self._exchange.observer = self._observe
        connection.dial_hooks.append(self._before_dial)

    def uninstall(self) -> None:
        """Give the worker its own exchange back."""
        from lightning_async_localsgd.wire import connection

        self._worker.exchange = self._exchange
        self._exchange.observer = None
        connection.dial_hooks.remove(self._before_dial)

    def cut(self, seconds: float) -> None:
        """Close all connections to the server, and refuse new ones for ``seconds``."""
        self._cut_until = time.monotonic() + seconds
        cut_connections(self._exchange.address)

    def _observe(self, moment: Moment, connection: Connection) -> None:
        """Inject faults. Called by the exchange for every part of a push or a model, and for a reply."""
        self._slow_down(connection)
        seen = self._parts_seen[moment] = self._parts_seen.get(moment, 0) + 1
        if moment != "before reply" and seen <= self._parts // 2:
            return
        for kind in (FaultKind.SLOW_LINK, FaultKind.CORRUPT, FaultKind.LOSE_REPLY):
            fault = self._injector.pop(kind, moment, self._pushed_round)
            if fault is None:
                continue
            if kind is FaultKind.SLOW_LINK:
                self._bytes_per_second = fault.bytes_per_second
                self._bytes_moved = connection.sent + connection.received
            elif kind is FaultKind.CORRUPT:
                connection.send(_NO_MESSAGE)
            else:
                from lightning_async_localsgd.wire.connection import ConnectionLost

                raise ConnectionLost("an injected fault lost the reply")
        self._injector.inject(moment, self._pushed_round)

    # ------------------------------------------------------------------ network

    def _slow_down(self, connection: Connection) -> None:
        if self._bytes_per_second is not None:
            moved = connection.sent + connection.received
            time.sleep(max(0, moved - self._bytes_moved) / self._bytes_per_second)
            self._bytes_moved = moved

    def _before_dial(self) -> None:
        """Refuse to connect while connections are cut. Called before the exchange or its heartbeat connects."""
        from lightning_async_localsgd.wire.connection import ConnectionLost

        if time.monotonic() < self._cut_until:
            raise ConnectionLost("an injected fault blocks connections to the server")

    # ----------------------------------------------------------------- exchange

    @property
    @override
    def bytes_sent(self) -> int:  # type: ignore[override]
        return self._exchange.bytes_sent

    @property
    @override
    def bytes_received(self) -> int:  # type: ignore[override]
        return self._exchange.bytes_received

    @override
    def join(self, hello: Hello, model: Tensor) -> Reply:
        return self._exchange.join(hello, model)

    @override
    def share(self, share: Share, values: Tensor) -> Reply:
        return self._exchange.share(share, values)

    @override
    def push(self, push: Push, gradient: Tensor, model: Tensor, packed: Tensor | None = None) -> Reply:
        self._parts_seen.clear()
        self._pushed_round = push.sequence
        if push.steps > 0 and self._injector.pop(FaultKind.NAN, "mid-push", push.sequence):
            gradient[0] = math.nan
            if packed is not None:
                packed[:4].fill_(0xFF)  # NaN in fp32, and two of them in bf16.
        try:
            reply = self._exchange.push(push, gradient, model, packed)
            if not reply.stop and self._injector.pop(FaultKind.DUPLICATE, "mid-push", push.sequence):
                # The second copy is answered with a model, too. The server expects the next round to be based on it.
                reply = self._exchange.push(push, gradient, model, packed)
        finally:
            self._bytes_per_second = None
        return reply

    @property
    @override
    def recalled_version(self) -> int:
        return self._exchange.recalled_version

    @override
    def check(self) -> None:
        self._exchange.check()

    @override
    def close(self, reason: str = "") -> None:
        self._exchange.close(reason)


_RESUME_SCRIPT = """
import os, signal, sys, time
process, until = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
while os.getppid() == process and (left := until - time.monotonic()) > 0:
    time.sleep(min(left, 0.05))
if os.getppid() == process:
    os.kill(process, signal.SIGCONT)
"""


def suspend_process(seconds: float) -> None:
    """Stop this process with all its threads. A child process resumes it, and ends at once if it dies meanwhile."""
    child = subprocess.Popen(
        [sys.executable, "-ISc", _RESUME_SCRIPT, str(os.getpid()), str(seconds)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl+C at the terminal must not end the child.
    )
    os.kill(os.getpid(), signal.SIGSTOP)
    child.wait()


def cut_connections(address: str) -> None:
    """Close every connection of this process to ``address``, a libzmq endpoint, as if the network had failed."""
    folder = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
    for name in os.listdir(folder):
        with suppress(OSError):  # The socket was closed meanwhile, or is not connected.
            descriptor = os.dup(int(name))
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                continue
            with socket.socket(fileno=descriptor) as connection:
                if _is_peer_of(address, connection.getpeername()):
                    connection.shutdown(socket.SHUT_RDWR)


def _is_peer_of(address: str, peer: object) -> bool:
    transport, _, place = address.partition("://")
    if transport == "ipc":
        name = place.encode()
        return peer in (b"\0" + name[1:] if name.startswith(b"@") else name, place)
    host, _, port = place.rpartition(":")
    known = {info[4][:2] for info in socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)}
    return isinstance(peer, tuple) and peer[:2] in known
