"""Which dead workers are started again, how often and when; shared by the launchers."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lightning_async_localsgd.joining import JOIN, REJOIN, TOKEN

_log = logging.getLogger(__name__)

RESUME = "ASYNC_LOCALSGD_RESUME"
"""Set to 1 for a job that is started again: it goes on from the newest checkpoint of its run."""

FIRST_PAUSE = 0.5
"""Seconds between a death and the first restart; twice as long before each further one, unless it has lived
for a while in between."""

_LONGEST_PAUSE = 30.0

_GOOD_LIFE = 60.0
"""Seconds of life after which a death is no sign that the next life will be short, too."""

_ASKED_TO_END = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM}


MayRestart = Callable[[int], bool]
"""Whether the server would take the worker of this number again."""


def always(worker: int) -> bool:
    """Nobody knows of a reason why the worker could not come back."""
    return True


class WorkersLostError(RuntimeError):
    """Training is complete, but not all workers saw the end of it. Raised with ``strict=True`` only."""


@dataclass(frozen=True)
class JoinTicket:
    """What a process needs to join the training that runs.

    Args:
        address: of the server, as the processes of this host reach it.
        token: the run's secret.
        encrypted: whether the server speaks CURVE at that address.
        fit: number of the fit in the script.

    """

    address: str
    token: str = field(repr=False)
    encrypted: bool
    fit: int

    def variables(self, worker: int, life: int) -> dict[str, str]:
        """The environment of ``worker``'s next process, in addition to that of its first.

        Args:
            worker: its number.
            life: how often it has been started again, this time included.

        """
        told = {"worker": worker, "fit": self.fit, "encrypted": self.encrypted, "life": life}
        return {JOIN: self.address, TOKEN: self.token, REJOIN: json.dumps(told)}


class Restarts:
    """Decides about the dead workers of one run, and says so in one line each. Knows no process and no clock.

    Args:
        most: restarts of each worker.
        allowed: whether a worker may come back (it may not if its pushes are refused for good).

    """

    def __init__(self, most: int, allowed: MayRestart = always) -> None:
        self._most = most
        self._allowed = allowed
        self._lives: dict[int, int] = {}
        self._started: dict[int, float] = {}
        self._in_a_row: dict[int, int] = {}
        self._due: dict[int, float] = {}

    def died(self, worker: int, code: int, now: float, error: str = "") -> bool:
        """The worker's process has ended.

        Args:
            worker: its number.
            code: its exit code; negative for a signal.
            now: seconds.
            error: its traceback, if it is known and nobody has shown it.

        Returns:
            Whether it will be started again.

        """
        how = f"{in_words(code)}\n{error}".rstrip()
        lives = self._lives.get(worker, 0)
        if code == 0 or is_wish_to_end(code):
            _log.warning("worker %d has left, with %s; training goes on without it", worker, how)
        elif not self._allowed(worker):
            _log.error("worker %d ended with %s; it is not started again, the server takes no more of it", worker, how)
        elif lives >= self._most:
            _log.error(
                "worker %d ended with %s; it has been started again %d time(s) (max_restarts=%d), training goes on "
                "without it", worker, how, lives, self._most,
            )  # fmt: skip
        else:
            if now - self._started.get(worker, now) >= _GOOD_LIFE:
                self._in_a_row[worker] = 0
            pause = pause_before(self._in_a_row.get(worker, 0))
            self._in_a_row[worker] = self._in_a_row.get(worker, 0) + 1
            _log.warning(
                "worker %d ended with %s; it is started again in %g s (restart %d of %d)",
                worker, how, pause, lives + 1, self._most,
            )  # fmt: skip
            self._due[worker] = now + pause
            return True
        return False

    def cancel(self) -> None:
        """Nobody is started any more."""
        self._due.clear()

    def next_due(self) -> float | None:
        """When the next worker is to be started."""
        return min(self._due.values(), default=None)

    def take_due(self, now: float) -> dict[int, int]:
        """The workers that are to be started now, and how often each has been started again with this time."""
        due = [worker for worker, when in self._due.items() if when <= now]
        for worker in due:
            del self._due[worker]
            self._lives[worker] = self._lives.get(worker, 0) + 1
            self._started[worker] = now
        return {worker: self._lives[worker] for worker in due}


def new_name() -> str:
    """A name for a run, which those who start it again find again where the job has a name of its own."""
    run, job = os.environ.get("TORCHELASTIC_RUN_ID"), os.environ.get("SLURM_JOB_ID")
    if run is not None:
        return f"torchrun-{run}-{os.getppid()}"
    # The number of an interactive job is that of many runs.
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if job is not None and "SLURM_PROCID" in os.environ and not interactive:
        return f"slurm-{job}"
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def pause_before(restarts: int) -> float:
    """Seconds to wait before the next start of what has been started again ``restarts`` times."""
    return min(FIRST_PAUSE * 2.0**restarts, _LONGEST_PAUSE)


def is_wish_to_end(code: int) -> bool:
    """Whether a process ended because it was asked to, by a signal that is there for it."""
    return -code in _ASKED_TO_END


def in_words(code: int) -> str:
    """An exit code as :mod:`subprocess` and :mod:`multiprocessing` have it."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"
