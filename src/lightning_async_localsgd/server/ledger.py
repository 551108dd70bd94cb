"""Writes a run's pushes or events to a file, as lines of JSON.

The server's thread only queues the lines. A separate thread writes them, so that a slow disk does not delay merging.
Writes are unbuffered: if the process is killed, only the lines of the last moment are lost.
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
    from lightning_async_localsgd.server.events import Event
    from lightning_async_localsgd.server.run_stats import PushOutcome

_log = logging.getLogger(__name__)

_MAX_QUEUED = 100_000
"""Largest number of queued lines, so that a stuck disk does not fill the memory."""

_CLOSING_SECONDS = 30.0
"""Seconds that :meth:`Ledger.close` waits for the disk."""


class Ledger:
    """Appends one line per :class:`.PushOutcome` or :class:`.Event` to a file, with all fields.

    Args:
        path: path of the file. If the file does not exist, it is created with mode 0600, and its folder as well.
        name: name of the file in messages.
        entries: name of its entries in messages.

    Raises:
        OSError: The file cannot be written.

    """

    def __init__(self, path: str | os.PathLike[str], name: str = "ledger", entries: str = "pushes") -> None:
        self._path = Path(path)
        self._name = name
        self._entries = entries
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._open()
        self._lost = 0
        self._failure: OSError | None = None
        self._queue: queue.Queue[PushOutcome | Event | None] = queue.Queue(_MAX_QUEUED)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="async_localsgd-ledger", daemon=True)
        self._thread.start()

    def write(self, entry: PushOutcome | Event) -> None:
        """Queue a line. After :meth:`close`, do nothing."""
        if self._closing.is_set():
            return
        try:
            self._queue.put_nowait(entry)
        except queue.Full:
            self._lost += 1

    def close(self) -> None:
        """Wait until all lines are written. Can be called twice."""
        if not self._thread.is_alive():
            return
        self._closing.set()
        # Wake the writer if it waits for lines. If the queue is full, it does not wait.
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(_CLOSING_SECONDS)
        lost = self._lost + self._queue.qsize()
        if lost:
            reason = self._failure or "its disk is too slow"
            _log.error("the %s %s lacks %d %s: %s", self._name, self._path, lost, self._entries, reason)

    def _open(self) -> FileIO:
        # Unbuffered, so that a killed process loses nothing that was written.
        file = FileIO(self._path, "a+", opener=_open_for_the_owner)
        # An earlier process may have been killed in the middle of a line.
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
                    _log.error("the %s %s ends here: %s; training goes on", self._name, self._path, error)

    def _write(self, line: bytes) -> None:
        # A nearly full disk takes a part, and raises an error for the rest.
        rest = memoryview(line)
        while rest:
            rest = rest[self._file.write(rest) :]

    def _next(self) -> PushOutcome | Event | None:
        # If the disk was stuck during close(), the thread ends when the disk works again.
        return None if self._closing.is_set() and self._queue.empty() else self._queue.get()


def _open_for_the_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
