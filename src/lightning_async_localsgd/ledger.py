"""What a run's server tells, as lines of JSON in a file: its ledger of pushes, or the log of all its events.

The server's thread only hands the lines over; a thread of the ledger's own writes them, so that no disk holds up
merging, however slow it is. Each line is with the operating system as soon as it is written: a killed process loses
those of the last moment, and no more.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import threading
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_async_localsgd.events import Event
    from lightning_async_localsgd.records import Settled

_log = logging.getLogger(__name__)

_MOST_WAITING = 100_000
"""A disk that takes nothing more must not fill the memory."""

_CLOSING_SECONDS = 30.0
"""Nor must it keep the run from ending."""


class Ledger:
    """Appends to a file, one line for each :class:`.Settled` push or :class:`.Event`, with its fields as they are.

    Args:
        path: of the file, which is made with mode 0600, as its folder is, if it is not there.
        what: what it is, for messages.
        lines: what it has a line for each of, likewise.

    Raises:
        OSError: it cannot be written.

    """

    def __init__(self, path: str | os.PathLike[str], what: str = "ledger", lines: str = "pushes") -> None:
        self._path = Path(path)
        self._what = what
        self._of = lines
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._open()
        self._lost = 0
        self._failure: OSError | None = None
        self._lines: queue.Queue[Settled | Event | None] = queue.Queue(_MOST_WAITING)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="async_localsgd-ledger", daemon=True)
        self._thread.start()

    def write(self, entry: Settled | Event) -> None:
        """Has a line written, without waiting for it. After :meth:`close` nothing is."""
        if self._closing.is_set():
            return
        try:
            self._lines.put_nowait(entry)
        except queue.Full:
            self._lost += 1

    def close(self) -> None:
        """Waits until everything is written. May be called twice."""
        if not self._thread.is_alive():
            return
        self._closing.set()
        # Wakes a thread that waits for lines. Where there is no room it has some to write, and looks again after them.
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        self._thread.join(_CLOSING_SECONDS)
        lost = self._lost + self._lines.qsize()
        if lost:
            reason = self._failure or "its disk is too slow"
            _log.error("the %s %s lacks %d %s: %s", self._what, self._path, lost, self._of, reason)

    def _open(self) -> FileIO:
        # Unbuffered: what is written is with the operating system.
        file = FileIO(self._path, "a+", opener=_open_for_the_owner)
        # The process that wrote before may have been killed in the middle of a line.
        if os.fstat(file.fileno()).st_size > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        return file

    def _run(self) -> None:
        with self._file:
            while (entry := self._next()) is not None:
                if self._failure is not None:
                    self._lost += 1
                    continue
                try:
                    self._write(json.dumps(asdict(entry), separators=(",", ":")).encode() + b"\n")
                except OSError as error:
                    self._failure = error
                    self._lost += 1
                    _log.error("the %s %s ends here: %s; training goes on", self._what, self._path, error)

    def _write(self, line: bytes) -> None:
        # A disk that is nearly full takes a part, and says what is wrong when it is asked to take the rest.
        rest = memoryview(line)
        while rest:
            rest = rest[self._file.write(rest) :]

    def _next(self) -> Settled | Event | None:
        # A disk that hung while the ledger was closed may come back later: the thread ends then, too.
        return None if self._closing.is_set() and self._lines.empty() else self._lines.get()


def _open_for_the_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
