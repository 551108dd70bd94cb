"""Inner optimizers after a worker has adopted the global model."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import LBFGS, Optimizer


def torch_optimizer(optimizer: Any) -> Optimizer:
    """Return the torch optimizer inside Lightning's wrapper, or the optimizer itself if it is not wrapped."""
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def reset_after_adoption(optimizer: Optimizer, diverged: bool, optimizer_reset: bool) -> None:
    """Adapt the state of an inner optimizer to weights that the optimizer has not reached itself.

    Running averages, such as those of Adam, stay unless an argument says otherwise.

    Args:
        optimizer: inner optimizer of a worker that has adopted the global model.
        diverged: whether the worker's round ended in values that are not finite. The adopted model is finite, so values
            in the optimizer's state that are not finite are set to zero.
        optimizer_reset: whether the server has asked for an empty optimizer state.

    """
    if optimizer_reset or isinstance(optimizer, LBFGS):
        # LBFGS remembers steps with the changes of the gradient along them. The way to the adopted weights is not one
        # of its steps, so its memory would be wrong.
        optimizer.state.clear()
    if diverged:
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor) and value.is_floating_point():
                    value.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
