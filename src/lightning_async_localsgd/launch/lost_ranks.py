"""Ranks that were lost in training, so that a later call of the Trainer does not wait for them."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_async_localsgd.launch.children import raise_if_process_ended
from lightning_async_localsgd.launch.liveness import is_running
from lightning_async_localsgd.launch.uncaught import FollowingError

_lost: dict[int, tuple[str, str]] = {}
"""For each lost rank the identity of its process and why it was lost. Kept for the lifetime of the process, because the
script's next Trainer needs all ranks, too."""


def remember_lost(lost: Mapping[int, tuple[str, str]]) -> None:
    """Remember the ranks that were lost in training.

    Args:
        lost: for each rank the :func:`.process_identity` of its process, empty if unknown, and why the rank was lost.

    """
    _lost.clear()
    _lost.update(lost)


def raise_if_rank_missing() -> None:
    """Raise if waiting for all ranks is pointless: a launched process has ended, or a rank was lost in training.

    Raises:
        FollowingError: names the rank and the reason.

    """
    raise_if_process_ended()
    raise_if_rank_lost()


def raise_if_rank_lost() -> None:
    """Raise if a rank was lost in training and does not run any more. Call this while waiting for all ranks.

    A process on this machine that is still running may only have lost its connection, and may come.

    Raises:
        FollowingError: names the ranks and why they were lost.

    """
    gone = {rank: reason for rank, (identity, reason) in _lost.items() if not is_running(identity)}
    if gone:
        reasons = "; ".join(f"rank {rank} ({reason})" for rank, reason in gone.items())
        raise FollowingError(
            f"this step needs all ranks, but fit has lost {reasons}. Its result is complete: run this step in a script "
            "of its own, with the checkpoint of the run"
        )
