"""State of the strategy during one ``fit``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.lightning.checkpoints.contents import SavedModel
from lightning_async_localsgd.lightning.trainer_access.data import reload_training_data

if TYPE_CHECKING:
    from pathlib import Path

    import lightning.pytorch as pl

    from lightning_async_localsgd.launch.joining import JoinGrant
    from lightning_async_localsgd.lightning.data.training_data import TrainingData
    from lightning_async_localsgd.lightning.loop.controller import FitController
    from lightning_async_localsgd.lightning.loop.limits import SuspendedLimits
    from lightning_async_localsgd.policies.plan import Position
    from lightning_async_localsgd.server.observers import RunObserver


@dataclass
class FitState:
    """Everything the strategy knows about one ``fit``. Made in ``setup_environment``, dropped in ``teardown``.

    Args:
        number: number of this fit in the script, from 1.
        seed: seed of the training data's order, the same on all ranks.
        grant: the server's answer to a worker that joins a running training; None for all others.

    Attributes:
        data: the training data; set right after construction.
        uses_distributed_sampler: the trainer's own ``use_distributed_sampler``, which is off during the fit.
        limits: the trainer's limits while they are suspended.
        controller: drives the loop while ranks run at their own speed; None before and after.
        searches_learning_rate: whether ``LearningRateFinder`` is trying learning rates.
        restored: the server's state in the checkpoint that is resumed, on rank 0.
        position: the position in the data that the checkpoint holds.
        optimizer_file: file that this worker's inner optimizer states were loaded from.
        saved_model: which tensors of the last checkpoint are the global model.
        observers: objects that the server tells what happens.
        workers: number of workers that the run begins with.
        found_batch_size: the batch size that ``batch_size="auto"`` has found for this rank.
        search_error: why it could not.
        batch_size: what the workers' own batch sizes are and refer to; "" if they have none.
        lost_workers: on rank 0, after training: workers of the beginning that did not see its end.

    """

    number: int
    seed: int
    grant: JoinGrant | None = None
    data: TrainingData = field(init=False)
    uses_distributed_sampler: bool = True
    limits: SuspendedLimits | None = None
    controller: FitController | None = None
    searches_learning_rate: bool = False
    restored: dict[str, Any] | None = None
    position: Position | None = None
    optimizer_file: Path | None = None
    saved_model: SavedModel = field(default_factory=SavedModel)
    observers: list[RunObserver] = field(default_factory=list)
    workers: int = 1
    found_batch_size: int | None = None
    search_error: str | None = None
    batch_size: str = ""
    lost_workers: list[int] = field(default_factory=list)

    def search_learning_rate(self, trainer: pl.Trainer) -> None:
        """Let rank 0 try learning rates before anything is trained. The other ranks wait for the result."""
        self.searches_learning_rate = True
        if trainer.is_global_zero:
            # Rank 0 uses the user's own loader, because no data can be leased yet.
            reload_training_data(trainer)
        else:
            trainer.fit_loop.epoch_loop.max_steps = trainer.global_step

    @property
    def runs_apart(self) -> bool:
        """Whether ranks run at their own speed, so that collectives must not wait."""
        return self.controller is not None or self.searches_learning_rate
