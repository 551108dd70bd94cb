"""What ends a wait for the server or for other workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_async_localsgd.launch.lost_ranks import raise_if_rank_missing
from lightning_async_localsgd.lightning.trainer_access.loop import raise_if_sigterm

if TYPE_CHECKING:
    import lightning.pytorch as pl


class WaitCheck:
    """Raises an error if waiting has become pointless. Called again and again while a process waits.

    It is pointless if the process was asked to end, and before training also if a rank has ended. In training, the
    other ranks go on.

    Args:
        trainer: the trainer of this process.
        needs_ranks: whether this process is one of the ranks, which all have to be there before training.

    """

    def __init__(self, trainer: pl.Trainer, needs_ranks: bool) -> None:
        self._trainer = trainer
        self._needs_ranks = needs_ranks

    def __call__(self) -> None:
        """Raise an error if waiting is pointless.

        Raises:
            SIGTERMException: The process has received SIGTERM.
            FollowingError: A rank that is needed has ended. The text names the rank.

        """
        raise_if_sigterm(self._trainer)
        if self._needs_ranks:
            raise_if_rank_missing()

    def begin_training(self) -> None:
        """Note that training has begun."""
        self._needs_ranks = False
