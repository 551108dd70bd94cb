"""Callbacks that average weights (EMA, SWA) average the global model, not rank 0's local weights within a round.

They average on rank 0, after its steps or epochs. At the end of training all ranks get the average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_async_localsgd.lightning.trainer_access.callbacks import (
    EMA_WEIGHT_AVERAGING,
    WEIGHT_AVERAGING,
    average_of,
    callbacks_of,
    cancel_batch_norm_epoch,
)

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.policies.plan import RunBudget
    from lightning_async_localsgd.runtime.base import Runtime


def averaging_callbacks(trainer: pl.Trainer) -> list[Any]:
    """Return the trainer's callbacks that average weights."""
    return [c for c in callbacks_of(trainer) if isinstance(c, (WEIGHT_AVERAGING, StochasticWeightAveraging))]


def cancel_batch_norm_epochs(trainer: pl.Trainer) -> bool:
    """Cancel additional epochs in which callbacks would measure BatchNorm statistics for the averaged weights.

    The budget does not contain such an epoch, and ranks do not begin it at the same time. Instead,
    :class:`GlobalAverages` averages the statistics as well.

    Returns:
        Whether such an epoch was planned.

    """
    swa = [callback for callback in averaging_callbacks(trainer) if isinstance(callback, StochasticWeightAveraging)]
    were_planned = [cancel_batch_norm_epoch(callback) for callback in swa]
    return any(were_planned)


class GlobalAverages:
    """Make the callbacks of rank 0's trainer average the global model, until :meth:`restore`.

    With a single worker, callbacks average the module as usual. With several workers, ``trainer.global_step`` may grow
    by more than one with each step of rank 0. A callback that averages by steps then adds the model to its average once
    for each global step that the callback selects, so that the average does not depend on rank 0's speed.

    Args:
        trainer: rank 0's trainer.
        runtime: rank 0's part in asynchronous training.
        global_epochs: whether all ranks have the same epochs.
        budget: planned steps of the run.

    Raises:
        ValueError: A callback averages at the ends of epochs, but each rank has epochs of its own.

    """

    def __init__(self, trainer: pl.Trainer, runtime: Runtime, global_epochs: bool, budget: RunBudget) -> None:
        self._runtime = runtime
        self._by_steps = [
            callback for callback in averaging_callbacks(trainer) if isinstance(callback, WEIGHT_AVERAGING)
        ]
        for callback in self._by_steps:
            _warn_if_it_cannot_begin(callback, budget, runtime.step_offset)
        model = _GlobalModelView(runtime) if runtime.workers > 1 else None
        self._replaced: list[tuple[Any, str]] = []
        for callback in averaging_callbacks(trainer):
            if isinstance(callback, StochasticWeightAveraging):
                if model is not None and not global_epochs:
                    raise ValueError(
                        f"{type(callback).__name__} averages at the ends of epochs, but with this training data each "
                        "rank has epochs of its own; use WeightAveraging, which averages by steps"
                    )
                self._replace(callback, "update_parameters", _update_with_buffers(callback.update_parameters, model))
                self._replace(callback, "transfer_weights", _transfer_with_buffers(callback.transfer_weights))
            elif model is not None:
                steps = _GlobalSteps(callback, model, trainer.global_step)
                self._replace(callback, "should_update", steps.should_update)
                self._replace(average_of(callback), "update_parameters", steps.update_parameters)

    def restore(self) -> None:
        """Make the callbacks average the module again. Warn of callbacks that have averaged nothing."""
        if self._runtime.stopped:
            for callback in self._by_steps:
                if int(average_of(callback).n_averaged) == 0:
                    rank_zero_warn(
                        f"{type(callback).__name__} has averaged no model in this run, so its average is still the "
                        "initial model, and that is what training has left in the module. Let it begin earlier, or "
                        "remove it"
                    )
        for owner, name in self._replaced:
            delattr(owner, name)  # The method of the class becomes visible again.
        self._replaced = []

    def _replace(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        setattr(owner, name, method)
        self._replaced.append((owner, name))


class _GlobalSteps:
    """Methods of a ``WeightAveraging`` and its averaged model, for which each global step of the run counts once.

    Args:
        callback: the callback.
        model: the model to average.
        steps_done: global steps so far.

    """

    def __init__(self, callback: Any, model: _GlobalModelView, steps_done: int) -> None:
        self._selects: Callable[..., bool] = callback.should_update
        self._update: Callable[[Any], None] = average_of(callback).update_parameters
        self._model = model
        self._steps_done = steps_done
        self._due = 0

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Return whether an update is due, and count the updates for all global steps since the last call.

        The trainer asks about its current global step only.
        """
        if step_idx is None:
            return self._selects(step_idx=step_idx, epoch_idx=epoch_idx)
        self._due += sum(bool(self._selects(step_idx=step)) for step in range(self._steps_done, step_idx + 1))
        self._steps_done = max(self._steps_done, step_idx + 1)
        return self._due > 0

    def update_parameters(self, _: Any) -> None:
        """Add the model to the average once for each update that is due, or once at the end of an epoch."""
        for _ in range(max(1, self._due)):
            self._update(self._model)
        self._due = 0


def _warn_if_it_cannot_begin(callback: Any, budget: RunBudget, step_offset: int) -> None:
    """Warn if an exponential average begins after the planned end of the run. Its average stays the initial model."""
    if not isinstance(callback, EMA_WEIGHT_AVERAGING) or budget.steps_per_rank is None:
        return
    if type(callback).should_update is not EMA_WEIGHT_AVERAGING.should_update:
        return  # The user's own rule is known only when it is asked.
    steps, epochs = budget.steps_per_rank + step_offset, len(budget.epochs)
    every, start = callback.update_every_n_steps, callback.update_starting_at_step or 0
    by_steps = every > 0 and math.ceil(start / every) * every < steps
    first_epoch = callback.update_starting_at_epoch
    if by_steps or (first_epoch is not None and (not epochs or first_epoch < epochs)):
        return
    ends = f"after {steps} global steps" + (f" and {epochs} epochs" if epochs else "")
    rank_zero_warn(
        f"{type(callback).__name__}(update_starting_at_step={callback.update_starting_at_step}, "
        f"update_starting_at_epoch={first_epoch}, update_every_n_steps={every}) cannot begin, because this run ends "
        f"{ends}. Its average stays the initial model, which is validated, saved, and left in the module. Let it begin "
        "earlier, or train longer"
    )


def _update_with_buffers(update: Callable[..., None], model: _GlobalModelView | None) -> Callable[..., None]:
    """Return a ``StochasticWeightAveraging.update_parameters`` that averages floating-point buffers, too."""

    @torch.no_grad()
    def update_parameters(
        average: Any, module: Any, count: Tensor, mean_of: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> None:
        source = module if model is None else model
        for mean, value in zip(average.buffers(), source.buffers(), strict=True):
            now = value.to(mean.device)
            mean.copy_(mean_of(mean, now, count.to(mean.device)) if mean.is_floating_point() and count > 0 else now)
        update(average, source, count, mean_of)

    return update_parameters


def _transfer_with_buffers(transfer: Callable[..., None]) -> Callable[..., None]:
    """Return a ``StochasticWeightAveraging.transfer_weights`` that copies buffers, too."""

    @torch.no_grad()
    def transfer_weights(average: Any, module: Any) -> None:
        transfer(average, module)
        for buffer, mean in zip(module.buffers(), average.buffers(), strict=True):
            buffer.copy_(mean)

    return transfer_weights


class _GlobalModelView:
    """The module's parameters and buffers in order, with the global model's values where these are exchanged."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._version = -1
        self._values: dict[str, Tensor] = {}

    def parameters(self) -> Iterator[Tensor]:
        return self._global_values(self._runtime.module.named_parameters())

    def buffers(self) -> Iterator[Tensor]:
        return self._global_values(self._runtime.module.named_buffers())

    def _global_values(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[Tensor]:
        server, binding = self._runtime.server, self._runtime.binding
        assert server is not None
        if server.snapshot.version != self._version:
            flat = torch.empty(binding.layout.numel, dtype=torch.float32)
            self._version = server.copy_model(flat)
            views = binding.layout.views(flat)
            self._values = {name: views[name].to(own.device, own.dtype) for name, own in binding.named().items()}
            for name, (own, value) in self._runtime.shared_parameters().items():
                self._values[name] = value.to(own.device, own.dtype)
        for name, tensor in tensors:
            yield self._values.get(name, tensor)
