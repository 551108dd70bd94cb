"""Files that exist either completely or not at all, even if the process or the machine dies while they are written.

A file is written under a temporary name, synced to the disk, and only then renamed to its final name, which contains
the hash of its content. A file with a final name was therefore complete once, and :func:`verified` checks whether it
still is. Existing files stay untouched until the new one is complete.
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
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

_log = logging.getLogger(__name__)

_UNFINISHED = ".unfinished-"
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""Errors of file systems that do not support locks."""
_HASH = re.compile(r"-([0-9a-f]{64})\.[a-z]+$")
_CHUNK = 1 << 20
_TICK = 1_000_000
"""Nanoseconds by which two modification times must differ, so that every file system distinguishes them."""

watchers: list[Callable[[], None]] = []
"""Called when a file is complete but not yet renamed. Used only for fault injection, see :mod:`.faults`."""


class HashingFile:
    """A file object for :func:`torch.save` and others, which hashes everything that is written.

    Args:
        descriptor: file descriptor to write to.

    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._hash = hashlib.sha256()
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of ``data``."""
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
        """Do nothing: nothing is buffered."""

    def raise_error(self) -> None:
        """Raise the original error of a failed write. Code that writes through C++ may have replaced the error."""
        if self._error is not None:
            raise self._error

    @property
    def digest(self) -> str:
        """Hash of everything written so far."""
        return self._hash.hexdigest()


def write(folder: Path, stem: str, suffix: str, save: Callable[[IO[bytes]], object]) -> Path:
    """Write ``folder/<stem>-<sha256><suffix>``, readable by this user only.

    Args:
        folder: created if needed.
        stem: beginning of the file name.
        suffix: end of the file name.
        save: writes the content to the file object that it is given.

    Returns:
        The path of the file, which is on the disk.

    Raises:
        OSError: the file could not be written. Nothing is left of it.

    """
    make_private(folder)
    remove_leftovers(folder)
    descriptor, unfinished = _create_unfinished(folder)
    try:
        file = HashingFile(descriptor)
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
    """Set the modification time of ``file`` so that it is the newest in its folder.

    Without this, an older file would appear newer if the machine's clock was set back since it was written.
    """
    latest = 0
    for path in folder.iterdir():
        if not path.name.startswith(_UNFINISHED):
            with suppress(OSError):  # Another process may remove its own files.
                latest = max(latest, path.stat().st_mtime_ns)
    now = time.time_ns()
    when = now if now > latest else latest + _TICK
    os.utime(file, ns=(when, when))


def verified(path: Path) -> bool:
    """Return whether the content of a file matches the hash in its name."""
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
    """Link a complete file into another folder, or copy the file if the file system cannot link it.

    Returns:
        The path in the other folder.

    Raises:
        OSError: the file is missing or damaged, or could not be copied.

    """
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
            raise OSError(f"{path} is damaged: its content does not match the hash in its name") from None
    sync_folder(folder)
    return target


def make_private(folder: Path) -> None:
    """Create a folder that only this user can access, unless it exists."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # Some network file systems do not support this, and do not need it.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove unfinished files of processes that have ended. A running writer holds a lock on its file."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(descriptor)


def _create_unfinished(folder: Path) -> tuple[int, Path]:
    while True:
        path = folder / f"{_UNFINISHED}{secrets.token_hex(8)}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)  # Another process holds the lock, because it is removing this file as a leftover.
            continue
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor, path  # Without locks, no process removes leftovers.
            os.close(descriptor)
            os.unlink(path)
            raise
        if os.fstat(descriptor).st_nlink > 0:
            return descriptor, path
        os.close(descriptor)


def _copy(file: IO[bytes], out: IO[bytes]) -> None:
    while chunk := file.read(_CHUNK):
        out.write(chunk)


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Sort files by modification time, newest first."""
    return sorted(paths, key=modification_time, reverse=True)


def newest(paths: Iterable[Path]) -> Path | None:
    """Return the newest file that is intact. Log a warning for each newer file that is damaged."""
    for path in newest_first(paths):
        if verified(path):
            return path
        _log.warning("%s is damaged: its content does not match the hash in its name; skipping this file", path)
    return None


def modification_time(path: Path) -> tuple[int, str]:
    """Return a sort key for files: the modification time in nanoseconds, then the name. A missing file comes first."""
    try:
        return path.stat().st_mtime_ns, path.name
    except OSError:
        return 0, path.name


class BackgroundWriter:
    """Writes files in a background thread, one at a time. Errors are logged and counted, but not raised.

    Args:
        what: what is written, for the log.
        where: folder of the files, for the log.

    Attributes:
        failures: number of failed writes.

    """

    def __init__(self, what: str, where: Path) -> None:
        self.failures = 0
        self._what = what
        self._where = where
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a file is being written."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, job: Callable[[], None]) -> None:
        """Start ``job`` in the background. The previous job must have ended."""
        assert not self.busy
        # A daemon thread, so that a hanging disk does not keep the process from exiting.
        self._thread = threading.Thread(target=self._run, args=(job,), name="async_localsgd-writer", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait up to ``seconds`` for the current job. Return whether it has ended."""
        if self._thread is not None:
            self._thread.join(seconds)
        return not self.busy

    def failed(self, error: BaseException) -> None:
        """Count and log a failed write."""
        self.failures += 1
        _log.error(
            "%s could not be written to %s (failure %d): %s: %s; training continues, and earlier files are kept",
            self._what, self._where, self.failures, type(error).__name__, error,
        )  # fmt: skip

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:
            self.failed(error)
