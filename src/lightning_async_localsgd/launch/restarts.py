"""Which dead workers are restarted, how often and when. Shared by the launchers."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from lightning_async_localsgd.launch.joining import JOIN_ENV, REJOIN_ENV, TOKEN_ENV

_log = logging.getLogger(__name__)

FIRST_DELAY = 0.5
"""Seconds between the death of a worker and its first restart. The delay doubles with each further restart, and starts
over after the worker has run for :data:`_STABLE_SECONDS`."""

_MAX_DELAY = 30.0

_STABLE_SECONDS = 60.0
"""A worker that has run this long is not expected to die again soon."""

_STOP_SIGNALS = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM}


MayRestart = Callable[[int], bool]
"""Returns whether the server would accept the worker with this number again."""


def always(worker: int) -> bool:
    """Allow every restart: the default where no server can be asked."""
    return True


class WorkersLostError(RuntimeError):
    """Training is complete, but workers were lost before its end. Raised only with ``fail_on_lost_workers=True``."""


@dataclass(frozen=True)
class JoinTicket:
    """The address and token with which a process joins the running training.

    Args:
        address: server address, as seen from this host.
        token: the run's token.
        encrypted: whether the server uses CURVE encryption at this address.
        fit: number of the fit in the script.

    """

    address: str
    token: str = field(repr=False)
    encrypted: bool
    fit: int

    def variables(self, worker: int, restart_count: int) -> dict[str, str]:
        """Return the environment variables for a restarted process, in addition to those of its predecessor.

        Args:
            worker: number of the worker.
            restart_count: how often the worker has been restarted, this time included.

        """
        settings = {"worker": worker, "fit": self.fit, "encrypted": self.encrypted, "restart_count": restart_count}
        return {JOIN_ENV: self.address, TOKEN_ENV: self.token, REJOIN_ENV: json.dumps(settings)}


class RestartSchedule:
    """Decides which dead workers of a run are restarted, and when. Logs each decision in one line.

    The schedule has no clock and starts no processes. The launcher passes the time in and starts what is due.

    Args:
        max_restarts: restarts of each worker.
        may_restart: asked before each restart. The answer is no if the server rejects the worker for the rest of the
            run.

    """

    def __init__(self, max_restarts: int, may_restart: MayRestart = always) -> None:
        self._max_restarts = max_restarts
        self._may_restart = may_restart
        self._restart_counts: dict[int, int] = {}
        self._started_at: dict[int, float] = {}
        self._restarts_in_a_row: dict[int, int] = {}
        self._due_at: dict[int, float] = {}

    def on_exit(self, worker: int, exit_code: int, now: float, error: str = "") -> bool:
        """Decide about a worker whose process has ended.

        Args:
            worker: number of the worker.
            exit_code: as in :attr:`subprocess.Popen.returncode`: negative for a signal.
            now: seconds on the launcher's clock.
            error: traceback, if it has not been printed yet.

        Returns:
            Whether the worker will be restarted.

        """
        how = describe_exit(exit_code)
        if exit_code == 0 or is_stop_signal(exit_code):
            _log.warning(
                "worker %d left with %s; not restarting it, training continues without it%s",
                worker, how, _quoted(error),
            )  # fmt: skip
            return False
        return self._schedule(worker, f"ended with {how}", now, error)

    def on_failed_start(self, worker: int, error: OSError, now: float) -> bool:
        """Decide about a worker whose process could not be started, for example for lack of memory.

        Args:
            worker: number of the worker.
            error: why the process could not be started.
            now: seconds on the launcher's clock.

        Returns:
            Whether there will be another attempt.

        """
        return self._schedule(worker, f"could not be started ({error})", now)

    def _schedule(self, worker: int, what: str, now: float, error: str = "") -> bool:
        count = self._restart_counts.get(worker, 0)
        if not self._may_restart(worker):
            _log.error(
                "worker %d %s; not restarting it, because the server rejects its pushes for the rest of the run%s",
                worker, what, _quoted(error),
            )  # fmt: skip
            return False
        if count >= self._max_restarts:
            _log.error(
                "worker %d %s; not restarting it again after %d restart(s) (max_restarts=%d), training continues "
                "without it%s", worker, what, count, self._max_restarts, _quoted(error),
            )  # fmt: skip
            return False
        if now - self._started_at.get(worker, now) >= _STABLE_SECONDS:
            self._restarts_in_a_row[worker] = 0
        in_a_row = self._restarts_in_a_row.get(worker, 0)
        delay = restart_delay(in_a_row)
        self._restarts_in_a_row[worker] = in_a_row + 1
        _log.warning(
            "worker %d %s; restarting it in %g s (restart %d of %d)%s",
            worker, what, delay, count + 1, self._max_restarts, _quoted(error),
        )  # fmt: skip
        self._due_at[worker] = now + delay
        return True

    def cancel(self) -> None:
        """Cancel all scheduled restarts."""
        self._due_at.clear()

    def next_due(self) -> float | None:
        """Return when the next restart is due, or None if no restart is scheduled."""
        return min(self._due_at.values(), default=None)

    def pop_due(self, now: float) -> dict[int, int]:
        """Remove and return the restarts that are due.

        Returns:
            For each worker to restart now: how often it has been restarted, this time included.

        """
        due = [worker for worker, at in self._due_at.items() if at <= now]
        for worker in due:
            del self._due_at[worker]
            self._restart_counts[worker] = self._restart_counts.get(worker, 0) + 1
            self._started_at[worker] = now
        return {worker: self._restart_counts[worker] for worker in due}


def _quoted(error: str) -> str:
    return f":\n{error.rstrip()}" if error else ""


def restart_delay(restarts: int) -> float:
    """Return the seconds to wait before the next restart of what has been restarted ``restarts`` times in a row."""
    return min(FIRST_DELAY * 2.0**restarts, _MAX_DELAY)


def is_stop_signal(exit_code: int) -> bool:
    """Return whether an exit code is that of a signal that asks processes to stop, such as SIGTERM.

    Programs that handle the signal n often end with the exit code 128 + n.
    """
    return (-exit_code if exit_code < 0 else exit_code - 128) in _STOP_SIGNALS


def describe_exit(exit_code: int) -> str:
    """Describe an exit code of :mod:`subprocess` or :mod:`multiprocessing`.

    Example::

        >>> describe_exit(1), describe_exit(-9), describe_exit(143)
        ('exit code 1', 'signal 9 (SIGKILL)', 'exit code 143 (SIGTERM)')

    """
    if exit_code >= 0:
        with suppress(ValueError):
            return f"exit code {exit_code} ({signal.Signals(exit_code - 128).name})"
        return f"exit code {exit_code}"
    try:
        return f"signal {-exit_code} ({signal.Signals(-exit_code).name})"
    except ValueError:
        return f"signal {-exit_code}"
