"""How long a peer may say nothing before it counts as gone.

Only silence is timed, never a transfer as a whole. Whoever has come back from a long silence (a process that was
suspended, a road that was closed for a while) may need as long another time, so the limit grows with what was seen.
"""

from __future__ import annotations

GAP_TIMES = 3
"""A peer may be silent for this many times the longest silence that it has come back from."""

MOST_TIMES = 10
"""No limit grows beyond this many times the one that was set."""


class Silence:
    """One peer's silence.

    Args:
        timeout: seconds of silence that are allowed at first.
        now: seconds, of a monotonic clock.

    Attributes:
        limit: seconds of silence that are allowed.
        heard_at: when the peer was heard last, or began to be listened to.

    """

    def __init__(self, timeout: float, now: float) -> None:
        self.limit = timeout
        self.heard_at = now
        self._most = MOST_TIMES * timeout

    def hear(self, now: float) -> None:
        """The peer has given a sign of life."""
        self.limit = min(max(self.limit, GAP_TIMES * (now - self.heard_at)), self._most)
        self.heard_at = now

    def excuse(self, now: float) -> None:
        """The listener itself was asleep until now: the peer may have said something that is still to be read."""
        self.heard_at = now

    def seconds(self, now: float) -> float:
        """For how long the peer has been silent."""
        return now - self.heard_at

    def too_long(self, now: float) -> bool:
        """Whether that is more than is allowed."""
        return self.seconds(now) > self.limit
