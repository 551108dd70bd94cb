"""Writes what happens in a run to a file, as lines of JSON.

The caller only queues the lines. A separate thread writes them, so that a slow disk does not delay merging. It writes
the lines of :data:`BATCH_SECONDS` at once, because waking a thread for each line costs more than the line. If the
process is killed, these lines are lost.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import queue
import threading
from collections.abc import Mapping
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_async_localsgd.server.events import Event

_log = logging.getLogger(__name__)

_MAX_QUEUED = 100_000
"""Largest number of queued lines, so that a stuck disk does not fill the memory."""

BATCH_SECONDS = 0.2
"""Seconds between two writes."""

_CLOSING_SECONDS = 30.0
"""Seconds that :meth:`LineFile.close` waits for the disk."""

EVENT_FILE = "async_localsgd_events.jsonl"
"""Name of the event file in a trainer's log directory."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)
"""Errors of file systems, and of devices, that have no locks."""

_open_here: set[Path] = set()
"""Files that this process writes. The lock of a file only keeps other processes out."""

FIRST_KIND = "run"
"""Kind of the lines that begin a run. A rotated file begins with the last of them."""


def older_file(path: Path) -> Path:
    """Return the path to which a file is moved when it is rotated: ``events.old.jsonl`` for ``events.jsonl``."""
    return path.with_name(f"{path.stem}.old{path.suffix}")


class LineFile:
    """Appends one line for each entry to a file.

    Args:
        path: path of the file. If the file does not exist, it is created with mode 0600, and its folder as well.
        name: name of the file in messages.
        max_bytes: bytes that the file and its predecessor may need together. When the file has half of them, it is
            moved to :func:`older_file`, and a new one begins with the line that began the run. None is no limit.

    Raises:
        OSError: The file cannot be written, or another writer writes it.

    """

    def __init__(self, path: str | os.PathLike[str], name: str = "event file", max_bytes: int | None = None) -> None:
        self._path = Path(path)
        self._name = name
        self._limit = None if max_bytes is None else max_bytes // 2
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._key = self._path.resolve()
        if self._key in _open_here:
            raise _taken(self._path)
        self._file = self._open()
        _open_here.add(self._key)
        self._size = os.fstat(self._file.fileno()).st_size
        self._first: bytes | None = None
        self._lost = 0
        self._failure: Exception | None = None
        self._queue: queue.Queue[Mapping[str, Any] | Event | None] = queue.Queue(_MAX_QUEUED)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="async_localsgd-events", daemon=True)
        self._thread.start()

    def write(self, entry: Mapping[str, Any] | Event) -> None:
        """Queue a line. The entry must not change any more. After :meth:`close`, do nothing."""
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
            _log.error("the %s %s lacks %d lines: %s", self._name, self._path, lost, reason)

    def _open(self) -> FileIO:
        # Unbuffered, so that a killed process loses nothing that was written.
        file = FileIO(self._path, "a+", opener=_open_for_the_owner)
        try:
            # Unlike with flock(), processes of data loaders that outlive a killed process do not hold the lock.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise _taken(self._path) from error
        # An earlier process may have been killed in the middle of a line.
        if os.fstat(file.fileno()).st_size > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        return file

    def _run(self) -> None:
        try:
            while (entries := self._next()) is not None:
                if self._failure is not None:
                    self._lost += len(entries)
                    continue
                try:
                    self._write(entries)
                except Exception as error:
                    self._failure = error
                    _log.error("the %s %s ends here: %s; training goes on", self._name, self._path, error)
                self._closing.wait(BATCH_SECONDS)
        finally:
            self._file.close()
            _open_here.discard(self._key)

    def _write(self, entries: list[Mapping[str, Any] | Event]) -> None:
        batch = b""
        for count, entry in enumerate(entries):
            fields = entry if isinstance(entry, Mapping) else asdict(entry)
            line = _encode(fields)
            if fields["kind"] == FIRST_KIND:
                self._first = _encode({**fields, "continued": True})
            size = self._size + len(batch)
            if self._limit is not None and size and size + len(line) > self._limit:
                self._append(batch, len(entries) - count)
                self._rotate()
                batch = b""
            batch += line
        self._append(batch, len(entries))

    def _append(self, data: bytes, entries: int) -> None:
        """Append some lines. If that fails, they and the lines that follow are among the given number of lost ones."""
        self._size += len(data)
        rest = memoryview(data)
        # A nearly full disk takes a part, and raises an error for the rest.
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._lost += entries
            raise

    def _rotate(self) -> None:
        self._file.close()
        os.replace(self._path, older_file(self._path))
        self._file = self._open()
        self._size = 0
        if self._first is not None:
            self._append(self._first, 0)

    def _next(self) -> list[Mapping[str, Any] | Event] | None:
        """Wait for entries, and return all that are queued; None after the last one."""
        # If the disk was stuck during close(), the thread ends when the disk works again.
        entries = []
        while not (self._closing.is_set() and self._queue.empty()):
            entry = self._queue.get()
            if entry is not None:
                entries.append(entry)
            if self._queue.empty() and entries:
                break
        return entries or None


def _taken(path: Path) -> OSError:
    return OSError(errno.EBUSY, "another run or callback writes this file; give each a file of its own", str(path))


def _encode(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def _open_for_the_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
