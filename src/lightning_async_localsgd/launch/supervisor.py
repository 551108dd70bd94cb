"""The command ``python -m lightning_async_localsgd train.py ARGS...``, which restarts a script whose rank 0 was killed.

No other rank can replace rank 0, which holds the global model. Its newest checkpoint is on disk, however, so the script
can be restarted and resume from there. The supervisor is a small process that imports neither torch nor Lightning. To
the shell, the container or the workload manager the supervisor is the job: it forwards signals to the script and exits
with the script's exit code.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from lightning_async_localsgd.launch.restarts import describe_exit, is_stop_signal, restart_delay
from lightning_async_localsgd.launch.run_name import RESUME_ENV, RUN_ENV, new_run_name

_FORWARDED_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

_STOP_TIMEOUT = 9.0
"""Seconds from a stop signal until the remaining processes of the script are killed."""

_FOLLOW_TIMEOUT = 3.0
"""Seconds that other ranks have to end by themselves after the script's first process was stopped."""

_SAVE_TIMEOUT = 10.0
"""Seconds that the remaining ranks have to save their state after rank 0 was killed."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main(arguments: Sequence[str] | None = None, prog: str = "python -m lightning_async_localsgd") -> int:
    """Run the command line.

    Args:
        arguments: arguments of the command; None uses those of this process.
        prog: the command's name in messages.

    Returns:
        The exit code.

    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Run a training script. If its first process is killed, restart it from the newest checkpoint of "
        "the run.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--max-restarts", type=int, default=3, metavar="N", help="how often to restart the script (default: 3)"
    )
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is a module, as in python -m")
    parser.add_argument("script", metavar="SCRIPT", help="the training script")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="arguments of the script")
    options = parser.parse_args(arguments)
    if options.max_restarts < 0:
        parser.error(f"--max-restarts={options.max_restarts} must be 0 or more")
    if (launcher := _other_launcher()) is not None:
        parser.error(
            f"this process is one of several ranks started by {launcher}, and one rank cannot be restarted by itself; "
            "start the script without this command, and let the launcher restart all ranks"
        )
    script = ["-m", options.script] if options.module else [options.script]
    return Supervisor([sys.executable, *script, *options.arguments], options.max_restarts).run()


def _other_launcher() -> str | None:
    """Return what has started this process as one of several ranks, judging by the environment."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    if "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return "srun"
    return "a launcher that sets LOCAL_RANK" if "LOCAL_RANK" in os.environ else None


class Supervisor:
    """Runs a command, and restarts the command when it is killed.

    The command is not restarted after an error of its own, which would only happen again, nor after a signal that asks
    processes to stop.

    Args:
        command: the command to run.
        max_restarts: how often to restart it.

    """

    def __init__(self, command: Sequence[str], max_restarts: int) -> None:
        self._command = command
        self._max_restarts = max_restarts
        self._job: subprocess.Popen[bytes] | None = None
        self._stop_requested_at: float | None = None

    def run(self) -> int:
        """Run the command to its end.

        Returns:
            The exit code of the command. For a command ended by signal n this is 128 + n, as in a shell.

        """
        _adopt_orphans()
        os.environ.setdefault(RUN_ENV, new_run_name())
        for signum in _FORWARDED_SIGNALS:
            signal.signal(signum, self._forward_signal)
        restarts = 0
        while True:
            code = self._run_once()
            killed = code < 0 and not is_stop_signal(code)
            if self._stop_requested_at is not None:
                deadline = self._stop_requested_at + _STOP_TIMEOUT
                self._wait_for_group(min(deadline, time.monotonic() + _FOLLOW_TIMEOUT))
                self._end_group(deadline)
            elif killed:
                # The other ranks save what they have when they lose rank 0. They must end before the next start.
                self._end_group(time.monotonic() + _SAVE_TIMEOUT)
            if not killed or self._stop_requested_at is not None:
                return code if code >= 0 else 128 - code
            if restarts >= self._max_restarts:
                _print(
                    f"the script ended with {describe_exit(code)}; not restarting it again after {restarts} restart(s) "
                    f"(--max-restarts={self._max_restarts})"
                )
                return 128 - code
            delay = restart_delay(restarts)
            restarts += 1
            _print(
                f"the script ended with {describe_exit(code)}; restarting it in {delay:g} s from the newest checkpoint "
                f"of run {os.environ[RUN_ENV]} (restart {restarts} of {self._max_restarts})"
            )
            if not self._sleep(delay):
                return 128 - code
            os.environ[RESUME_ENV] = "1"

    def _run_once(self) -> int:
        # In a session of its own: Ctrl+C in a terminal then reaches the script once, through this process. The session
        # also identifies the processes that are left when the first one has ended.
        job = self._job = subprocess.Popen(self._command, start_new_session=True, preexec_fn=_end_with_parent)
        if self._stop_requested_at is not None:  # The signal came just before the start.
            job.terminate()
        while (code := job.poll()) is None:
            time.sleep(0.05)
            if self._stop_requested_at is not None and time.monotonic() > self._stop_requested_at + _STOP_TIMEOUT:
                _print(f"the script is still running {_STOP_TIMEOUT:g} s after it was asked to stop; killing it")
                _kill_group(job.pid, signal.SIGKILL)
                return job.wait()
        return code

    def _forward_signal(self, signum: int, frame: FrameType | None) -> None:
        """Send a signal to the script's first process, which stops the other ranks."""
        if self._stop_requested_at is None and is_stop_signal(-signum):
            self._stop_requested_at = time.monotonic()
        # The number of a process that has ended and was waited for may belong to another process by now.
        if self._job is not None and self._job.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self._job.pid, signum)

    def _end_group(self, deadline: float) -> None:
        """End all processes of the script: ask them to stop, and kill them after the deadline."""
        assert self._job is not None
        _kill_group(self._job.pid, signal.SIGTERM)
        self._wait_for_group(deadline)
        _kill_group(self._job.pid, signal.SIGKILL)
        self._wait_for_group(time.monotonic() + _STOP_TIMEOUT)

    def _wait_for_group(self, deadline: float) -> None:
        assert self._job is not None
        while _group_exists(self._job.pid) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _sleep(self, seconds: float) -> bool:
        """Sleep, and return whether the job is to continue. Returns False at once on a stop signal."""
        deadline = time.monotonic() + seconds
        while self._stop_requested_at is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return self._stop_requested_at is None


def _kill_group(group: int, signum: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signum)


def _group_exists(group: int) -> bool:
    """Return whether a process of the group is running, after reaping orphans of the group that have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG) != (0, 0):
            pass
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # macOS, if only ended processes are left.
        return False
    return True


def _adopt_orphans() -> None:
    """Make orphaned descendants children of this process, where the system supports that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_with_parent() -> None:
    """Ask the system to send this new process SIGTERM when the supervisor dies, where the system supports that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def _print(text: str) -> None:
    with suppress(OSError):  # Ctrl+C may have ended the process that reads our output.
        print(f"lightning_async_localsgd: {text}", file=sys.stderr, flush=True)
