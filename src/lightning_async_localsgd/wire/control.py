"""The server's handling of messages without bulk data: pings and requests.

Runs in the thread of the :class:`.Hub`, which passes these messages on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from lightning_async_localsgd.protocol.messages import (
    JoinInfo,
    JoinRequest,
    Lease,
    LeaseRequest,
    MessageError,
    StatusRequest,
    worker_name,
)
from lightning_async_localsgd.wire import frames
from lightning_async_localsgd.wire.auth import proof
from lightning_async_localsgd.wire.frames import Ping, Pong
from lightning_async_localsgd.wire.join_info import with_proof
from lightning_async_localsgd.wire.status import pack_status

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lightning_async_localsgd.protocol.ports import ServerPort
    from lightning_async_localsgd.wire.listener import ConnectionKey


_R = TypeVar("_R", JoinRequest, StatusRequest)

_MAX_LEASE_REQUESTS = 64
"""Unanswered lease requests that a connection may have. Further requests are refused."""

_MAX_NONCE_LENGTH = 64
"""Longest nonce that is accepted, in characters. Workers send nonces of half that length."""


class ControlMessages:
    """Answers pings, and requests for leases, for joining and for the state of the run.

    Args:
        server: answers the requests.
        token: secret of the run.
        post: runs a call in the hub's thread. The server answers from its own thread.
        send: sends a message over a connection, and returns whether the connection is there.

    """

    def __init__(
        self,
        server: ServerPort,
        token: str,
        post: Callable[[Callable[[], None]], None],
        send: Callable[..., bool],
    ) -> None:
        self._server = server
        self._token = token
        self._post = post
        self._send = send
        self._pings: dict[ConnectionKey, Ping] = {}
        self._open_lease_requests: dict[ConnectionKey, int] = {}
        self._open_join_requests: set[ConnectionKey] = set()
        self._open_status_requests: set[ConnectionKey] = set()
        self._recalled_sent: Mapping[int, int] = {}

    def on_ping(self, header: bytes) -> tuple[Ping, bytes]:
        """Handle a ping. Return it, and the pong that is to be sent."""
        ping = Ping.decode(header[1:])
        _check_nonce(ping.nonce)
        return ping, self._pong(ping)

    def add_connection(self, key: ConnectionKey, ping: Ping) -> None:
        """Record which worker's pings come over a connection."""
        self._pings[key] = ping

    def on_lease_request(self, key: ConnectionKey, header: bytes) -> None:
        """Handle a lease request."""
        request = LeaseRequest.decode(header[1:])
        ping = self._pings.get(key)
        if ping is None:
            raise MessageError("a lease request over a connection without pings")
        if (request.worker, request.session) != (ping.worker, ping.session):
            asks, pings = worker_name(request.worker), worker_name(ping.worker)
            raise MessageError(f"a lease request of {asks} over a connection of {pings}")
        if self._open_lease_requests.get(key, 0) >= _MAX_LEASE_REQUESTS:
            raise MessageError(f"more than {_MAX_LEASE_REQUESTS} unanswered lease requests")
        self._open_lease_requests[key] = self._open_lease_requests.get(key, 0) + 1

        def answer(lease: Lease) -> None:
            self._post(lambda: self._send_lease(key, lease))

        self._server.request_lease(request, answer)

    def on_join_request(self, key: ConnectionKey, header: bytes) -> None:
        """Handle a join request."""
        request = self._decode(key, header, JoinRequest)
        if request is None:
            return
        if request.worker < -1:
            raise MessageError(f"a join request for {worker_name(request.worker)}")
        if key in self._open_join_requests:
            raise MessageError("more than one unanswered join request")
        self._open_join_requests.add(key)

        def answer(info: JoinInfo) -> None:
            self._post(lambda: self._send_join_info(key, with_proof(info, self._token, request.nonce)))

        self._server.request_join_info(request.worker, answer)

    def on_status_request(self, key: ConnectionKey, header: bytes) -> None:
        """Handle a request for the state of the run."""
        request = self._decode(key, header, StatusRequest)
        if request is None:
            return
        if key in self._open_status_requests:
            raise MessageError("more than one unanswered status request")
        self._open_status_requests.add(key)

        def answer(text: str) -> None:
            self._post(lambda: self._send_status(key, pack_status(text, self._token, request.nonce)))

        self._server.request_status(answer)

    def on_closed(self, key: ConnectionKey) -> None:
        """Forget a connection that has ended."""
        self._pings.pop(key, None)
        self._open_lease_requests.pop(key, None)
        self._open_join_requests.discard(key)
        self._open_status_requests.discard(key)

    def send_recalls(self) -> None:
        """Send a pong to every worker whose recall has changed. Rounds may be too short to wait for the next ping."""
        recalled = self._server.recalled
        if recalled is self._recalled_sent:
            return
        for key, ping in self._pings.items():
            if recalled.get(ping.worker, -1) != self._recalled_sent.get(ping.worker, -1):
                self._send(key, self._pong(ping))
        self._recalled_sent = recalled

    def _decode(self, key: ConnectionKey, header: bytes, kind: type[_R]) -> _R | None:
        """Return the request of a process without a session; None if it has another protocol and was refused."""
        refused = frames.protocol_mismatch(header[1:], "this process")
        if refused is not None:
            self._send(key, frames.REFUSE + refused.encode(), b"")
            return None
        request = kind.decode(header[1:])
        _check_nonce(request.nonce)
        return request

    def _pong(self, ping: Ping) -> bytes:
        incarnation, recalled = self._server.incarnation, self._server.recalled.get(ping.worker, -1)
        statement = proof(self._token, ping.nonce.encode(), f"{incarnation} {recalled}")
        return frames.PONG + Pong(incarnation, recalled, statement).encode()

    def _send_lease(self, key: ConnectionKey, lease: Lease) -> None:
        if key in self._open_lease_requests:
            self._open_lease_requests[key] -= 1
        # If the connection is gone, the worker requests the lease again.
        self._send(key, frames.LEASE + lease.encode())

    def _send_status(self, key: ConnectionKey, header: bytes) -> None:
        self._open_status_requests.discard(key)
        self._send(key, header)

    def _send_join_info(self, key: ConnectionKey, info: JoinInfo) -> None:
        self._open_join_requests.discard(key)
        self._send(key, frames.JOIN_INFO + info.encode())


def _check_nonce(nonce: str) -> None:
    if len(nonce) > _MAX_NONCE_LENGTH:
        raise MessageError(f"a nonce has {len(nonce)} characters, the limit is {_MAX_NONCE_LENGTH}")
