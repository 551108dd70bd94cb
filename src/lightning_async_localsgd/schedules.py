"""Learning-rate schedulers that follow the progress of the data, not of one worker's own steps.

Lightning steps a scheduler of ``interval="step"`` once for every local step of its rank. With workers of unequal speed
a fast one would run through the schedule early and a slow one stay behind. So, while ranks run asynchronously, these
schedulers are stepped here: as often as there have been local steps of all workers together, divided by the number of
workers (the paper's equation 3, over the whole run). A merge never restarts them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.trainer import call

if TYPE_CHECKING:
    import lightning.pytorch as pl

_NEVER = 2**62
"""A frequency at which Lightning never gets to step a scheduler itself."""


class ProgressSchedulers:
    """Takes over the step-wise schedulers of a trainer until :meth:`release`.

    ``ReduceLROnPlateau`` and epoch-wise schedulers stay with Lightning, and so does everything under manual
    optimization, where the module steps its schedulers itself.

    Args:
        trainer: the trainer, its schedulers restored if it resumes.
        progress: local steps of all workers / number of workers that the schedulers have already seen.

    """

    def __init__(self, trainer: pl.Trainer, progress: float) -> None:
        self._trainer = trainer
        module = trainer.lightning_module
        self._configs = [
            config
            for config in trainer.strategy.lr_scheduler_configs
            if module.automatic_optimization and config.interval == "step" and not config.reduce_on_plateau
        ]
        self._frequencies = [config.frequency for config in self._configs]
        self._taken = [int(progress // frequency) for frequency in self._frequencies]
        for config in self._configs:
            config.frequency = _NEVER

    def advance(self, progress: float) -> None:
        """Steps every scheduler as often as ``progress`` asks for. Going back is not possible and does nothing."""
        for index, (config, frequency) in enumerate(zip(self._configs, self._frequencies, strict=True)):
            # The progress is a sum of estimates; a hair below a whole number is that number.
            for _ in range(self._taken[index], int((progress + 1e-6) // frequency)):
                call._call_lightning_module_hook(self._trainer, "lr_scheduler_step", config.scheduler, None)
                self._taken[index] += 1

    def release(self) -> None:
        """Gives the schedulers back to Lightning."""
        for config, frequency in zip(self._configs, self._frequencies, strict=True):
            config.frequency = frequency
        self._configs = []
        self._frequencies = []
