"""Detection of ended processes on the same machine.

Rank 0 must not wait for a rank whose process has ended. With ``spawn`` and ``fork`` the other ranks are siblings of
rank 0, not its children, so rank 0 cannot ask for their exit codes. Each rank therefore posts the identity of its
process to the run's store.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def process_identity() -> str:
    """Return the identity of this process for :func:`has_ended`; empty if the system does not provide one."""
    with suppress(OSError, ValueError):
        state, started_at = _stat(os.getpid())
        if state:
            return f"{_namespace()}/{os.getpid()}/{started_at}"
    return ""


def has_ended(identity: str) -> bool:
    """Return whether a process has certainly ended.

    The answer is False for a process that is not visible from here, such as one on another machine.

    Args:
        identity: the process's :func:`process_identity`.

    """
    namespace, _, rest = identity.partition("/")
    with suppress(OSError, ValueError):
        if not identity or namespace != _namespace():
            return False
        pid, _, started_at = rest.partition("/")
        try:
            state, started_now = _stat(int(pid))
        except (FileNotFoundError, ProcessLookupError):
            return True
        # A zombie (Z) has ended, but its parent has not read its exit code yet. A different start time means that the
        # number belongs to another process by now.
        return state in "ZX" or started_now != started_at
    return False


def is_running(identity: str) -> bool:
    """Return whether a process is certainly running, see :func:`has_ended`."""
    with suppress(OSError):
        return bool(identity) and identity.partition("/")[0] == _namespace() and not has_ended(identity)
    return False


def _namespace() -> str:
    """Return a text that is equal for two processes exactly if process numbers mean the same to both."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{os.readlink('/proc/self/ns/pid')}"


def _stat(pid: int) -> tuple[str, str]:
    """Return a process's state and start time."""
    # The second field is the program's name in parentheses, which may contain spaces and parentheses itself.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]
