"""Learning-rate schedulers that follow the progress of the data, not of one worker's own steps.

Lightning steps a scheduler once for every local step, or epoch, of its rank. With workers of unequal speed a fast one
would run through the schedule early and a slow one stay behind. So, while ranks run asynchronously, schedulers are
stepped here: as often as there have been local steps of all workers together, divided by the number of workers (the
paper's equation 3, over the whole run). A merge never restarts them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning.pytorch.trainer import call

if TYPE_CHECKING:
    import lightning.pytorch as pl

_NEVER = 2**62
"""A frequency at which Lightning never gets to step a scheduler itself."""


class ProgressSchedulers:
    """Takes over the schedulers of a trainer until :meth:`release`.

    Step-wise schedulers follow the progress in steps. Epoch-wise ones follow it in epochs, where an epoch has a known
    number of steps; otherwise they stay with Lightning and follow the rank's own epochs. Under manual optimization the
    module steps its schedulers itself.

    Args:
        trainer: the trainer, its schedulers restored if it resumes.
        progress: local steps of all workers / number of workers that the schedulers have already seen.

    Attributes:
        taken: steps that each scheduler has been given.

    """

    def __init__(self, trainer: pl.Trainer, progress: float) -> None:
        self._trainer = trainer
        batches = trainer.num_training_batches
        epoch = batches if batches == math.inf else math.ceil(batches / trainer.accumulate_grad_batches)
        steps = {"step": 1.0, "epoch": epoch}
        self._configs = [
            config
            for config in trainer.strategy.lr_scheduler_configs
            if trainer.lightning_module.automatic_optimization
            and not config.reduce_on_plateau
            and steps[config.interval] != math.inf
        ]
        self._frequencies = [config.frequency for config in self._configs]
        self._periods = [config.frequency * steps[config.interval] for config in self._configs]
        # A restored scheduler has also seen rounds that had not been handed in when it was saved, and are lost.
        seen = [getattr(config.scheduler, "last_epoch", 0) if progress > 0 else 0 for config in self._configs]
        self.taken = [max(int(progress // period), n) for period, n in zip(self._periods, seen, strict=True)]
        for config in self._configs:
            config.frequency = _NEVER

    def advance(self, progress: float) -> None:
        """Steps every scheduler as often as ``progress`` asks for. Going back is not possible and does nothing."""
        in_use = self._trainer.strategy.lr_scheduler_configs
        for index, (config, period) in enumerate(zip(self._configs, self._periods, strict=True)):
            if not any(config is one for one in in_use):
                continue  # A callback (SWA) has put a scheduler of its own in this one's place.
            # The progress is a sum of estimates; a hair below a whole number is that number.
            for _ in range(self.taken[index], int((progress + 1e-6) // period)):
                call._call_lightning_module_hook(self._trainer, "lr_scheduler_step", config.scheduler, None)
                self.taken[index] += 1

    def release(self) -> None:
        """Gives the schedulers back to Lightning."""
        for config, frequency in zip(self._configs, self._frequencies, strict=True):
            config.frequency = frequency
        self._configs = []
        self._frequencies = []
        self._periods = []
