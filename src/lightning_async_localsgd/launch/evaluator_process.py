"""The evaluator's process on the host of rank 0, which runs the script once more."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.launch.children import (
    is_running,
    read_report,
    start_joining,
    terminate,
    wait_until,
)
from lightning_async_localsgd.launch.joining import ROLE_ENV
from lightning_async_localsgd.launch.restarts import describe_exit
from lightning_async_localsgd.protocol.messages import EVALUATOR

if TYPE_CHECKING:
    import subprocess

    from lightning_async_localsgd.launch.restarts import JoinTicket


_OF_RANKS = ("GLOBAL_RANK", "GROUP_", "LOCAL_WORLD_SIZE", "RANK", "ROLE_", "SLURM_", "TORCHELASTIC_", "WORLD_SIZE")
"""Beginnings of variables that say which rank of a job a process is. The evaluator is not a rank."""


class EvaluatorProcess:
    """Starts the evaluator, and ends it with the run.

    Args:
        command: the script with its arguments and interpreter.
        folder: working directory.

    """

    def __init__(self, command: Sequence[str], folder: str) -> None:
        self._command = command
        self._folder = folder
        self._process: subprocess.Popen[Any] | None = None
        self._joined_pipe: int | None = None

    def start(self, ticket: JoinTicket) -> None:
        """Start the process, which joins the run with ``ticket``."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_OF_RANKS)}
        own = {ROLE_ENV: "evaluator", "LOCAL_RANK": "0", "NODE_RANK": "0"}
        environment = {**kept, **ticket.variables(EVALUATOR, 0), **own}
        self._process, self._joined_pipe = start_joining(self._command, environment, self._folder)

    def raise_if_ended(self) -> None:
        """Raise if the process has ended. Call this while waiting for the evaluator to join.

        Raises:
            RuntimeError: The process has ended. The text names the host, the exit code, and the reason if it is known.

        """
        if self._process is not None and (code := self._process.poll()) is not None:
            reason = "" if self._joined_pipe is None else read_report(self._joined_pipe)
            raise RuntimeError(
                f"the evaluator on host {socket.gethostname()} (pid {self._process.pid}) ended with "
                f"{describe_exit(code)} before training: {reason or 'see its output above'}"
            )

    def end(self) -> None:
        """End the process. It has some time to end by itself. May be called twice."""
        process, self._process = self._process, None
        if self._joined_pipe is not None:
            os.close(self._joined_pipe)
            self._joined_pipe = None
        if process is not None:
            wait_until(lambda: not is_running(process))
            terminate([process], is_running)
