"""What the progress of a run is counted in: local steps, or samples if workers have batch sizes of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lightning_async_localsgd.protocol.messages import Push


class StepSizes:
    """The *units* of a local step of each worker.

    Without batch sizes of their own, all workers have steps of one unit, so that units are local steps. With them, a
    unit is a sample, and a step of a worker has the samples of its batches.

    Args:
        reference: samples of a step as the script has it: the data loader's batch size times the accumulated batches.
            A worker that has announced nothing has steps of this size. 0 counts steps.

    Attributes:
        reference: see above.

    Example::

        >>> sizes = StepSizes(reference=64)
        >>> sizes.announce(1, 16)
        >>> sizes.of(0), sizes.of(1), sizes.smallest([0, 1])
        (64, 16, 16)
        >>> StepSizes().of(1)
        1

    """

    def __init__(self, reference: int = 0) -> None:
        self.reference = reference
        self._sizes: dict[int, int] = {}

    @property
    def counts_samples(self) -> bool:
        """Whether a unit is a sample."""
        return self.reference > 0

    @property
    def unit(self) -> int:
        """Units of a step of the script's own batch size."""
        return self.reference or 1

    def announce(self, worker: int, samples: int) -> None:
        """Note the samples of a worker's step; without effect if steps are counted."""
        if self.counts_samples:
            self._sizes[worker] = samples

    def of(self, worker: int) -> int:
        """Return the units of a worker's step."""
        return self._sizes.get(worker, self.unit)

    def smallest(self, workers: Iterable[int]) -> int:
        """Return the units of the smallest step of some workers."""
        return min((self.of(worker) for worker in workers), default=self.unit)

    def units(self, push: Push) -> int:
        """Return the units of a push. Of a step that its optimizer has skipped, samples count and the step does not."""
        return push.samples if self.counts_samples and push.steps > 0 else push.steps

    def equal_steps(self, workers: Iterable[int]) -> dict[int, float | None]:
        """Return speeds with which workers share units so that all take equally many steps."""
        return {worker: float(self.of(worker)) if self.counts_samples else None for worker in workers}
