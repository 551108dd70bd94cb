"""Processes that this process has launched as other ranks of the same script."""

from __future__ import annotations

import logging
import os
import select
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lightning_async_localsgd.launch.restarts import describe_exit
from lightning_async_localsgd.launch.uncaught import FollowingError

_log = logging.getLogger(__name__)

EXIT_TIMEOUT = 3.0
"""Seconds for processes to notice that the job has failed, and again to react to SIGTERM."""

_JOINED_PIPE_ENV = "ASYNC_LOCALSGD_JOINED_PIPE"
"""Environment variable of a restarted process: ``<file descriptor>:<pid of its launcher>``. The process writes to the
pipe when it has joined the training, or why it cannot."""

_JOINED = b"!"
"""Report of a process that has joined."""

_MAX_REPORT = 4096
"""Longest report of a process that cannot join, in bytes. A pipe takes it without waiting for a reader."""


@dataclass
class Child:
    """The current process of a rank, and how to start it again.

    Attributes:
        process: the current process.
        command: the script with its arguments and interpreter.
        environment: environment of the rank's first process.
        folder: working directory.

    """

    process: subprocess.Popen[Any]
    command: Sequence[str]
    environment: Mapping[str, str]
    folder: str
    _joined_pipe: int | None = None

    @property
    def rejoining(self) -> bool:
        """Whether the process was restarted and has not joined the training yet."""
        return self._joined_pipe is not None and not _is_readable(self._joined_pipe)

    def restart(self, variables: Mapping[str, str]) -> None:
        """Start a new process for the rank, whose process has ended.

        Args:
            variables: environment variables in addition to those of the first process.

        """
        process, reader = start_joining(self.command, {**self.environment, **variables}, self.folder)
        self.close_pipe()
        self._joined_pipe = reader
        self.process = process

    def close_pipe(self) -> None:
        """Stop listening for the process to join, because training is over."""
        if self._joined_pipe is not None:
            os.close(self._joined_pipe)
            self._joined_pipe = None


def start_joining(
    command: Sequence[str], environment: Mapping[str, str], folder: str
) -> tuple[subprocess.Popen[Any], int]:
    """Start a process that joins the training, and that ends if this process ends before.

    Returns:
        The process, and the end of a pipe that can be read once the process has joined.

    """
    reader, writer = os.pipe()
    try:
        process = subprocess.Popen(
            command,
            env={**environment, _JOINED_PIPE_ENV: f"{writer}:{os.getpid()}"},
            cwd=folder,
            pass_fds=(writer,),
        )
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    return process, reader


children: dict[int, Child] = {}
"""Launched processes by local rank. They outlive the Trainer that launched them: the next Trainer of the script uses
them again, because every process runs the same script and reaches the same place."""


def _is_readable(descriptor: int) -> bool:
    poll = select.poll()  # select.select() fails for descriptors above 1023.
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def raise_if_process_ended() -> None:
    """Raise if a launched process has ended. Call this while waiting for all ranks: the wait would never end.

    Raises:
        FollowingError: names the rank and its exit code.

    """
    for local_rank, child in children.items():
        code = child.process.poll()
        if code is not None:
            raise FollowingError(
                f"the process of local rank {local_rank} (pid {child.process.pid}) ended with {describe_exit(code)}, "
                "but this step needs all ranks; see its output above"
            )


def ended_ranks() -> set[int]:
    """Return the ranks that rank 0 has launched and whose processes have ended, with any exit code.

    These ranks are on rank 0's node, where local and global ranks are equal.
    """
    return {rank for rank, child in children.items() if child.process.poll() is not None}


def report_joined() -> None:
    """Report to the launcher that this process has joined the training."""
    _report(_JOINED)


def report_failure(reason: str) -> None:
    """Report to the launcher why this process cannot join the training. Does nothing once it has joined."""
    _report(reason.encode(errors="replace")[:_MAX_REPORT])


def read_report(pipe: int) -> str:
    """Return why a process that has ended could not join; empty if it has joined, or did not say why."""
    report = os.read(pipe, _MAX_REPORT) if _is_readable(pipe) else b""
    return "" if report == _JOINED else report.decode(errors="replace")


def _report(data: bytes) -> None:
    pipe = os.environ.pop(_JOINED_PIPE_ENV, None)
    if pipe is not None:
        writer = int(pipe.partition(":")[0])
        with suppress(OSError):  # The launcher has ended, or has closed the pipe after training.
            os.write(writer, data)
        os.close(writer)


def exit_with_launcher_until_joined() -> None:
    """End this restarted process if its launcher ends before this process has joined the training.

    Without its launcher, the process would wait for the server without end. After joining, it detects the loss of the
    server like any other worker.
    """
    if _JOINED_PIPE_ENV in os.environ:
        launcher = int(os.environ[_JOINED_PIPE_ENV].partition(":")[2])
        threading.Thread(target=_watch_launcher, args=(launcher,), name="async_localsgd-parent", daemon=True).start()


def _watch_launcher(launcher: int) -> None:
    while _JOINED_PIPE_ENV in os.environ:
        if os.getppid() != launcher:
            _log.error("process %d, which restarted this one, has ended; exiting", launcher)
            os._exit(1)  # Nothing has been trained yet, so there is nothing to save.
        time.sleep(0.2)


def is_running(process: subprocess.Popen[Any]) -> bool:
    """Return whether a process of :mod:`subprocess` is running, for :func:`terminate`."""
    return process.poll() is None


def is_alive(process: Any) -> bool:
    """Return whether a process of :mod:`multiprocessing` is running, for :func:`terminate`."""
    return bool(process.is_alive())


def wait_until(condition: Callable[[], bool], timeout: float = EXIT_TIMEOUT) -> None:
    """Wait until the condition holds, for at most ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def terminate(processes: Sequence[Any], running: Callable[[Any], bool], timeout: float = EXIT_TIMEOUT) -> None:
    """Send SIGTERM to the processes, wait up to ``timeout`` seconds, then kill those that are still running."""
    try:
        for process in filter(running, processes):
            process.terminate()
        wait_until(lambda: not any(map(running, processes)), timeout)
    finally:
        for process in filter(running, processes):
            process.kill()
