"""Who takes part in a run, who has left it and may come back, and who may not: numbers and sessions.

A worker's *number* is its name in the run; a *session* is one life of the worker under that number. One session of a
number is live, or departed: then it may come back and go on where it was. A newer session takes an older one's place
for good.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lightning_async_localsgd.messages import PROTOCOL_VERSION, Hello

if TYPE_CHECKING:
    from lightning_async_localsgd.objections import Objection

_REMEMBERED_SESSIONS = 16
"""So many superseded sessions of each number are known as such."""

_REMEMBERED_DISPATCHES = 8
"""So many dispatches that answer the same push are told apart."""


@dataclass
class Member:
    """One session of a worker.

    Attributes:
        session: its name.
        state: see :mod:`~lightning_async_localsgd.coordinator`.
        sequence: of its last push; 0 before the first.
        answer: why that one is refused; None if it was applied.
        version: of the model that it was dispatched last.
        bases: versions of the models that it may be computing on: several where an answer had to be given again, since
            nobody but the worker knows which of them has reached it.
        dispatched_at: when that was.
        local_steps: that it was given.
        arrived_at: when its last push was settled, or when it joined.
        staleness: of its last push.
        exchange_seconds: that its last exchange took.
        paused_at: since when it does something else; None if it does not.
        final: it has handed in its last round.
        called_in: it is to hand in at once what it has.
        renew: it is to begin its next round with fresh states of its inner optimizers.

    """

    session: str
    state: Literal["computing", "waiting", "resting"] = "waiting"
    sequence: int = 0
    answer: Objection | None = None
    version: int = 0
    bases: deque[int] = field(default_factory=lambda: deque(maxlen=_REMEMBERED_DISPATCHES))
    dispatched_at: float = 0.0
    local_steps: int = 0
    arrived_at: float = 0.0
    staleness: int = 0
    exchange_seconds: float = 0.0
    paused_at: float | None = None
    final: bool = False
    called_in: bool = False
    renew: bool = False


class Membership:
    """Numbers and sessions of all workers.

    Args:
        cohort: workers that the run is started with, numbered from 0. Those who join later get higher numbers.

    Attributes:
        live: the live sessions by number.
        next_number: the number that the next one who joins gets.

    """

    def __init__(self, cohort: int) -> None:
        self.live: dict[int, Member] = {}
        self.next_number = cohort
        self._cohort = cohort
        self._departed: dict[int, Member] = {}
        # Sessions that cannot come back, by number.
        self._over: dict[int, deque[str]] = {}

    @property
    def missing(self) -> list[int]:
        """The workers of the cohort that are not live."""
        return [number for number in range(self._cohort) if number not in self.live]

    @property
    def departed(self) -> frozenset[int]:
        """The workers that are gone and whose sessions may come back."""
        return frozenset(self._departed)

    @property
    def bases(self) -> tuple[list[int], list[int]]:
        """The versions that live sessions may be computing on, and those that departed ones may."""
        live, departed = (
            [version for member in sessions.values() for version in member.bases]
            for sessions in (self.live, self._departed)
        )
        return live, departed

    def new_number(self) -> int:
        """A number that nobody has had before."""
        number = self.next_number
        self.next_number += 1
        return number

    def knows(self, number: int) -> bool:
        """Whether somebody has been given this number."""
        return 0 <= number < self.next_number

    def is_stranger(self, number: int) -> bool:
        """Whether the number is that of somebody who joined a run that was under way."""
        return number >= self._cohort

    def find(self, worker: int, session: str) -> Member | None:
        """The session if it is live."""
        member = self.live.get(worker)
        return member if member is not None and member.session == session else None

    def find_departed(self, worker: int, session: str) -> Member | None:
        """The session if it has departed and may come back."""
        member = self._departed.get(worker)
        return member if member is not None and member.session == session else None

    def is_over(self, worker: int, session: str) -> bool:
        """Whether the session has had its time."""
        return session in self._over.get(worker, ())

    def objection(self, hello: Hello) -> str | None:
        """Why nobody who introduces himself like this can take part."""
        if hello.protocol != PROTOCOL_VERSION:
            return (
                f"worker {hello.worker} speaks protocol {hello.protocol}, the server speaks {PROTOCOL_VERSION}: "
                "install the same version of lightning-async-localsgd on every machine"
            )
        return None

    def enter(self, worker: int, session: str, now: float) -> Member:
        """A new session, in the place of any older one."""
        self.end(worker)
        member = self.live[worker] = Member(session, arrived_at=now)
        return member

    def depart(self, worker: int) -> None:
        """A live session is gone; it may come back."""
        self._departed[worker] = self.live.pop(worker)

    def bring_back(self, worker: int) -> Member:
        """A departed session is live again."""
        member = self.live[worker] = self._departed.pop(worker)
        return member

    def end(self, worker: int) -> None:
        """The present session of a worker, live or departed, cannot come back."""
        for sessions in (self.live, self._departed):
            member = sessions.pop(worker, None)
            if member is not None:
                self._over.setdefault(worker, deque(maxlen=_REMEMBERED_SESSIONS)).append(member.session)

    def forget(self, worker: int) -> None:
        """Nothing is known of this number any more, except that it was given to somebody."""
        self._departed.pop(worker, None)
        self._over.pop(worker, None)
