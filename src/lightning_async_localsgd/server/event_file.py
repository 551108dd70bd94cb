"""Reads event files, also while they are being written and rotated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.server.journal import FORMAT
from lightning_async_localsgd.server.line_file import EVENT_FILE, FIRST_KIND, older_file

if TYPE_CHECKING:
    from collections.abc import Iterator
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
    return max(found, key=lambda file: file.stat().st_mtime_ns)


class EventReader:
    """Reads the lines of an event file, first those that were moved to the older file.

    Args:
        path: path of the event file.

    Raises:
        NoEventFileError: A line says that the file has another format.

    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = -1
        self._offset = 0
        self._began = False

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the complete lines that were written since the last call. Lines that are no JSON are skipped."""
        older = older_file(self._path)
        if not self._began:
            self._began = True
            if older.exists():
                yield from self._read(older)
                self._offset = 0
        elif self._path.exists() and self._path.stat().st_ino != self._inode:
            # The file was rotated since. What was missing of it is in the older file now.
            if older.exists() and older.stat().st_ino == self._inode:
                yield from self._read(older)
            self._offset = 0
        if self._path.exists():
            yield from self._read(self._path)

    def _read(self, path: Path) -> Iterator[dict[str, Any]]:
        with path.open("rb") as file:
            self._inode = path.stat().st_ino
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # It is being written.
                self._offset += len(line)
                fields = _decode(line)
                if fields is not None:
                    _check_format(fields, path)
                    yield fields


def read_lines(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """Return the lines of an event file, those that were moved to the older file included.

    Raises:
        NoEventFileError: There is no such file, or it has another format.

    """
    path = Path(path)
    if not path.exists():
        raise NoEventFileError(f"{path} does not exist")
    return list(EventReader(path).read())


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
    except ValueError:  # A process was killed while it wrote the line.
        return None
    return fields if isinstance(fields, dict) and "kind" in fields else None


def _check_format(line: dict[str, Any], path: Path) -> None:
    if line["kind"] == FIRST_KIND and line.get("format") != FORMAT:
        raise NoEventFileError(
            f"{path} is an event file of format {line.get('format')}, and this version reads format {FORMAT}; use the "
            "version of lightning-async-localsgd that wrote it"
        )
