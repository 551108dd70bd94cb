"""``python -m lightning_async_localsgd train.py ARGS...``: a training that outlives the death of its rank 0.

Nobody can take the place of rank 0, which holds the global model. But its newest checkpoint is on disk, so the whole
script can be started again and go on from there. This small process, which imports neither torch nor Lightning, does
that. To the shell, the container or the workload manager it is the job: it passes signals on, and ends with its exit
code.
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

from lightning_async_localsgd.joining import RUN
from lightning_async_localsgd.restarts import RESUME, in_words, is_wish_to_end, new_name, pause_before

_PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

_SECONDS_TO_END = 9.0
"""After the job was asked to end; what is left of it then is killed."""

_SECONDS_TO_FOLLOW = 3.0
"""After the job's first process has ended as it was asked to; its other ranks should not need to be asked."""

_SECONDS_TO_SAVE = 10.0
"""For what is left of a job whose rank 0 was killed."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line.

    Args:
        arguments: of the command; None takes those of this process.

    Returns:
        The exit code.

    """
    parser = argparse.ArgumentParser(
        prog="python -m lightning_async_localsgd",
        description="Runs a training script, and starts it again when its first process is killed: it then goes on "
        "from the newest checkpoint of the run.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--max-restarts", type=int, default=3, metavar="N", help="how often the script is started again (default: 3)"
    )
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is a module, as in python -m")
    parser.add_argument("script", metavar="SCRIPT", help="the training script")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="its own arguments")
    options = parser.parse_args(arguments)
    if options.max_restarts < 0:
        parser.error(f"--max-restarts={options.max_restarts} must be 0 or more")
    if (other := _other_launcher()) is not None:
        parser.error(
            f"this process is one of several that were started by {other}, which would not know that one was started "
            "again: start the script itself, and let all of its processes be started again"
        )
    script = ["-m", options.script] if options.module else [options.script]
    return Supervisor([sys.executable, *script, *options.arguments], options.max_restarts).run()


def _other_launcher() -> str | None:
    """What has started this process as one rank of several, by the variables that it sets."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    if "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return "srun"
    return "a launcher that sets LOCAL_RANK" if "LOCAL_RANK" in os.environ else None


class Supervisor:
    """Starts a command, and starts it again when it is killed.

    An error of the script itself would only come again, and whoever sends a signal that asks a process to end wants it
    to end: in both cases the job is over.

    Args:
        command: what to start.
        max_restarts: how often to start it again.

    """

    def __init__(self, command: Sequence[str], max_restarts: int) -> None:
        self._command = command
        self._max_restarts = max_restarts
        self._job: subprocess.Popen[bytes] | None = None
        self._asked_at: float | None = None

    def run(self) -> int:
        """Returns the exit code when the job is over; that of a signal is 128 and its number, as shells have it."""
        _be_parent_of_orphans()
        os.environ.setdefault(RUN, new_name())
        for signum in _PASSED_ON:
            signal.signal(signum, self._pass_on)
        restarts = 0
        while True:
            code = self._run_once()
            killed = code < 0 and not is_wish_to_end(code)
            if self._asked_at is not None:
                until = self._asked_at + _SECONDS_TO_END
                self._await_rest(min(until, time.monotonic() + _SECONDS_TO_FOLLOW))
                self._end_rest(until)
            elif killed:
                # The other ranks have lost rank 0: they save what they have, and the next start must not meet them.
                self._end_rest(time.monotonic() + _SECONDS_TO_SAVE)
            if not killed or self._asked_at is not None:
                return code if code >= 0 else 128 - code
            if restarts >= self._max_restarts:
                _say(f"the job was ended by {in_words(code)}; --max-restarts={self._max_restarts} is used up")
                return 128 - code
            pause = pause_before(restarts)
            restarts += 1
            _say(
                f"the job was ended by {in_words(code)}; it is started again in {pause:g} s, to go on from the newest "
                f"checkpoint of {os.environ[RUN]} (restart {restarts} of {self._max_restarts})"
            )
            if not self._sleep(pause):
                return 128 - code
            os.environ[RESUME] = "1"

    def _run_once(self) -> int:
        # A session of its own: a terminal's Ctrl+C reaches it once, through this process, and what is left of it
        # afterwards is known by its number.
        job = self._job = subprocess.Popen(self._command, start_new_session=True, preexec_fn=_end_with_parent)
        if self._asked_at is not None:  # In the moment before.
            job.terminate()
        while (code := job.poll()) is None:
            time.sleep(0.05)
            if self._asked_at is not None and time.monotonic() > self._asked_at + _SECONDS_TO_END:
                _say(f"the job has not ended {_SECONDS_TO_END:g} s after it was asked to; it is killed")
                _kill_group(job.pid, signal.SIGKILL)
                return job.wait()
        return code

    def _pass_on(self, signum: int, frame: FrameType | None) -> None:
        """Only to the first process: it tells the others what they should know."""
        if self._asked_at is None and is_wish_to_end(-signum):
            self._asked_at = time.monotonic()
        # A process that has ended and was waited for may have lent its number to another one.
        if self._job is not None and self._job.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self._job.pid, signum)

    def _end_rest(self, until: float) -> None:
        assert self._job is not None
        _kill_group(self._job.pid, signal.SIGTERM)
        self._await_rest(until)
        _kill_group(self._job.pid, signal.SIGKILL)
        self._await_rest(time.monotonic() + _SECONDS_TO_END)

    def _await_rest(self, until: float) -> None:
        assert self._job is not None
        while _exists(self._job.pid) and time.monotonic() < until:
            time.sleep(0.05)

    def _sleep(self, seconds: float) -> bool:
        """Returns False at once if somebody wants the job to end meanwhile."""
        until = time.monotonic() + seconds
        while self._asked_at is None and time.monotonic() < until:
            time.sleep(0.05)
        return self._asked_at is None


def _kill_group(group: int, signum: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signum)


def _exists(group: int) -> bool:
    """Whether a process of the group is there. Those that have ended, and whose parent has, are buried first."""
    with suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG) != (0, 0):
            pass
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # macOS: only ended ones are left.
        return False
    return True


def _be_parent_of_orphans() -> None:
    """Processes whose parent dies become this one's children, where the system has that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_with_parent() -> None:
    """In the new process: if the supervisor dies, the job is asked to end, where the system has that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def _say(text: str) -> None:
    with suppress(OSError):  # Ctrl+C may have ended the one at the other end of a pipe.
        print(f"lightning_async_localsgd: {text}", file=sys.stderr, flush=True)
