"""The rank processes of one start of a job with :mod:`multiprocessing`, seen from the process that launches them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch.multiprocessing.spawn import ProcessContext, start_processes

from lightning_async_localsgd.launch.children import EXIT_TIMEOUT, is_alive, terminate
from lightning_async_localsgd.launch.restarts import (
    JoinTicket,
    MayRestart,
    RestartSchedule,
    describe_exit,
    is_stop_signal,
)

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.1

_SAVE_TIMEOUT = 10.0
"""Seconds that ranks have to save their state after rank 0 was killed."""

_STOP_TIMEOUT = 6.0
"""Seconds that ranks have to end after SIGTERM, before they are killed."""

_ENV_PREFIX = "ASYNC_LOCALSGD_"


class RanksStoppedError(Exception):
    """The ranks were asked to stop and have ended without a result."""


class RankPipe:
    """A rank's two pipes to its launcher: for reports to the launcher, and for the launcher's questions to rank 0.

    Args:
        rank: local rank.
        reports: sends reports to the launcher. Each rank has its own pipe, so that no rank can die holding a lock that
            others need.
        questions: receives numbers of workers; sends back whether each may be restarted.

    """

    def __init__(self, rank: int, reports: Connection, questions: Connection) -> None:
        self.rank = rank
        self._reports = reports
        self._questions = questions
        self._ended: threading.Event | None = None
        self._thread: threading.Thread | None = None

    @property
    def has_joined(self) -> bool:
        """Whether this rank has joined the training, now or earlier."""
        return self._ended is not None

    def report_joined(self, ticket: JoinTicket, may_restart: MayRestart) -> None:
        """Report that this rank has joined the training, and answer the launcher's questions from now on."""
        self._report(ticket)
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._answer, args=(may_restart, self._ended), name="async_localsgd-restarts", daemon=True
        )
        self._thread.start()

    def report_ended(self) -> None:
        """Report that training has ended on this rank. May be called more than once."""
        if self._thread is not None:
            assert self._ended is not None
            self._ended.set()
            self._thread.join()
            self._thread = None
            self._report(None)

    def close(self) -> None:
        """Close this process's ends of the pipes."""
        self._reports.close()
        self._questions.close()

    def _report(self, ticket: JoinTicket | None) -> None:
        with suppress(OSError):  # The launcher has ended. This rank will be stopped by a signal.
            self._reports.send(ticket)

    def _answer(self, may_restart: MayRestart, ended: threading.Event) -> None:
        with suppress(OSError, EOFError):
            while not ended.is_set():
                if self._questions.poll(_POLL_SECONDS):
                    self._questions.send(may_restart(self._questions.recv()))


class RankProcesses:
    """Starts all ranks of this node, restarts dead workers, and waits for the last rank to end.

    Args:
        target: runs in each process, with these arguments: the process's place among those started together, their
            pipes, environment variables to set, a queue for the first rank's result, and ``arguments``.
        arguments: passed on to ``target``.
        method: start method of :mod:`multiprocessing`.
        ranks: number of ranks on this node.
        first_worker: worker number of the first rank.
        max_restarts: restarts of each worker.

    Attributes:
        started: whether training has begun.
        processes: the current process of each rank.

    """

    def __init__(
        self, target: Callable[..., None], arguments: Any, method: Any, ranks: int, first_worker: int, max_restarts: int
    ) -> None:
        self.started = False
        self.processes: list[Any] = []
        self._method = method
        self._context = multiprocessing.get_context(method)
        self._results = self._context.SimpleQueue()
        self._target = target
        self._arguments = (self._results, *arguments)
        self._ranks = ranks
        self._first_worker = first_worker
        self._reports: dict[int, Connection] = {}
        self._questions: dict[int, Connection] = {}
        self._ticket: JoinTicket | None = None
        self._restarts = RestartSchedule(max_restarts, self._may_restart)
        self._ended = False
        self._rejoining: set[int] = set()
        self._stop_requested_at: float | None = None

    def run(self) -> Any:
        """Start the ranks, attend to them until all have ended, and return the first rank's result.

        Raises:
            ProcessRaisedException, ProcessExitedException: from torch, for the rank that ends the job.
            RanksStoppedError: the ranks were asked to stop.

        """
        self._running = self._start(list(range(self._ranks)), {})
        self.processes[:] = self._running.processes
        try:
            with _handle_sigterm(self._stop):
                while self._running.sentinels or self._restarts.next_due() is not None:
                    self._handle_events()
        except BaseException:
            # Only this process was interrupted. The ranks would continue, and this process would wait for them at exit.
            terminate(self._running.processes, is_alive, _STOP_TIMEOUT)
            raise
        finally:
            for pipe in (*self._reports.values(), *self._questions.values()):
                pipe.close()
        # Without a result the first rank itself was asked to stop.
        if self._stop_requested_at is not None or self._results.empty():
            raise RanksStoppedError
        return self._results.get()

    def _start(self, ranks: list[int], variables: dict[str, str]) -> ProcessContext:
        pipes = []
        for rank in ranks:
            for ends in (self._reports, self._questions):
                if rank in ends:
                    ends[rank].close()
            self._reports[rank], reports = self._context.Pipe(duplex=False)
            self._questions[rank], questions = self._context.Pipe()
            pipes.append(RankPipe(rank, reports, questions))
        # A fork server has the environment of an earlier time, so our variables are passed on explicitly.
        ours = {name: value for name, value in os.environ.items() if name.startswith(_ENV_PREFIX)}
        started: ProcessContext = start_processes(  # type: ignore[no-untyped-call]
            self._target,
            args=(pipes, {**ours, **variables}, *self._arguments),
            nprocs=len(ranks),
            start_method=self._method,
            join=False,
        )
        for pipe in pipes:
            pipe.close()
        return started

    def _handle_events(self) -> None:
        """Wait for the next report, exit or due restart, and handle it."""
        running = self._running
        due = self._restarts.next_due()
        timeout = _POLL_SECONDS if due is None else max(0.0, min(_POLL_SECONDS, due - time.monotonic()))
        ready = connection.wait([*running.sentinels, *self._reports.values()], timeout)
        # Reports come first: a rank that has died may have reported something before.
        for rank, report in list(self._reports.items()):
            if report in ready:
                self._on_report(rank, report)
        for sentinel in list(running.sentinels):
            if sentinel in ready:
                self._reap(sentinel)
        for worker, restart_count in self._restarts.pop_due(time.monotonic()).items():
            if not self._ended:
                try:
                    self._restart(worker - self._first_worker, restart_count)
                except OSError as error:  # Memory or disk may be available again later.
                    self._restarts.on_failed_start(worker, error, time.monotonic())
        if self._stop_requested_at is not None and time.monotonic() > self._stop_requested_at + _STOP_TIMEOUT:
            for process in filter(is_alive, running.processes):
                process.kill()

    def _on_report(self, rank: int, report: Connection) -> None:
        try:
            ticket = report.recv()
        except (EOFError, OSError):
            del self._reports[rank]
            report.close()
            return
        if ticket is not None:
            self._ticket = ticket
            self._rejoining.discard(rank)
            self.started = self.started or rank == 0
        elif rank == 0:
            self._ended = True
            self._restarts.cancel()
            late = {late_rank: self._running.processes[late_rank] for late_rank in self._rejoining}
            late = {late_rank: process for late_rank, process in late.items() if process.is_alive()}
            for late_rank in late:
                _log.warning("local rank %d was restarted too late to rejoin; stopping its process", late_rank)
            terminate(list(late.values()), is_alive)

    def _reap(self, sentinel: int) -> None:
        """Handle the end of a rank's process."""
        rank = self._running.sentinels.pop(sentinel)
        process = self._running.processes[rank]
        process.join()
        code = process.exitcode
        assert code is not None
        if self._stop_requested_at is not None:
            return  # The exit code of a stopped process does not matter.
        if code > 0 and rank == 0 and is_stop_signal(code):
            code = 0  # It has handled the signal, and has ended in order.
        if code != 0 and (rank == 0 or not self.started):
            # If rank 0 was killed during training, the other ranks need time to save what they have.
            timeout = _SAVE_TIMEOUT if self.started and code < 0 else EXIT_TIMEOUT
            terminate([other for other in self._running.processes if other is not process], is_alive, timeout)
            self._running.sentinels.clear()
            self._running.sentinels[sentinel] = rank
            self._running.join()  # Raises the exception of this rank.
        elif rank == 0:
            self._ended = True
            self._restarts.cancel()
        elif not self.started:
            pass  # Nothing trains: another call than fit is over on this rank.
        elif not self._ended:
            self._restarts.on_exit(self._first_worker + rank, code, time.monotonic(), self._traceback(rank))
        elif code != 0 and rank not in self._rejoining:
            _log.error(
                "the process of local rank %d ended with %s after training\n%s",
                rank, describe_exit(code), self._traceback(rank),
            )  # fmt: skip

    def _stop(self) -> None:
        """Ask the ranks to stop. Called in a signal handler, when this process was asked to stop."""
        if self._stop_requested_at is None:
            self._stop_requested_at = time.monotonic()
            self._ended = True
            for process in self._running.processes:
                if process.is_alive():
                    process.terminate()

    def _restart(self, rank: int, restart_count: int) -> None:
        assert self._ticket is not None
        started = self._start([rank], self._ticket.variables(self._first_worker + rank, restart_count))
        [process], [error_file] = started.processes, started.error_files
        self._rejoining.add(rank)
        self.processes[rank] = self._running.processes[rank] = process
        self._running.error_files[rank] = error_file
        self._running.sentinels[process.sentinel] = rank

    def _may_restart(self, worker: int) -> bool:
        """Ask rank 0, which knows what the server accepts.

        If rank 0 is on another node or does not answer, the worker is restarted. The server then answers the worker
        itself.
        """
        questions = self._questions.get(0)
        with suppress(OSError, EOFError):
            if questions is not None:
                questions.send(worker)
                if questions.poll(EXIT_TIMEOUT):
                    return bool(questions.recv())
                del self._questions[0]  # A late answer would be taken for that to the next question.
                questions.close()
        return True

    def _traceback(self, rank: int) -> str:
        """Return the traceback that the rank's process has left, if any."""
        error_file = self._running.error_files[rank]
        if not os.access(error_file, os.R_OK):
            return ""
        with open(error_file, "rb") as file:
            return str(pickle.load(file))


_handler: Any = None
_previous_handler: Any = signal.SIG_DFL
"""The process's SIGTERM handler while its ranks run, and the one before. Forked ranks inherit both variables."""


@contextmanager
def _handle_sigterm(function: Callable[[], None]) -> Iterator[None]:
    """Call ``function`` on SIGTERM, before the previous handler. Has no effect outside the main thread."""
    global _handler, _previous_handler

    def handle(signum: int, frame: FrameType | None) -> None:
        function()
        if callable(previous):
            previous(signum, frame)

    if threading.current_thread() is not threading.main_thread():  # Only the main thread may set signal handlers.
        yield
        return
    previous = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    _handler, _previous_handler = handle, previous
    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        _handler = None
        signal.signal(signal.SIGTERM, previous)


def restore_sigterm_handler() -> None:
    """Restore the previous SIGTERM handler in a forked rank, which has inherited the launcher's handler."""
    if _handler is not None and signal.getsignal(signal.SIGTERM) is _handler:
        signal.signal(signal.SIGTERM, _previous_handler)
