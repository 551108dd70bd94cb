"""What a fault is, and how each kind of it is brought about in a worker's own process.

Faults are real: signals, closed sockets, bytes that belong nowhere. Few places let them in: the exchange has an
observer for the moments of a conversation and gates before it dials, files have watchers before they get their names.
All are empty in a run without faults. Lightning is not known here, see :mod:`.faults`.
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
from typing import TYPE_CHECKING, Literal

from lightning_async_localsgd import durable
from lightning_async_localsgd.exchange import Exchange

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from torch import Tensor

    from lightning_async_localsgd.messages import Hello, Lease, LeaseRequest, Push, Reply
    from lightning_async_localsgd.wire.link import Link
    from lightning_async_localsgd.worker import Worker

_log = logging.getLogger(__name__)


class FaultKind(Enum):
    """What fails.

    * ``KILL``: the worker's process is killed (SIGKILL), as by the system when memory runs out.
    * ``STOP``: the process stands still for ``seconds`` (SIGSTOP), as on a machine that swaps or is suspended.
    * ``DELAY``: the worker's main thread sleeps for ``seconds``; its heartbeat goes on.
    * ``DROP_LINK``: all connections to the server are cut, and none comes about for ``seconds``.
    * ``SLOW_LINK``: the rest of the exchange moves ``bytes_per_second``.
    * ``LOSE_REPLY``: the server has applied the push, and the connection breaks before its answer is read.
    * ``DUPLICATE``: the push is handed in twice.
    * ``CORRUPT``: bytes that are no message of the protocol arrive among those of the push.
    * ``NAN``: the pseudo-gradient has a NaN: by itself (``"mid-push"``), or because a weight is NaN (``"computing"``).
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


Moment = Literal["before round", "computing", "mid-push", "before reply", "mid-pull", "saving"]

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
"""When each kind can be injected. The first one is taken where none is named."""

_LASTING = (FaultKind.STOP, FaultKind.DELAY, FaultKind.DROP_LINK)
_NETWORK = (FaultKind.DROP_LINK, FaultKind.SLOW_LINK, FaultKind.LOSE_REPLY, FaultKind.DUPLICATE, FaultKind.CORRUPT)

_NO_MESSAGE = b"\xff" * 17
"""No kind of message begins like this."""


@dataclass(frozen=True)
class Fault:
    """One fault of one worker.

    Args:
        kind: what fails.
        worker: whose; the global rank, or the number that a worker got which joined later.
        round: in which of this life's rounds, counted from 1. If its moment does not come in this one (a round may be
            called in before its middle, and not every round is saved), the fault comes at the next occasion.
        moment: when in the round:

            * ``"before round"``: before its first batch;
            * ``"computing"``: in its middle, after a backward pass;
            * ``"mid-push"``: half of the pseudo-gradient is handed to the network, or, of one that goes in one piece,
              its announcement;
            * ``"before reply"``: the server has answered, and nothing of the answer is read;
            * ``"mid-pull"``: the reply is read, and half of the model;
            * ``"saving"``: a file (rank 0's checkpoint, another worker's optimizer state) is written but does not yet
              have its name.

            ``None`` is the first that the kind allows, see :data:`MOMENTS`.
        seconds: how long it lasts, for ``STOP``, ``DELAY`` and ``DROP_LINK``.
        bytes_per_second: for ``SLOW_LINK``.
        life: how often the worker has been started again before. 0 is its first life: a worker that was killed is not
            killed again when it comes back. Where the whole job was started again, that is life 1.

    Raises:
        ValueError: the values do not go together; the text says which and why.

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
                f"moment={self.moment!r} makes no sense for a {self.kind.name} fault; use one of "
                + ", ".join(map(repr, allowed))
            )
        if self.worker == 0 and (self.kind in _NETWORK or self.moment in _EXCHANGING):
            raise ValueError(
                f"a {self.kind.name} fault at {self.moment!r} is not possible for worker=0: it shares a process with "
                "the server and has no connection; use another worker, or another moment"
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
        raise ValueError(f"{name}={value!r} means nothing for a {kind.name} fault; leave it out")
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} of a {kind.name} fault must be a positive, finite number")


class Injector(Exchange):
    """Stands between a worker and its exchange, and injects faults until :meth:`release`.

    Args:
        faults: of this worker in this life.
        worker: has joined.

    Attributes:
        open: those that have not come yet.

    """

    def __init__(self, faults: Sequence[Fault], worker: Worker) -> None:
        super().__init__()
        self.open = list(faults)
        self._worker = worker
        self._exchange = worker.exchange
        self._round = 0
        self._pace: float | None = None
        self._moved = 0
        self._parts = 1
        self._seen: dict[str, int] = {}
        self._cut_until = -math.inf
        worker.exchange = self
        durable.watchers.append(self._on_save)
        if worker.number > 0:
            from lightning_async_localsgd.wire import frames, link
            from lightning_async_localsgd.wire.client import WireExchange

            assert isinstance(self._exchange, WireExchange)
            self._exchange.observer = self._observe
            self._parts = frames.frame_count(4 * worker.model.numel())
            link.gates.append(self._gate)

    def release(self) -> None:
        """Leaves the exchange as it was; may be called twice."""
        if self._worker.exchange is not self:
            return
        self._worker.exchange = self._exchange
        durable.watchers.remove(self._on_save)
        if self._worker.number > 0:
            from lightning_async_localsgd.wire import link
            from lightning_async_localsgd.wire.client import WireExchange

            assert isinstance(self._exchange, WireExchange)
            self._exchange.observer = None
            link.gates.remove(self._gate)

    # ------------------------------------------------------------------ moments

    def before_batch(self) -> None:
        """The worker is about to take a batch."""
        if self._worker.round > self._round and not self._worker.stopped:
            self._round = self._worker.round
            self.at("before round")

    @property
    def in_mid_round(self) -> bool:
        """Whether half of the round is computed."""
        reply = self._worker.reply
        return reply is not None and not reply.stop and self._worker.round_steps >= reply.local_steps // 2

    def at(self, moment: Moment) -> None:
        """It is that moment; from any thread."""
        for kind in (FaultKind.DELAY, FaultKind.STOP, FaultKind.DROP_LINK, FaultKind.KILL):
            fault = self.take(kind, moment)
            if fault is None:
                continue
            if kind is FaultKind.KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            elif kind is FaultKind.DROP_LINK:
                self._cut(fault.seconds or 0.0)
            elif kind is FaultKind.STOP:
                stand_still(fault.seconds or 0.0)
            else:
                time.sleep(fault.seconds or 0.0)

    def take(self, kind: FaultKind, moment: Moment) -> Fault | None:
        """The fault of that kind whose time has come, which is not open any more."""
        for fault in self.open:
            if fault.kind is kind and fault.moment == moment and fault.round <= self._round:
                self.open.remove(fault)
                _log.warning("injected: %s", fault)
                return fault
        return None

    def _on_save(self) -> None:
        """Called by whatever thread writes a file."""
        self.at("saving")

    def _observe(self, moment: Moment, link: Link) -> None:
        """Called by the exchange, for every part of a push or a model and for a reply."""
        self._slow_down(link)
        seen = self._seen[moment] = self._seen.get(moment, 0) + 1
        if moment != "before reply" and seen <= self._parts // 2:
            return
        for kind in (FaultKind.SLOW_LINK, FaultKind.CORRUPT, FaultKind.LOSE_REPLY):
            fault = self.take(kind, moment)
            if fault is None:
                continue
            if kind is FaultKind.SLOW_LINK:
                self._pace = fault.bytes_per_second
                self._moved = link.sent + link.received
            elif kind is FaultKind.CORRUPT:
                link.send(_NO_MESSAGE)
            else:
                from lightning_async_localsgd.wire.link import LinkLost

                raise LinkLost("a reply is lost on purpose")
        self.at(moment)

    # -------------------------------------------------------------- the network

    def _slow_down(self, link: Link) -> None:
        if self._pace is not None:
            moved = link.sent + link.received
            time.sleep(max(0, moved - self._moved) / self._pace)
            self._moved = moved

    def _cut(self, seconds: float) -> None:
        from lightning_async_localsgd.wire.client import WireExchange

        assert isinstance(self._exchange, WireExchange)
        self._cut_until = time.monotonic() + seconds
        cut_connections(self._exchange.address)

    def _gate(self) -> None:
        """Called before the exchange or its heartbeat dials."""
        from lightning_async_localsgd.wire.link import LinkLost

        if time.monotonic() < self._cut_until:
            raise LinkLost("there is no way to the server, on purpose")

    # ------------------------------------------------------------- the exchange

    @property
    def bytes_sent(self) -> int:  # type: ignore[override]
        """See :attr:`.Exchange.bytes_sent`."""
        return self._exchange.bytes_sent

    @property
    def bytes_received(self) -> int:  # type: ignore[override]
        """See :attr:`.Exchange.bytes_received`."""
        return self._exchange.bytes_received

    def join(self, hello: Hello, model: Tensor) -> Reply:
        """See :meth:`.Exchange.join`."""
        return self._exchange.join(hello, model)

    def push(self, push: Push, gradient: Tensor, model: Tensor) -> Reply:
        """See :meth:`.Exchange.push`."""
        self._seen.clear()
        if push.steps > 0 and self.take(FaultKind.NAN, "mid-push"):
            gradient[0] = math.nan
        try:
            reply = self._exchange.push(push, gradient, model)
            if not reply.stop and self.take(FaultKind.DUPLICATE, "mid-push"):
                # It is answered with a model as well, and that is the one which the server expects a round on.
                reply = self._exchange.push(push, gradient, model)
        finally:
            self._pace = None
        return reply

    def request_lease(self, request: LeaseRequest) -> None:
        """See :meth:`.Exchange.request_lease`."""
        self._exchange.request_lease(request)

    def take_lease(self, number: int) -> Lease:
        """See :meth:`.Exchange.take_lease`."""
        return self._exchange.take_lease(number)

    def _send_request(self, request: LeaseRequest, answer: Future[Lease]) -> None:
        self._exchange._send_request(request, answer)

    @property
    def wanted_version(self) -> int:
        """See :attr:`.Exchange.wanted_version`."""
        return self._exchange.wanted_version

    def check(self) -> None:
        """See :meth:`.Exchange.check`."""
        self._exchange.check()

    def close(self) -> None:
        """See :meth:`.Exchange.close`."""
        self._exchange.close()


_WAKE = """
import os, signal, sys, time
process, until = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
while os.getppid() == process and (left := until - time.monotonic()) > 0:
    time.sleep(min(left, 0.05))
if os.getppid() == process:
    os.kill(process, signal.SIGCONT)
"""


def stand_still(seconds: float) -> None:
    """Stops this process with all its threads. A child wakes it up, and ends at once should it die meanwhile."""
    child = subprocess.Popen(
        [sys.executable, "-ISc", _WAKE, str(os.getpid()), str(seconds)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # A Ctrl+C at the terminal must not take away the one who wakes it up.
    )
    os.kill(os.getpid(), signal.SIGSTOP)
    child.wait()


def cut_connections(address: str) -> None:
    """Ends every connection of this process to ``address``, an endpoint of libzmq, as if the cable were cut."""
    folder = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
    for name in os.listdir(folder):
        with suppress(OSError):  # Closed meanwhile, or not connected.
            descriptor = os.dup(int(name))
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                continue
            with socket.socket(fileno=descriptor) as connection:
                if _leads_to(address, connection.getpeername()):
                    connection.shutdown(socket.SHUT_RDWR)


def _leads_to(address: str, peer: object) -> bool:
    transport, _, place = address.partition("://")
    if transport == "ipc":
        name = place.encode()
        return peer in (b"\0" + name[1:] if name.startswith(b"@") else name, place)
    host, _, port = place.rpartition(":")
    known = {found[4][:2] for found in socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)}
    return isinstance(peer, tuple) and peer[:2] in known
