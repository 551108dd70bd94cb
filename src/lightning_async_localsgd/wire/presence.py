"""Tracks which worker sessions are present, by their connections and pings.

A session is present while its bulk connection or its heartbeat's connection is open. When both have closed, the
worker's process has ended or cannot reach the server, and the session is lost. A session is also lost when it has been
silent for too long. Its process may still be alive: the next ping revives the session, unless a newer session has
replaced it.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from lightning_async_localsgd.protocol.messages import worker_name
from lightning_async_localsgd.wire.adaptive_timeout import AdaptiveTimeout
from lightning_async_localsgd.wire.peer import Presence

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from lightning_async_localsgd.protocol.messages import Hello
    from lightning_async_localsgd.protocol.ports import ServerPort
    from lightning_async_localsgd.wire.frames import Ping
    from lightning_async_localsgd.wire.peer import Peer

_log = logging.getLogger(__name__)

MAX_LOST_SESSIONS = 1024
"""Most lost sessions that are kept, so that a ping can revive them. Sessions lost earlier must say hello again."""


class Presences:
    """The sessions that have said hello and have not ended.

    Args:
        server: is told which sessions are lost and which are revived.
        silence_timeout: seconds of silence that are allowed at first, see :class:`.AdaptiveTimeout`.
        disconnect: cancels a lost session's transfers and closes its bulk connection.

    """

    def __init__(self, server: ServerPort, silence_timeout: float, disconnect: Callable[[Peer], None]) -> None:
        self._server = server
        self._silence_timeout = silence_timeout
        self._disconnect = disconnect
        self._sessions: dict[tuple[int, str], Presence] = {}
        self._by_heartbeat: dict[Hashable, Presence] = {}

    def __iter__(self) -> Iterator[Presence]:
        return iter(list(self._sessions.values()))

    def on_hello(self, hello: Hello, now: float) -> Presence:
        """Handle a session's hello, the first or one over another connection. Return its presence."""
        for older in self:
            if older.worker == hello.worker and older.session != hello.session and older.lost:
                self._remove(older)
        presence = self._sessions.get((hello.worker, hello.session))
        if presence is None:
            presence = Presence(hello.worker, hello.session, AdaptiveTimeout(self._silence_timeout, now))
            self._sessions[hello.worker, hello.session] = presence
        presence.timeout.record_activity(now)
        presence.lost = presence.stalled = False
        return presence

    def on_ping(self, connection: Hashable, ping: Ping, now: float) -> None:
        """Handle a ping. The session may be unknown."""
        presence = self._sessions.get((ping.worker, ping.session))
        if self._by_heartbeat.get(connection) is not presence:
            self.on_heartbeat_closed(connection)
        if presence is None:
            return
        presence.timeout.record_activity(now)
        presence.heartbeats[connection] = now
        self._by_heartbeat[connection] = presence
        if presence.lost and not presence.stalled:
            presence.lost = False
            _log.info("%s is back (session %s)", worker_name(presence.worker), presence.session[:8])
            self._server.revive(presence.worker, presence.session)

    def on_heartbeat_closed(self, connection: Hashable) -> None:
        """Handle the end of a connection that may have been a heartbeat's."""
        presence = self._by_heartbeat.pop(connection, None)
        if presence is not None:
            presence.heartbeats.pop(connection, None)
            self._lose_if_disconnected(presence, "its connection ended")

    def detach(self, peer: Peer, reason: str) -> None:
        """Handle the end of a bulk connection. The session opens another one when it needs it."""
        presence = peer.presence
        if presence.peer is peer:
            presence.peer = None
            self._lose_if_disconnected(presence, reason)

    def mark_lost(self, presence: Presence, reason: str, stalled: bool = False) -> None:
        """Mark a session as lost, and tell the server."""
        if presence.lost:
            return
        presence.lost, presence.stalled = True, stalled
        peer, presence.peer = presence.peer, None
        if peer is not None:
            self._disconnect(peer)
        self._server.lost(presence.worker, presence.session, reason)
        # Sessions of workers that joined a run for a while never come back, and nothing else would remove them.
        key = (presence.worker, presence.session)
        self._sessions[key] = self._sessions.pop(key)
        for older in [presence for presence in self if presence.lost][:-MAX_LOST_SESSIONS]:
            self._remove(older)

    def end_session(self, presence: Presence, reason: str | None = None) -> None:
        """End a session for good.

        Args:
            presence: the session.
            reason: why the session is lost, for the server; None if the server knows already.

        """
        self._remove(presence)
        presence.peer = None
        if reason is not None and not presence.lost:
            presence.lost = True
            self._server.lost(presence.worker, presence.session, reason)

    def restart_timeouts(self, now: float) -> None:
        """Restart all timeouts, because this process itself was suspended."""
        for presence in self:
            presence.timeout.restart(now)

    def check_timeouts(self, now: float) -> None:
        """Mark sessions as lost that have been silent for too long."""
        for presence in self:
            if presence.timeout.expired(now):
                self.mark_lost(presence, f"it was silent for {presence.timeout.elapsed(now):.0f} s")

    def _lose_if_disconnected(self, presence: Presence, reason: str) -> None:
        since = time.monotonic() - presence.timeout.limit
        if presence.peer is None and not any(pinged_at > since for pinged_at in presence.heartbeats.values()):
            self.mark_lost(presence, reason)

    def _remove(self, presence: Presence) -> None:
        if self._sessions.get((presence.worker, presence.session)) is presence:
            del self._sessions[presence.worker, presence.session]
        for connection in presence.heartbeats:
            self._by_heartbeat.pop(connection, None)
        presence.heartbeats.clear()
