"""What comes over connections without bulk data: beats, requests for training data, and knocks.

Belongs to the thread of the :class:`.Hub`, which hands on what is none of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_async_localsgd.messages import Facts, Knock, Lease, LeaseRequest, MessageError
from lightning_async_localsgd.wire import frames
from lightning_async_localsgd.wire.auth import proof
from lightning_async_localsgd.wire.frames import Answer, Beat
from lightning_async_localsgd.wire.knock import signed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lightning_async_localsgd.wire.protocol import ServerPort
    from lightning_async_localsgd.wire.way import Key


_MOST_ASKED = 64
"""Who asks for more leases than this before it has an answer has gone wrong."""

_MOST_NONCE = 64
"""Characters of a nonce, and those of the ones that are sent are half of it."""


class SmallTalk:
    """Answers.

    Args:
        server: is asked.
        token: secret of the run.
        post: has a call made by the hub's thread; the server answers from another one.
        say: sends a message to a connection, if it is there.

    """

    def __init__(
        self,
        server: ServerPort,
        token: str,
        post: Callable[[Callable[[], None]], None],
        say: Callable[..., bool],
    ) -> None:
        self._server = server
        self._token = token
        self._post = post
        self._say = say
        self._beats: dict[Key, Beat] = {}
        self._asking: dict[Key, int] = {}
        self._knocking: set[Key] = set()
        self._wanted_told: Mapping[int, int] = {}

    def hear(self, header: bytes) -> tuple[Beat, bytes]:
        """A heart beats; the answer is still to be sent."""
        beat = Beat.decode(header[1:])
        _check_nonce(beat.nonce)
        return beat, self._answer(beat)

    def note(self, key: Key, beat: Beat) -> None:
        """Whose heart it is that beats over a connection."""
        self._beats[key] = beat

    def ask(self, key: Key, header: bytes) -> None:
        """A worker asks for training data."""
        request = LeaseRequest.decode(header[1:])
        beat = self._beats.get(key)
        if beat is None:
            raise MessageError("asks for data without a heartbeat")
        if (request.worker, request.session) != (beat.worker, beat.session):
            raise MessageError(f"asks for data of worker {request.worker} with the heartbeat of worker {beat.worker}")
        if self._asking.get(key, 0) >= _MOST_ASKED:
            raise MessageError(f"asks for data {_MOST_ASKED} times without waiting for an answer")
        self._asking[key] = self._asking.get(key, 0) + 1

        def answer(lease: Lease) -> None:
            self._post(lambda: self._hand_lease(key, lease))

        self._server.lease(request, answer)

    def knock(self, key: Key, header: bytes) -> None:
        """Somebody wants to know what it takes to join."""
        refused = frames.other_protocol(header[1:], "whoever knocks")
        if refused is not None:
            self._say(key, frames.REFUSE + refused.encode(), b"")
            return
        knock = Knock.decode(header[1:])
        _check_nonce(knock.nonce)
        if knock.worker < -1:
            raise MessageError(f"knocks for worker {knock.worker}")
        if key in self._knocking:
            raise MessageError("knocks again without waiting for an answer")
        self._knocking.add(key)

        def answer(facts: Facts) -> None:
            self._post(lambda: self._tell(key, signed(facts, self._token, knock.nonce)))

        self._server.introduce(knock.worker, answer)

    def end(self, key: Key) -> None:
        """A connection has ended."""
        self._beats.pop(key, None)
        self._asking.pop(key, None)
        self._knocking.discard(key)

    def tell_wanted(self) -> None:
        """Tells those whom it concerns what the server wants now."""
        wanted = self._server.wanted  # Not only at the next beat: a round may be short.
        if wanted is self._wanted_told:
            return
        for key, beat in self._beats.items():
            if wanted.get(beat.worker, -1) != self._wanted_told.get(beat.worker, -1):
                self._say(key, self._answer(beat))
        self._wanted_told = wanted

    def _answer(self, beat: Beat) -> bytes:
        incarnation, wanted = self._server.incarnation, self._server.wanted.get(beat.worker, -1)
        said = proof(self._token, beat.nonce.encode(), f"{incarnation} {wanted}")
        return frames.ANSWER + Answer(incarnation, wanted, said).encode()

    def _hand_lease(self, key: Key, lease: Lease) -> None:
        if key in self._asking:
            self._asking[key] -= 1
        self._say(key, frames.LEASE + lease.encode())  # If the connection is gone, it is asked for again.

    def _tell(self, key: Key, facts: Facts) -> None:
        self._knocking.discard(key)
        self._say(key, frames.FACTS + facts.encode())


def _check_nonce(nonce: str) -> None:
    if len(nonce) > _MOST_NONCE:
        raise MessageError(f"a nonce of {len(nonce)} characters")
