"""Reads event files, also while they are being written and rotated."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lightning_async_localsgd.server.journal import FORMAT
from lightning_async_localsgd.server.line_file import EVENT_FILE, FIRST_KIND, older_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from os import PathLike


class NoEventFileError(ValueError):
    """There is no event file, or it cannot be read."""


def find_event_file(path: str | PathLike[str]) -> Path:
    """Return the event file that a user means: the file itself, or the newest one in a folder.

    Raises:
        NoEventFileError: There is none.

    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise NoEventFileError(f"{path} does not exist; give the log directory of a run, or its event file")
    found = [file for file in path.rglob(EVENT_FILE) if file.is_file()]
    if not found:
        raise NoEventFileError(
            f"{path} contains no {EVENT_FILE}; a run with a logger writes it into trainer.log_dir, and "
            "AsyncLocalSGDCallback(events=...) where you want it"
        )
    return max(found, key=_modified)


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # It is being rotated.
        return time.time_ns()


class EventReader:
    """Reads the lines of an event file, first those that were moved to the older file.

    Args:
        path: path of the event file.

    Raises:
        NoEventFileError: The file cannot be read, a line says that it has another format, or a line is no line of an
            event file.

    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the complete lines that were written since the last call. Lines that are no JSON are skipped."""
        try:
            if self._file is None:
                yield from self._begin()
            else:
                yield from self._lines(self._file)
                if (newer := self._newer()) is not None:
                    # What was missing of the file was written before it was moved.
                    yield from self._lines(self._file)
                    self._file.close()
                    self._file = newer
                    yield from self._lines(newer)
        except OSError as error:
            raise NoEventFileError(f"{self._path} cannot be read: {error}") from error

    def feed(self, take_in: Callable[[dict[str, Any]], None]) -> None:
        """Call a function with each line of :meth:`read`. It may assume the fields of the line's kind.

        Raises:
            NoEventFileError: See the class.

        """
        for line in self.read():
            try:
                take_in(line)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                raise NoEventFileError(
                    f"{self._path} is damaged, or no event file: a line of kind {line['kind']!r} lacks a field or has "
                    f"a wrong one ({error!r})"
                ) from error

    def close(self) -> None:
        """Close the file. Can be called twice."""
        if self._file is not None:
            self._file.close()

    def _begin(self) -> Iterator[dict[str, Any]]:
        older = older_file(self._path)
        # If the file is rotated between the two, the older one is the same file.
        try:
            self._file = self._path.open("rb")
        except FileNotFoundError:
            if not older.exists():
                return  # There is no line yet.
            self._file = older.open("rb")  # It is being rotated.
        if older.exists():
            with older.open("rb") as file:
                if not os.path.sameopenfile(file.fileno(), self._file.fileno()):
                    yield from self._lines(file)
        yield from self._lines(self._file)

    def _newer(self) -> BinaryIO | None:
        """Return the file that has the path now, if it is another one."""
        assert self._file is not None
        try:
            file = self._path.open("rb")
        except FileNotFoundError:  # It is being rotated.
            return None
        if os.path.sameopenfile(file.fileno(), self._file.fileno()):
            file.close()
            return None
        return file

    def _lines(self, file: BinaryIO) -> Iterator[dict[str, Any]]:
        begin = file.tell()
        for line in file:
            if not line.endswith(b"\n"):
                file.seek(begin)
                return  # It is being written.
            begin += len(line)
            fields = _decode(line)
            if fields is not None:
                _check_format(fields, self._path)
                yield fields


def read_lines(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """Return the lines of an event file, those that were moved to the older file included.

    Raises:
        NoEventFileError: There is no such file, it cannot be read, or it has another format.

    """
    path = Path(path)
    if not path.exists():
        raise NoEventFileError(f"{path} does not exist")
    with contextlib.closing(EventReader(path)) as reader:
        return list(reader.read())


def read_pushes(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """Return the pushes in an event file, in the order in which the server decided on them.

    Each push that the server merged has exactly one line without a reason for a refusal.

    Raises:
        NoEventFileError: See :func:`read_lines`.

    """
    return [line for line in read_lines(path) if line["kind"] == "push"]


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):  # A process was killed while it wrote the line.
        return None
    return fields if isinstance(fields, dict) and isinstance(fields.get("kind"), str) else None


def _check_format(line: dict[str, Any], path: Path) -> None:
    if line["kind"] == FIRST_KIND and line.get("format") != FORMAT:
        raise NoEventFileError(
            f"{path} is an event file of format {line.get('format')}, and this version reads format {FORMAT}; use the "
            "version of lightning-async-localsgd that wrote it"
        )
