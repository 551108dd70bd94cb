"""The steps of the synchronous beginning with virtual workers, which contribute to a step one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_async_localsgd.lightning.loop.synchronous_steps import SynchronousSteps

if TYPE_CHECKING:
    from collections.abc import Callable

    import lightning.pytorch as pl

    from lightning_async_localsgd.lightning.simulated.data import SimulatedData
    from lightning_async_localsgd.simulation.runtime import SimulatedRuntime


class SimulatedSynchronousSteps(SynchronousSteps):
    """Let virtual workers contribute to synchronous steps.

    Every contribution is computed from the weights that all workers have. Lightning steps the optimizer at the end of
    the last one, as :class:`.SimulatedData` tells it.

    Args:
        trainer: the trainer.
        runtime: the virtual workers.
        data: the training data.
        begin_contribution: called when another worker's contribution to the same step begins.

    """

    def __init__(
        self,
        trainer: pl.Trainer,
        runtime: SimulatedRuntime,
        data: SimulatedData,
        begin_contribution: Callable[[], None],
    ) -> None:
        super().__init__(trainer, runtime)
        self._virtual = runtime
        self._data = data
        self._begin_contribution = begin_contribution

    @override
    def _control(self) -> None:
        return  # The data decides when Lightning steps.

    @override
    def before_batch(self) -> None:
        if self.on:
            if self._data.begins_contribution:
                self._batches = 0
                self._averaged = False
            self._batches += 1

    @override
    def after_batch(self, stepped: bool) -> None:
        if not self.on or stepped:
            return
        if self._data.ends_local_step:
            self._runtime.count_gradients()
        if self._data.ends_contribution:
            self._virtual.push_gradients(self._factor)
            self._begin_contribution()
