"""Workers and their sessions.

A worker's *number* is its name in the run. A *session* is one life of the worker under that number. At most one session
of a number is live or departed. A departed session may come back and continue. A newer session replaces an older one
for good.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from lightning_async_localsgd.protocol.messages import PROTOCOL_VERSION, Hello

if TYPE_CHECKING:
    from lightning_async_localsgd.protocol.rejections import Rejection

_MAX_REPLACED_SESSIONS = 16
"""Number of replaced sessions of a worker that are remembered as such."""

_MAX_DISPATCHES = 8
"""Number of dispatches that may have answered the same push."""


class SessionState(Enum):
    """What a live worker does."""

    WAITING = auto()
    """It has joined or pushed, and waits for its dispatch: for the dispatch window, or for its group."""

    COMPUTING = auto()
    """It takes the local steps of its dispatch, or sends its push."""

    RESTING = auto()
    """There are no local steps left for it. It waits for more, or for the final model."""


@dataclass
class WorkerSession:
    """One session of a worker, with its state machine.

    The transitions::

        joins -->  WAITING  --- dispatch, expect_push_again -->  COMPUTING
                   WAITING  <-- arrive, dispatch_again --------  COMPUTING
                   WAITING  --- rest ------------------------->  RESTING
                   WAITING  <-- wake, arrive, dispatch_again --  RESTING

    :meth:`arrive` is also allowed in WAITING, because a push whose answer was lost is sent again.

    Attributes:
        id: random name of the session.
        state: what the worker does.
        sequence: number of the last push; 0 before the first.
        rejection: why the last push was refused; None if it was merged or held.
        version: version of the last dispatched model.
        bases: versions of the models that the worker may be computing on. There are several if an answer had to be
            sent again, because only the worker knows which one it received.
        dispatched_at: time of the last dispatch, in seconds.
        began_at: time at which the worker began the round: the last dispatch, or with overlap the push before it.
        local_steps: local steps of the last dispatch.
        overlap_steps: steps that the worker may take after that round, while its push is in flight.
        arrived_at: time at which the last push was decided on, or at which the worker joined, in seconds.
        staleness: staleness of the last push.
        exchange_seconds: seconds that the worker stood still for the last exchange.
        wait_seconds: with overlap, seconds that the worker waited for the answer to the push before the last one.
        begun_steps: steps of the next round that the worker may have taken by the time of its dispatch, because it
            trains while its push is in flight. After a refused push, it discards these steps.
        overlapped: whether the worker did not wait for the last dispatch.
        interrupted_at: time since which the worker validates or saves; None while it does neither.
        final: the worker has pushed its last round.
        recalled: the worker must push at its next step.
        rounds_since_validation: merged pushes of rounds that began after the last validation.
        reset_optimizer: the worker must begin its next round with fresh states of its inner optimizers.

    """

    id: str
    state: SessionState = SessionState.WAITING
    sequence: int = 0
    rejection: Rejection | None = None
    version: int = 0
    bases: deque[int] = field(default_factory=lambda: deque(maxlen=_MAX_DISPATCHES))
    dispatched_at: float = 0.0
    began_at: float = 0.0
    local_steps: int = 0
    overlap_steps: int = 0
    arrived_at: float = 0.0
    staleness: int = 0
    exchange_seconds: float = 0.0
    wait_seconds: float = 0.0
    begun_steps: int = 0
    overlapped: bool = False
    interrupted_at: float | None = None
    final: bool = False
    recalled: bool = False
    rounds_since_validation: int = 0
    reset_optimizer: bool = False

    @property
    def waiting(self) -> bool:
        """Whether the worker waits for its dispatch."""
        return self.state is SessionState.WAITING

    @property
    def computing(self) -> bool:
        """Whether the worker takes local steps, or validates or saves between them."""
        return self.state is SessionState.COMPUTING

    @property
    def resting(self) -> bool:
        """Whether there are no local steps left for the worker."""
        return self.state is SessionState.RESTING

    @property
    def interrupted(self) -> bool:
        """Whether the worker validates or saves, so that no other worker waits for it."""
        return self.interrupted_at is not None

    # -------------------------------------------------------------- transitions

    def dispatch(self, version: int, local_steps: int, now: float, overlap_steps: int = 0) -> None:
        """Go from WAITING to COMPUTING: the worker is sent a model and its local steps."""
        assert self.waiting
        self.state = SessionState.COMPUTING
        self.overlapped = self.begun_steps > 0
        if self.overlapped:
            self.began_at = self.arrived_at
        else:
            self.began_at = now
            self.interrupted_at = None
        self.local_steps = local_steps
        self.overlap_steps = overlap_steps
        self.version = version
        self.bases.append(version)
        self.dispatched_at = now
        self.recalled = False

    def arrive(self, now: float) -> float:
        """Go to WAITING: a push of the worker has been decided on.

        Returns:
            Seconds that the round took.

        """
        self.state = SessionState.WAITING
        self.arrived_at = now
        self.overlapped = False
        self.interrupted_at = None
        return now - self.began_at

    def rest(self) -> None:
        """Go from WAITING to RESTING: there are no local steps left for the worker."""
        assert self.waiting
        self.state = SessionState.RESTING

    def wake(self) -> None:
        """Go from RESTING to WAITING: there may be local steps again. Else, and after the last round, do nothing."""
        if self.resting and not self.final:
            self.state = SessionState.WAITING

    def expect_push_again(self) -> None:
        """Go from WAITING to COMPUTING: the worker lost its connection, and sends its push again. Else do nothing."""
        if self.waiting:
            self.state = SessionState.COMPUTING

    def dispatch_again(self) -> None:
        """Go from COMPUTING or RESTING to WAITING: the worker did not receive its first dispatch."""
        self.state = SessionState.WAITING

    # ------------------------------------------------------------ while computing

    def interrupt(self, now: float) -> None:
        """Note that the worker begins to validate or save."""
        if self.interrupted_at is None:
            self.interrupted_at = now

    def continue_round(self, now: float) -> None:
        """Note that the worker computes again. The interruption does not count as part of its round."""
        if self.interrupted_at is not None:
            self.began_at += now - max(self.interrupted_at, self.began_at)
            self.interrupted_at = None


class SessionTable:
    """Numbers and sessions of all workers.

    Args:
        cohort: number of workers that the run is started with. Their numbers are 0, 1, ...; workers that join later
            get higher numbers.

    Attributes:
        live: live sessions by worker.
        next_number: number of the next worker that joins.

    """

    def __init__(self, cohort: int) -> None:
        self.live: dict[int, WorkerSession] = {}
        self.next_number = cohort
        self._cohort = cohort
        self._departed: dict[int, WorkerSession] = {}
        self._replaced: dict[int, deque[str]] = {}

    @property
    def missing(self) -> list[int]:
        """Workers of the cohort that are not live."""
        return [worker for worker in range(self._cohort) if worker not in self.live]

    @property
    def departed(self) -> frozenset[int]:
        """Workers that left and whose sessions may come back."""
        return frozenset(self._departed)

    @property
    def bases(self) -> tuple[list[int], list[int]]:
        """Versions that live sessions may be computing on, and those that departed sessions may."""
        live, departed = (
            [version for session in sessions.values() for version in session.bases]
            for sessions in (self.live, self._departed)
        )
        return live, departed

    def new_number(self) -> int:
        """Return a number that no worker of this run has had before."""
        number = self.next_number
        self.next_number += 1
        return number

    def knows(self, worker: int) -> bool:
        """Return whether a worker of this run has, or had, the number."""
        return 0 <= worker < self.next_number

    def is_late_joiner(self, worker: int) -> bool:
        """Return whether the worker joined after the start of the run."""
        return worker >= self._cohort

    def find(self, worker: int, session_id: str) -> WorkerSession | None:
        """Return the session if it is live."""
        session = self.live.get(worker)
        return session if session is not None and session.id == session_id else None

    def find_departed(self, worker: int, session_id: str) -> WorkerSession | None:
        """Return the session if it has departed and may come back."""
        session = self._departed.get(worker)
        return session if session is not None and session.id == session_id else None

    def is_replaced(self, worker: int, session_id: str) -> bool:
        """Return whether the session was ended for good."""
        return session_id in self._replaced.get(worker, ())

    def check_protocol(self, hello: Hello) -> str | None:
        """Return why no worker with this protocol can take part; None if the protocol is the server's."""
        if hello.protocol != PROTOCOL_VERSION:
            return (
                f"worker {hello.worker} speaks protocol {hello.protocol}, the server speaks {PROTOCOL_VERSION}: "
                "install the same version of lightning-async-localsgd on every machine"
            )
        return None

    def enter(self, worker: int, session_id: str, now: float) -> WorkerSession:
        """Add a new session, which replaces an older one of the worker."""
        self.end(worker)
        session = self.live[worker] = WorkerSession(session_id, arrived_at=now)
        return session

    def depart(self, worker: int) -> None:
        """Move a live session to the departed ones."""
        self._departed[worker] = self.live.pop(worker)

    def bring_back(self, worker: int) -> WorkerSession:
        """Move a departed session to the live ones."""
        session = self.live[worker] = self._departed.pop(worker)
        return session

    def end(self, worker: int) -> None:
        """End the worker's session, live or departed, for good."""
        for sessions in (self.live, self._departed):
            session = sessions.pop(worker, None)
            if session is not None:
                self._replaced.setdefault(worker, deque(maxlen=_MAX_REPLACED_SESSIONS)).append(session.id)

    def forget(self, worker: int) -> None:
        """Forget all sessions of a worker. Its number stays used."""
        self._departed.pop(worker, None)
        self._replaced.pop(worker, None)
