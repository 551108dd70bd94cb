"""Who is there: the sessions of workers, and the connections over which each of them can be heard.

A session is present as long as its bulk connection or that of its heartbeat is open; when both are gone its process has
ended, or has lost its way, and the server learns that at once. So it does when a session has been silent for too long.
Its process may be alive all the same: the next beat brings it back, unless another session has taken its place.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from lightning_async_localsgd.wire.silence import Silence

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from lightning_async_localsgd.messages import Hello
    from lightning_async_localsgd.wire.frames import Beat
    from lightning_async_localsgd.wire.peer import Peer
    from lightning_async_localsgd.wire.protocol import ServerPort

_log = logging.getLogger(__name__)

MOST_DEPARTED = 1024
"""So many sessions that are lost are brought back by a beat; earlier ones have to say hello."""


class Presence:
    """One session of a worker.

    Args:
        worker: the worker's number.
        session: the session.
        silence: its silence.

    Attributes:
        peer: its bulk connection; None while there is none.
        pulses: the connections of its heartbeat, and when it was heard over them last. One that has replaced another
            may leave it half open for long.
        departed: the server has been told that it is lost.
        stalled: it departed in the middle of a transfer though its heart beats: only a new hello brings it back.

    """

    def __init__(self, worker: int, session: str, silence: Silence) -> None:
        self.worker = worker
        self.session = session
        self.silence = silence
        self.peer: Peer | None = None
        self.pulses: dict[Hashable, float] = {}
        self.departed = False
        self.stalled = False


class Presences:
    """All sessions that have said hello and have not said goodbye.

    Args:
        server: learns who is lost, and who is back.
        silence_timeout: seconds of silence that are allowed at first, see :class:`.Silence`.
        give_up: ends what goes on over a departed session's bulk connection, and the connection itself.

    """

    def __init__(self, server: ServerPort, silence_timeout: float, give_up: Callable[[Peer], None]) -> None:
        self._server = server
        self._silence_timeout = silence_timeout
        self._give_up = give_up
        self._sessions: dict[tuple[int, str], Presence] = {}
        self._beating: dict[Hashable, Presence] = {}

    def __iter__(self) -> Iterator[Presence]:
        return iter(list(self._sessions.values()))

    def greet(self, hello: Hello, now: float) -> Presence:
        """A session says hello, for the first time or over another connection."""
        for older in self:
            if older.worker == hello.worker and older.session != hello.session and older.departed:
                self._forget(older)
        presence = self._sessions.get((hello.worker, hello.session))
        if presence is None:
            presence = Presence(hello.worker, hello.session, Silence(self._silence_timeout, now))
            self._sessions[hello.worker, hello.session] = presence
        presence.silence.hear(now)
        presence.departed = presence.stalled = False
        return presence

    def beat(self, connection: Hashable, beat: Beat, now: float) -> None:
        """The heart of a session beats, which need not be known here."""
        presence = self._sessions.get((beat.worker, beat.session))
        if self._beating.get(connection) is not presence:
            self.end_pulse(connection)
        if presence is None:
            return
        presence.silence.hear(now)
        presence.pulses[connection] = now
        self._beating[connection] = presence
        if presence.departed and not presence.stalled:
            presence.departed = False
            _log.info("worker %d is back (session %s)", presence.worker, presence.session[:8])
            self._server.revive(presence.worker, presence.session)

    def end_pulse(self, connection: Hashable) -> None:
        """A connection over which a heart may have been beating has ended."""
        presence = self._beating.pop(connection, None)
        if presence is not None:
            presence.pulses.pop(connection, None)
            self._look(presence, "its connection ended")

    def detach(self, peer: Peer, reason: str) -> None:
        """A bulk connection is of no use any more. The session dials again when it needs one."""
        presence = peer.presence
        if presence.peer is peer:
            presence.peer = None
            self._look(presence, reason)

    def depart(self, presence: Presence, reason: str, stalled: bool = False) -> None:
        """A session is lost, for now."""
        if presence.departed:
            return
        presence.departed, presence.stalled = True, stalled
        peer, presence.peer = presence.peer, None
        if peer is not None:
            self._give_up(peer)
        self._server.lost(presence.worker, presence.session, reason)
        # The numbers of those who join a run for a while are never used again, and nobody else would forget them.
        key = (presence.worker, presence.session)
        self._sessions[key] = self._sessions.pop(key)
        for older in [one for one in self if one.departed][:-MOST_DEPARTED]:
            self._forget(older)

    def dismiss(self, presence: Presence, reason: str | None = None) -> None:
        """A session has ended for good.

        Args:
            presence: of the session.
            reason: told to the server as that of its loss; None if the server knows.

        """
        self._forget(presence)
        presence.peer = None
        if reason is not None and not presence.departed:
            presence.departed = True
            self._server.lost(presence.worker, presence.session, reason)

    def excuse(self, now: float) -> None:
        """Nobody could have been heard until now."""
        for presence in self:
            presence.silence.excuse(now)

    def judge(self, now: float) -> None:
        """Looks who has been silent for too long."""
        for presence in self:
            if presence.silence.too_long(now):
                self.depart(presence, f"it was silent for {presence.silence.seconds(now):.0f} s")

    def _look(self, presence: Presence, reason: str) -> None:
        since = time.monotonic() - presence.silence.limit
        if presence.peer is None and not any(heard_at > since for heard_at in presence.pulses.values()):
            self.depart(presence, reason)

    def _forget(self, presence: Presence) -> None:
        if self._sessions.get((presence.worker, presence.session)) is presence:
            del self._sessions[presence.worker, presence.session]
        for connection in presence.pulses:
            self._beating.pop(connection, None)
        presence.pulses.clear()
