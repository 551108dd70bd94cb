"""The processes that this one has launched as other ranks of the same script."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import subprocess

children: dict[int, subprocess.Popen[Any]] = {}
"""By local rank. They outlive the Trainer they were launched for: the next one in the same script finds them at the
same place of the script."""


def raise_if_process_ended() -> None:
    """For whoever waits for all ranks: a launched process that has ended will never come.

    Raises:
        RuntimeError: names the rank and its exit code.

    """
    for local_rank, process in children.items():
        code = process.poll()
        if code is not None:
            raise RuntimeError(
                f"the process of local rank {local_rank} (pid {process.pid}) has ended with exit code {code}, but all "
                "ranks are needed here; see what it printed above"
            )


def ended_ranks() -> set[int]:
    """The ranks whose processes this one, rank 0, has launched and that have ended, however they did.

    They are of its own node, the first, where local and global ranks are the same.
    """
    return {rank for rank, process in children.items() if process.poll() is not None}
