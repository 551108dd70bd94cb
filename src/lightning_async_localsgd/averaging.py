"""Callbacks that average weights (EMA, SWA) average the global model, not what rank 0 has locally in mid-round.

They do so on rank 0, at its steps or epochs, and at the end of training all ranks get the average. Rank 0's local
weights are none that anybody would use: the average of a run is the average of its global model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor

from lightning_async_localsgd.trainer_parts import WEIGHT_AVERAGING, callbacks_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.phase_base import Phase


def averages(trainer: pl.Trainer) -> list[Any]:
    """The trainer's callbacks that average weights."""
    return [c for c in callbacks_of(trainer) if isinstance(c, (WEIGHT_AVERAGING, StochasticWeightAveraging))]


def forgo_second_pass(trainer: pl.Trainer) -> bool:
    """Has callbacks not plan one epoch more, in which they would measure BatchNorm's statistics for the average.

    No budget knows such an epoch, and no rank is at its start when another one is. The statistics are averaged instead.

    Returns:
        Whether one was planned.

    """
    planned = [
        c for c in averages(trainer) if isinstance(c, StochasticWeightAveraging) and c._model_contains_batch_norm
    ]
    for callback in planned:
        callback._model_contains_batch_norm = False
    return bool(planned)


class GlobalAverages:
    """Has a trainer's callbacks average the global model, until :meth:`release`. For rank 0.

    With a single rank they go on averaging what it has. With several, the trainer's global step may advance by more
    than one while rank 0 takes a step: an average over steps then takes the model as often as the callback wants for
    the steps that went by, so that it does not depend on rank 0's speed.

    Args:
        trainer: rank 0's trainer.
        phase: the asynchronous phase.
        global_epochs: whether the epochs of all ranks are the same ones.

    Raises:
        ValueError: a callback averages at the ends of epochs, and these are each rank's own.

    """

    def __init__(self, trainer: pl.Trainer, phase: Phase, global_epochs: bool) -> None:
        model = _GlobalModelView(phase) if phase.workers > 1 else None
        self._replaced: list[tuple[Any, str]] = []
        for callback in averages(trainer):
            if isinstance(callback, StochasticWeightAveraging):
                if model is not None and not global_epochs:
                    raise ValueError(
                        f"{type(callback).__name__} averages at the ends of epochs, which are each rank's own with this"
                        " training data; use WeightAveraging, which does so by steps"
                    )
                self._replace(callback, "update_parameters", _by_epochs(callback.update_parameters, model))
                self._replace(callback, "transfer_weights", _with_buffers(callback.transfer_weights))
            elif model is not None:
                steps = _StepsGoneBy(callback, model, trainer.global_step)
                self._replace(callback, "should_update", steps.should_update)
                self._replace(callback._average_model, "update_parameters", steps.update_parameters)

    def release(self) -> None:
        """The callbacks average what they are given again."""
        for owner, name in self._replaced:
            delattr(owner, name)  # The class's own shows again.
        self._replaced = []

    def _replace(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        setattr(owner, name, method)
        self._replaced.append((owner, name))


class _StepsGoneBy:
    """Stands between a ``WeightAveraging`` and its average, for which each of the run's global steps counts once.

    Args:
        callback: the callback.
        model: what is averaged.
        seen: global steps that have gone by.

    """

    def __init__(self, callback: Any, model: _GlobalModelView, seen: int) -> None:
        self._wants: Callable[..., bool] = callback.should_update
        self._update: Callable[[Any], None] = callback._average_model.update_parameters
        self._model = model
        self._seen = seen
        self._due = 0

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """The callback asks for the last global step only; how many of those since then it wants is remembered."""
        if step_idx is None:
            return self._wants(step_idx=step_idx, epoch_idx=epoch_idx)
        self._due += sum(bool(self._wants(step_idx=step)) for step in range(self._seen, step_idx + 1))
        self._seen = max(self._seen, step_idx + 1)
        return self._due > 0

    def update_parameters(self, _: Any) -> None:
        """Takes the model into the average as often as was wanted; once at an epoch's end."""
        for _ in range(max(1, self._due)):
            self._update(self._model)
        self._due = 0


def _by_epochs(update: Callable[..., None], model: _GlobalModelView | None) -> Callable[..., None]:
    """What stands in for ``StochasticWeightAveraging.update_parameters``: floating-point buffers are averaged, too."""

    @torch.no_grad()
    def updates(average: Any, module: Any, count: Tensor, mean_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        source = module if model is None else model
        for mean, value in zip(average.buffers(), source.buffers(), strict=True):
            now = value.to(mean.device)
            mean.copy_(mean_of(mean, now, count.to(mean.device)) if mean.is_floating_point() and count > 0 else now)
        update(average, source, count, mean_of)

    return updates


def _with_buffers(transfer: Callable[..., None]) -> Callable[..., None]:
    """What stands in for ``StochasticWeightAveraging.transfer_weights``."""

    @torch.no_grad()
    def transfers(average: Any, module: Any) -> None:
        transfer(average, module)
        for buffer, mean in zip(module.buffers(), average.buffers(), strict=True):
            buffer.copy_(mean)

    return transfers


class _GlobalModelView:
    """What averaging asks of a module, its tensors in order; those of the global model where they are exchanged."""

    def __init__(self, phase: Phase) -> None:
        self._phase = phase
        self._version = -1
        self._values: dict[str, Tensor] = {}

    def parameters(self) -> Iterator[Tensor]:
        return self._shown(self._phase.module.named_parameters())

    def buffers(self) -> Iterator[Tensor]:
        return self._shown(self._phase.module.named_buffers())

    def _shown(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[Tensor]:
        server, binding = self._phase.server, self._phase.binding
        assert server is not None
        if server.view.version != self._version:
            flat = torch.empty(binding.layout.numel, dtype=torch.float32)
            self._version = server.copy_model(flat)
            views = binding.layout.views(flat)
            self._values = {name: views[name].to(own.device, own.dtype) for name, own in binding.named().items()}
        for name, tensor in tensors:
            yield self._values.get(name, tensor)
