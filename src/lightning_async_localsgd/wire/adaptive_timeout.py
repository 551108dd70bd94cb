"""The timeout after which a silent peer counts as gone.

Only silence is timed, never a transfer as a whole. A peer that has recovered from a long silence (a suspended process,
a network that was down for a while) may need as long another time, so the timeout grows with the silences that the peer
has recovered from.
"""

from __future__ import annotations

GROWTH = 3
"""After a silence that a peer recovers from, its timeout is at least this many times that silence."""

MAX_GROWTH = 10
"""No timeout grows beyond this many times its first value."""


class AdaptiveTimeout:
    """The timeout of one peer.

    Args:
        timeout: seconds of silence that are allowed at first.
        now: seconds, of a monotonic clock.

    Attributes:
        limit: seconds of silence that are allowed now.
        last_activity: when the last sign of life came, or when waiting for one began.

    """

    def __init__(self, timeout: float, now: float) -> None:
        self.limit = timeout
        self.last_activity = now
        self._max_limit = MAX_GROWTH * timeout

    def record_activity(self, now: float) -> None:
        """Record a sign of life."""
        self.limit = min(max(self.limit, GROWTH * (now - self.last_activity)), self._max_limit)
        self.last_activity = now

    def restart(self, now: float) -> None:
        """Restart the timeout, because this process itself was suspended and has not read the peer's messages yet."""
        self.last_activity = now

    def elapsed(self, now: float) -> float:
        """Return for how many seconds the peer has been silent."""
        return now - self.last_activity

    def expired(self, now: float) -> bool:
        """Return whether the peer has been silent for longer than allowed."""
        return self.elapsed(now) > self.limit
