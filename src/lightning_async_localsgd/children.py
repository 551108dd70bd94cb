"""The processes that this one has launched as other ranks of the same script."""

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

from lightning_async_localsgd.restarts import in_words

_log = logging.getLogger(__name__)

PATIENCE = 3.0
"""Seconds that processes get to notice that the job has failed, and again to react to SIGTERM."""

_TELL = "ASYNC_LOCALSGD_TELL"
"""Tells a process that was started again where to say that it has joined (the number of a pipe's end), and to whom."""


@dataclass
class Child:
    """A rank's newest process, and how it was started.

    Attributes:
        process: it.
        command: the script with its arguments, and what runs it.
        environment: of its first process.
        folder: the working directory.

    """

    process: subprocess.Popen[Any]
    command: Sequence[str]
    environment: Mapping[str, str]
    folder: str
    _told: int | None = None

    @property
    def booting(self) -> bool:
        """Whether it was started again and has not joined yet."""
        return self._told is not None and not _is_readable(self._told)

    def start_again(self, variables: Mapping[str, str]) -> None:
        """Replaces the process, which has ended, by a new one.

        Args:
            variables: for its environment, in addition to those of the first.

        """
        told, tell = os.pipe()
        try:
            process = subprocess.Popen(
                self.command,
                env={**self.environment, **variables, _TELL: f"{tell}:{os.getpid()}"},
                cwd=self.folder,
                pass_fds=(tell,),
            )
        except BaseException:
            os.close(told)
            raise
        finally:
            os.close(tell)
        self.forget_pipe()
        self._told = told
        self.process = process

    def forget_pipe(self) -> None:
        """The run is over: whether it has joined does not matter any more."""
        if self._told is not None:
            os.close(self._told)
            self._told = None


children: dict[int, Child] = {}
"""By local rank. They outlive the Trainer they were launched for: the next one in the same script finds them at the
same place of the script."""


def _is_readable(descriptor: int) -> bool:
    poll = select.poll()  # select.select() knows only the first thousand of a process's descriptors.
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def raise_if_process_ended() -> None:
    """For whoever waits for all ranks: a launched process that has ended will never come.

    Raises:
        RuntimeError: names the rank and its exit code.

    """
    for local_rank, child in children.items():
        code = child.process.poll()
        if code is not None:
            raise RuntimeError(
                f"the process of local rank {local_rank} (pid {child.process.pid}) has ended with {in_words(code)}, "
                "but all ranks are needed here; see what it printed above"
            )


def ended_ranks() -> set[int]:
    """The ranks whose processes this one, rank 0, has launched and that have ended, however they did.

    They are of its own node, the first, where local and global ranks are the same.
    """
    return {rank for rank, child in children.items() if child.process.poll() is not None}


def tell_joined() -> None:
    """Tells the process that has started this one again that it has joined the training."""
    told = os.environ.pop(_TELL, None)
    if told is not None:
        tell = int(told.partition(":")[0])
        with suppress(OSError):  # It has ended, or does not want to know any more.
            os.write(tell, b"!")
        os.close(tell)


def end_with_parent_until_joined() -> None:
    """A process that was started again would look for the server in vain when the one that started it has ended.

    Later on it is a worker like any other, and finds out by itself.
    """
    if _TELL in os.environ:
        parent = int(os.environ[_TELL].partition(":")[2])
        threading.Thread(target=_watch_parent, args=(parent,), name="async_localsgd-parent", daemon=True).start()


def _watch_parent(parent: int) -> None:
    while _TELL in os.environ:
        if os.getppid() != parent:
            _log.error("process %d, which has started this one again, has ended; this one ends, too", parent)
            os._exit(1)  # Nothing to save, nobody to tell.
        time.sleep(0.2)


def is_running(process: subprocess.Popen[Any]) -> bool:
    """For :func:`end`, of processes of :mod:`subprocess`."""
    return process.poll() is None


def is_alive(process: Any) -> bool:
    """For :func:`end`, of processes of :mod:`multiprocessing`."""
    return bool(process.is_alive())


def await_for(condition: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Returns when the condition holds, or after ``patience`` seconds."""
    until = time.monotonic() + patience
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)


def end(processes: Sequence[Any], running: Callable[[Any], bool], patience: float = PATIENCE) -> None:
    """Asks the processes to end, waits a while, and ends those that do not."""
    try:
        for process in filter(running, processes):
            process.terminate()
        await_for(lambda: not any(map(running, processes)), patience)
    finally:
        for process in filter(running, processes):
            process.kill()
