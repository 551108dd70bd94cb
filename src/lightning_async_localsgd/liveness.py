"""Whether another process of this machine has ended, told by what that process has left in the run's store.

Rank 0 must not wait for a rank that will never come, and it has not started all of them: under ``spawn`` and ``fork``
they are its siblings.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def this_process() -> str:
    """A name of this process, for :func:`has_ended` of another one; empty where the system does not tell enough."""
    with suppress(OSError, ValueError):
        state, started_at = _stat(os.getpid())
        if state:
            return f"{_namespace()}/{os.getpid()}/{started_at}"
    return ""


def has_ended(process: str) -> bool:
    """Whether that process has ended for sure. False for one that cannot be seen from here."""
    namespace, _, rest = process.partition("/")
    with suppress(OSError, ValueError):
        if not process or namespace != _namespace():
            return False
        pid, _, started_at = rest.partition("/")
        try:
            state, present = _stat(int(pid))
        except (FileNotFoundError, ProcessLookupError):
            return True
        # Nobody has asked for the exit code of a zombie yet. Another start: the number has been used again.
        return state in "ZX" or present != started_at
    return False


def _namespace() -> str:
    """Equal for two processes exactly if a process number means the same to both."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{os.readlink('/proc/self/ns/pid')}"


def _stat(pid: int) -> tuple[str, str]:
    """A process's state and when it was started."""
    # The name of the program, in parentheses, may itself have spaces and parentheses.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]
