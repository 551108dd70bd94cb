"""What was tried and is no option of the strategy: momentum that grows, and rounds that change their length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor
from typing_extensions import override

from lightning_async_localsgd.outer import DelayedNesterov
from lightning_async_localsgd.policies.pacing import SpeedAwareSteps

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy


class GrowingMomentum(DelayedNesterov):
    """Delayed Nesterov whose momentum grows in proportion to the progress of the run.

    ``lr / (1 - momentum)`` stays what it is without momentum, so that k equal pushes move the model equally far.

    Args:
        lr: learning rate at the beginning, when the momentum is 0.
        momentum: momentum at the end of the run.

    Attributes:
        progress: returns the share of the run that is over.

    """

    def __init__(self, lr: float, momentum: float) -> None:
        super().__init__(lr, momentum)
        self.progress: Callable[[], float] = lambda: 0.0
        self._first_lr, self._last_momentum = lr, momentum

    @override
    def step(self, gradient: Tensor, views: Mapping[str, Tensor]) -> None:
        if not self.in_period:
            self.momentum = self._last_momentum * self.progress()
            self.lr = self._first_lr * (1.0 - self.momentum)
        super().step(gradient, views)


class TwoLengths(SpeedAwareSteps):
    """Speed-aware local steps whose H changes after half of the run.

    Args:
        early: H in the first half.
        late: H in the second half.
        dynamic: whether slower workers take fewer steps.
        progress: returns the share of the run that is over.

    """

    def __init__(self, early: int, late: int, dynamic: bool, progress: Callable[[], float]) -> None:
        super().__init__(late, dynamic)
        self._early, self._late = early, late
        self._progress = progress

    @property
    @override
    def local_steps(self) -> int:
        return self._early if self._progress() < 0.5 else self._late


def follow_progress(
    strategy: SimulatedAsyncLocalSGDStrategy, trainer: pl.Trainer, early_local_steps: int | None
) -> None:
    """Let what changes during a run follow the progress of its trainer.

    Args:
        strategy: the strategy of the run.
        trainer: the trainer, which has ``max_steps``.
        early_local_steps: H in the first half of the run; None is the strategy's.

    """

    def progress() -> float:
        return trainer.global_step / trainer.max_steps

    if isinstance(strategy.outer_optimizer, GrowingMomentum):
        strategy.outer_optimizer.progress = progress
    if early_local_steps is not None:
        pacing = strategy.pacing
        strategy.pacing = TwoLengths(early_local_steps, pacing.local_steps, pacing.dynamic, progress)
