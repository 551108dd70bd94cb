"""One life of all ranks that are started with :mod:`multiprocessing`, seen from the process that has started them."""

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

from lightning.pytorch.strategies.launchers.multiprocessing import _GlobalStateSnapshot
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.multiprocessing.spawn import ProcessContext, start_processes

from lightning_async_localsgd.children import PATIENCE, end, is_alive
from lightning_async_localsgd.restarts import JoinTicket, MayRestart, Restarts, in_words

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.1
"""Between two looks at whether a question has come."""

_SAVING_SECONDS = 10.0
"""For ranks that have lost rank 0 to save what they can."""

_SECONDS_TO_END = 6.0
"""After SIGTERM; ranks that are left then are killed."""

_OWN_VARIABLES = "ASYNC_LOCALSGD_"


class RankLine:
    """What a rank tells the process that has launched it, and what that one asks rank 0.

    Args:
        rank: the local rank.
        reports: where it tells; everybody has a pipe of their own, so that nobody can die with its lock.
        questions: numbers of workers come in, whether they may come back goes out.

    """

    def __init__(self, rank: int, reports: Connection, questions: Connection) -> None:
        self.rank = rank
        self._reports = reports
        self._questions = questions
        self._over: threading.Event | None = None
        self._thread: threading.Thread | None = None

    def started(self, ticket: JoinTicket, may_restart: MayRestart) -> None:
        """This rank has joined."""
        self._tell(ticket)
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=self._answer, args=(may_restart, self._over), name="async_localsgd-restarts", daemon=True
        )
        self._thread.start()

    def ended(self) -> None:
        """Training has ended on this rank."""
        if self._thread is not None:
            assert self._over is not None
            self._over.set()
            self._thread.join()
            self._thread = None
            self._tell(None)

    def close(self) -> None:
        """Closes this process's copies of the ends."""
        self._reports.close()
        self._questions.close()

    def _tell(self, word: JoinTicket | None) -> None:
        with suppress(OSError):  # The one that has launched this rank has ended; it will hear of it by a signal.
            self._reports.send(word)

    def _answer(self, may_restart: MayRestart, over: threading.Event) -> None:
        with suppress(OSError, EOFError):
            while not over.is_set():
                if self._questions.poll(_LOOK_SECONDS):
                    self._questions.send(may_restart(self._questions.recv()))


class Job:
    """All ranks of this node, from their common start to the end of the last one.

    Args:
        target: run in each of them, with its place among those started together, their lines, variables for its
            environment, ``arguments``, a queue for what the first one comes to, and the state of global things.
        arguments: see there.
        method: see :mod:`multiprocessing`.
        ranks: how many.
        first: number of the first one's worker.
        max_restarts: of each worker.

    Attributes:
        started: whether training has begun.
        processes: the newest process of each rank.

    """

    def __init__(
        self, target: Callable[..., None], arguments: Any, method: Any, ranks: int, first: int, max_restarts: int
    ) -> None:
        self.started = False
        self.processes: list[Any] = []
        self._method = method
        self._context = multiprocessing.get_context(method)
        self._results = self._context.SimpleQueue()
        states = _GlobalStateSnapshot.capture() if method == "spawn" else None
        self._target = target
        self._arguments = (*arguments, self._results, states)
        self._ranks = ranks
        self._first = first
        self._reports: dict[int, Connection] = {}
        self._questions: dict[int, Connection] = {}
        self._ticket: JoinTicket | None = None
        self._restarts = Restarts(max_restarts, self._may_restart)
        self._over = False
        self._booting: set[int] = set()
        self._asked_at: float | None = None

    def run(self) -> Any:
        """Starts the ranks, attends to them until they have ended, and returns what the first one came to.

        Raises:
            ProcessRaisedException, ProcessExitedException: from torch, for the rank that ends the job.

        """
        self._processes = self._start(list(range(self._ranks)), {})
        self.processes[:] = self._processes.processes
        try:
            with _sigterm_handled_by(self._pass_on):
                while self._processes.sentinels or self._restarts.next_due() is not None:
                    self._attend()
        except BaseException:
            # An interrupt of this process alone; the ranks would go on, and it would wait for them when it exits.
            end(self._processes.processes, is_alive, _SECONDS_TO_END)
            raise
        finally:
            for pipe in (*self._reports.values(), *self._questions.values()):
                pipe.close()
        if self._asked_at is not None or self._results.empty():
            raise SIGTERMException  # The first rank alone may have been asked to end, too: it then comes to nothing.
        return self._results.get()

    def _start(self, ranks: list[int], variables: dict[str, str]) -> ProcessContext:
        lines = []
        for rank in ranks:
            for ends in (self._reports, self._questions):
                if rank in ends:
                    ends[rank].close()
            self._reports[rank], reports = self._context.Pipe(duplex=False)
            self._questions[rank], questions = self._context.Pipe()
            lines.append(RankLine(rank, reports, questions))
        # A fork server has an older environment than this process.
        own = {name: value for name, value in os.environ.items() if name.startswith(_OWN_VARIABLES)}
        started: ProcessContext = start_processes(  # type: ignore[no-untyped-call]
            self._target,
            args=(lines, {**own, **variables}, *self._arguments),
            nprocs=len(ranks),
            start_method=self._method,
            join=False,
        )
        for line in lines:
            line.close()
        return started

    def _attend(self) -> None:
        """Waits for the next thing to happen, and does what follows from it."""
        processes = self._processes
        due = self._restarts.next_due()
        timeout = _LOOK_SECONDS if due is None else max(0.0, min(_LOOK_SECONDS, due - time.monotonic()))
        ready = connection.wait([*processes.sentinels, *self._reports.values()], timeout)
        # In this order: a rank that has died may have told something before.
        for rank, report in list(self._reports.items()):
            if report in ready:
                self._hear(rank, report)
        for sentinel in list(processes.sentinels):
            if sentinel in ready:
                self._bury(sentinel)
        for worker, life in self._restarts.take_due(time.monotonic()).items():
            if not self._over:
                try:
                    self._start_again(worker - self._first, life)
                except OSError as error:  # Of memory or disk there may be more in a while.
                    self._restarts.died(worker, 1, time.monotonic(), f"it could not be started: {error}")
        if self._asked_at is not None and time.monotonic() > self._asked_at + _SECONDS_TO_END:
            for process in filter(is_alive, processes.processes):
                process.kill()

    def _hear(self, rank: int, report: Connection) -> None:
        try:
            word = report.recv()
        except (EOFError, OSError):
            del self._reports[rank]
            report.close()
            return
        if word is not None:
            self._ticket = word
            self._booting.discard(rank)
            self.started = self.started or rank == 0
        elif rank == 0:
            self._over = True
            self._restarts.cancel()
            late = {one: self._processes.processes[one] for one in self._booting}
            late = {one: process for one, process in late.items() if process.is_alive()}
            for one in late:
                _log.warning("the process of local rank %d was started again too late to join; it is ended", one)
            end(list(late.values()), is_alive)

    def _bury(self, sentinel: int) -> None:
        rank = self._processes.sentinels.pop(sentinel)
        process = self._processes.processes[rank]
        process.join()
        code = process.exitcode
        assert code is not None
        if self._asked_at is not None:
            return  # It was to end, however it did.
        if code != 0 and (rank == 0 or not self.started):
            # After the death of rank 0, the others are to save what they have.
            patience = _SAVING_SECONDS if self.started and code < 0 else PATIENCE
            end([one for one in self._processes.processes if one is not process], is_alive, patience)
            self._processes.sentinels.clear()
            self._processes.sentinels[sentinel] = rank
            self._processes.join()  # Raises this one's exception.
        elif rank == 0:
            self._over = True
            self._restarts.cancel()
        elif not self._over:
            self._restarts.died(self._first + rank, code, time.monotonic(), self._error(rank))
        elif code != 0 and rank not in self._booting:
            _log.error("the process of local rank %d ended with %s\n%s", rank, in_words(code), self._error(rank))

    def _pass_on(self) -> None:
        """In a signal handler: this process was asked to end, and so are the ranks."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self._over = True
            for process in self._processes.processes:
                if process.is_alive():
                    process.terminate()

    def _start_again(self, rank: int, life: int) -> None:
        assert self._ticket is not None
        again = self._start([rank], self._ticket.variables(self._first + rank, life))
        [process], [error_file] = again.processes, again.error_files
        self._booting.add(rank)
        self.processes[rank] = self._processes.processes[rank] = process
        self._processes.error_files[rank] = error_file
        self._processes.sentinels[process.sentinel] = rank

    def _may_restart(self, worker: int) -> bool:
        """Rank 0 knows; where it is on another node, or does not answer, the server will tell the worker itself."""
        questions = self._questions.get(0)
        with suppress(OSError, EOFError):
            if questions is not None:
                questions.send(worker)
                if questions.poll(PATIENCE):
                    return bool(questions.recv())
                del self._questions[0]  # The late answer would be taken for another one's.
                questions.close()
        return True

    def _error(self, rank: int) -> str:
        """The traceback that the rank's process has left."""
        error_file = self._processes.error_files[rank]
        if not os.access(error_file, os.R_OK):
            return ""
        with open(error_file, "rb") as file:
            return str(pickle.load(file))


_handler: Any = None
_before: Any = signal.SIG_DFL
"""What SIGTERM does in this process while a job runs, and what it did before. Forked ranks begin with copies."""


@contextmanager
def _sigterm_handled_by(function: Callable[[], None]) -> Iterator[None]:
    """Calls ``function`` when SIGTERM comes, if the process is at liberty to say so: only its main thread is."""
    global _handler, _before

    def handle(signum: int, frame: FrameType | None) -> None:
        function()
        if callable(before):
            before(signum, frame)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    _handler, _before = handle, before
    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        _handler = None
        signal.signal(signal.SIGTERM, before)


def handle_sigterm_as_before() -> None:
    """In a rank's process, which may be a copy of the one that has started it."""
    if _handler is not None and signal.getsignal(signal.SIGTERM) is _handler:
        signal.signal(signal.SIGTERM, _before)
