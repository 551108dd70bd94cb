"""Files that are there completely or not at all, whatever dies while they are written.

A file is written under a name that nobody looks for, brought to the disk, and only then given its own, which holds the
hash of its content. So a file that is found under its name was complete once, and :func:`verified` tells whether it is
so still. Nothing that is there already is touched before the new one is complete.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

_log = logging.getLogger(__name__)

_UNFINISHED = ".unfinished-"
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""What file systems answer that have no locks."""
_HASH = re.compile(r"-([0-9a-f]{64})\.[a-z]+$")
_CHUNK = 1 << 20
_TICK = 1_000_000
"""Nanoseconds that file systems tell apart."""

watchers: list[Callable[[], None]] = []
"""Called when a file is complete and has no name yet. Empty but in rehearsals, see :mod:`.injection`."""


class Hashed:
    """What :func:`torch.save` and others write to: a file descriptor, and the hash of everything that went there."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._hash = hashlib.sha256()
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Writes all of ``data``."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        written = 0
        try:
            while written < len(view):
                written += os.write(self._descriptor, view[written : written + (1 << 30)])
        except OSError as error:
            self._error = error
            raise
        return written

    def flush(self) -> None:
        """Nothing is held back."""

    def raise_error(self) -> None:
        """Raises what went wrong: whoever writes through C++ may have made another error of it."""
        if self._error is not None:
            raise self._error

    @property
    def digest(self) -> str:
        """The hash so far."""
        return self._hash.hexdigest()


def write(folder: Path, stem: str, suffix: str, save: Callable[[IO[bytes]], object]) -> Path:
    """Writes ``folder/<stem>-<sha256><suffix>``, readable for this user alone.

    Args:
        folder: made if it is not there.
        stem: the name's beginning.
        suffix: the name's end.
        save: writes the content to what it is given.

    Returns:
        The file, which is on the disk now.

    Raises:
        OSError: the disk is full, the folder may not be written to, ...; nothing is left of the new file.

    """
    make_private(folder)
    remove_leftovers(folder)
    descriptor, unfinished = _begin(folder)
    try:
        file = Hashed(descriptor)
        try:
            save(cast("IO[bytes]", file))
        except Exception:
            file.raise_error()
            raise
        make_newest(descriptor, folder)
        os.fsync(descriptor)
        for watcher in watchers:
            watcher()
        path = folder / f"{stem}-{file.digest}{suffix}"
        os.rename(unfinished, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(unfinished)
        raise
    finally:
        os.close(descriptor)
    sync_folder(folder)
    return path


def make_newest(file: int | Path, folder: Path) -> None:
    """Files are told apart by their times of change: this one becomes the newest of its folder.

    By itself it would not be if the machine's clock has gone back since the others were written.
    """
    latest = 0
    for path in folder.iterdir():
        if not path.name.startswith(_UNFINISHED):
            with suppress(OSError):  # Another process may remove what is its own.
                latest = max(latest, path.stat().st_mtime_ns)
    now = time.time_ns()
    when = now if now > latest else latest + _TICK
    os.utime(file, ns=(when, when))


def verified(path: Path) -> bool:
    """Whether the file's content has the hash that its name says."""
    expected = _HASH.search(path.name)
    if expected is None:
        return False
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError:
        return False
    return digest.hexdigest() == expected[1]


def link(path: Path, folder: Path) -> Path:
    """Puts a complete file into another folder, too, without a copy where the file system can do so."""
    make_private(folder)
    target = folder / path.name
    if target.exists():
        return target
    try:
        os.link(path, target)
    except FileExistsError:
        return target
    except OSError:
        if not path.exists():
            raise
        stem, suffix = path.name[: -len(path.suffix) - 65], path.suffix
        with open(path, "rb") as file:
            copied = write(folder, stem, suffix, lambda out: _copy(file, out))
        if copied != target:
            copied.unlink()
            raise OSError(f"the content of {path} is not what its name says") from None
    sync_folder(folder)
    return target


def make_private(folder: Path) -> None:
    """Makes the folder, for this user alone, unless it is there."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Brings the folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # Some network file systems cannot, and need not.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Removes what processes have left unfinished that are gone. A writer that lives holds a lock on its file."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(descriptor)


def _begin(folder: Path) -> tuple[int, Path]:
    while True:
        path = folder / f"{_UNFINISHED}{secrets.token_hex(8)}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)  # Somebody is looking at it this very moment, and removes it.
            continue
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor, path  # Nobody removes what cannot be locked, either.
            os.close(descriptor)
            os.unlink(path)
            raise
        if os.fstat(descriptor).st_nlink > 0:
            return descriptor, path
        os.close(descriptor)


def _copy(file: IO[bytes], out: IO[bytes]) -> None:
    while chunk := file.read(_CHUNK):
        out.write(chunk)


class Writer:
    """Writes one thing at a time, in a thread of its own. What goes wrong is logged and counted, and never raised.

    Args:
        what: is written, for the log.
        where: it is written to.

    Attributes:
        failures: how often it could not be written.

    """

    def __init__(self, what: str, where: Path) -> None:
        self.failures = 0
        self._what = what
        self._where = where
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether something is being written."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, job: Callable[[], None]) -> None:
        """Starts ``job``; only while nothing else is being written."""
        assert not self.busy
        # A daemon: a disk that hangs must not keep the process.
        self._thread = threading.Thread(target=self._run, args=(job,), name="async_localsgd-writer", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Waits until everything is written; returns whether it is."""
        if self._thread is not None:
            self._thread.join(seconds)
        return not self.busy

    def failed(self, error: BaseException) -> None:
        """Notes that it could not be written."""
        self.failures += 1
        _log.error(
            "%s could not be written to %s (failure %d): %s: %s; training goes on, and what was there before is kept",
            self._what, self._where, self.failures, type(error).__name__, error,
        )  # fmt: skip

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:
            self.failed(error)
