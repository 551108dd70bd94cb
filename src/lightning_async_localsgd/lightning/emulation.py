"""Emulation of slow devices on a fast machine: a callback that gives every rank the speed of another device.

The paper emulates its heterogeneous devices in the same way (section 3, arXiv 2401.09135). A waiting rank sleeps, so
many emulated devices can share a few cores, as long as the cores can do their real work in time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from typing_extensions import override

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from lightning_async_localsgd.lightning.loop.synchronous_steps import SynchronousSteps

# The largest fraction of a step by which a late wake-up may shorten the next step.
_LARGEST_CREDIT = 0.1


class EmulatedDevices(pl.Callback):
    """Makes rank ``i`` take at least ``seconds_per_step[i]`` for each optimizer step, by sleeping.

    A step lasts from the end of the previous step to the update of the weights. It includes data loading and all
    batches of an accumulation window. The rank sleeps right after the update of the first optimizer. What a strategy
    does after the update, such as an exchange with other ranks, is therefore added to the emulated time, and so is
    validation. Steps that a gradient scaler skips are not slowed down. In the synchronous beginning of a run, the rank
    sleeps before gradients are averaged, for each local step whose gradients it hands in.

    If the operating system wakes a rank late, its next step is shorter by the same amount (by a tenth of a step at
    most), so that the emulated speed is met on average. If the real work takes longer than the emulated time, the rank
    does not sleep, and does not catch up later.

    Put this callback before other callbacks: their work at the end of a batch then counts as part of the next step.

    Args:
        seconds_per_step: seconds for each rank, in the order of ``trainer.global_rank``. There may be more entries than
            ranks.

    Raises:
        ValueError: ``seconds_per_step`` is empty, has an entry that is not a positive finite number, or has fewer
            entries than there are ranks.

    Example::

        >>> from lightning_async_localsgd import EmulatedDevices
        >>> devices = EmulatedDevices(seconds_per_step=[0.058, 0.075, 0.151, 0.333])
        >>> round(devices.total_speed(world_size=4), 1)
        40.2

    """

    def __init__(self, seconds_per_step: Sequence[float]) -> None:
        super().__init__()
        given: object = seconds_per_step
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise ValueError(f"seconds_per_step={seconds_per_step!r} must be a list with one number for each rank")
        if not seconds_per_step:
            raise ValueError("seconds_per_step=[] is empty: give one number of seconds for each rank")
        for rank, seconds in enumerate(seconds_per_step):
            if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
                raise ValueError(f"seconds_per_step[{rank}]={seconds!r} is not a number of seconds")
            if not (math.isfinite(seconds) and seconds > 0):
                raise ValueError(f"seconds_per_step[{rank}]={seconds!r} must be a positive, finite number of seconds")
        self.seconds_per_step = [float(seconds) for seconds in seconds_per_step]
        self._seconds = self.seconds_per_step[0]
        self._step_start: float | None = None
        self._update_end: float | None = None
        self._hook: RemovableHandle | None = None
        self._strategy: object = None

    def total_speed(self, world_size: int) -> float:
        """Return the optimizer steps per second of all ranks together, if no rank ever waits for another."""
        self._check_world_size(world_size)
        return sum(1.0 / seconds for seconds in self.seconds_per_step[:world_size])

    def _check_world_size(self, world_size: int) -> None:
        if len(self.seconds_per_step) < world_size:
            raise ValueError(
                f"seconds_per_step={self.seconds_per_step} has {len(self.seconds_per_step)} entries, but there are "
                f"{world_size} ranks: give one entry for each rank"
            )

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            # A late joiner has a rank above those that the training was started with.
            self._check_world_size(max(trainer.world_size, trainer.global_rank + 1))
            self._seconds = self.seconds_per_step[trainer.global_rank]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.optimizers:
            raise ValueError("EmulatedDevices needs an optimizer, but configure_optimizers returned none")
        self._step_start = self._update_end = None
        self._remove_hook()
        self._strategy = trainer.strategy
        self._hook = trainer.optimizers[0].register_step_post_hook(self._after_update)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._step_start is None:
            self._step_start = time.monotonic()

    @property
    def _synchronous_steps(self) -> SynchronousSteps | None:
        """The steps of the synchronous beginning, while the run is in it."""
        controller = getattr(self._strategy, "controller", None)
        steps: SynchronousSteps | None = getattr(controller, "synchronous_steps", None)
        return steps if steps is not None and steps.on else None

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps = self._synchronous_steps
        if steps is not None and steps.ends_local_step:
            self._end_step()

    def _after_update(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._synchronous_steps is None:
            self._end_step()
        else:
            self._step_start = time.monotonic()
        self._update_end = time.monotonic()

    def _end_step(self) -> None:
        """Sleep for the rest of the emulated time."""
        now = time.monotonic()
        # A step outside a training batch has no known start, so it is not slowed down.
        deadline = now if self._step_start is None else self._step_start + self._seconds
        credit = 0.0
        if deadline > now:
            time.sleep(deadline - now)
            now = time.monotonic()
            credit = min(now - deadline, _LARGEST_CREDIT * self._seconds)
        self._step_start = now - credit

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._update_end is not None and self._step_start is not None:
            # The strategy worked between the update and now. The next step starts after that.
            self._step_start += time.monotonic() - self._update_end
            self._update_end = None

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._step_start is not None:
            self._step_start = time.monotonic()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._remove_hook()

    def _remove_hook(self) -> None:
        self._strategy = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
