"""The second moments that the workers of a run average."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.lightning.loop.optimizer_reset import torch_optimizer
from lightning_async_localsgd.protocol.moments import SecondMoments

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lightning_async_localsgd.server.merge_policy import MergePolicy


def averaged_moments(policy: MergePolicy, frozen: bool, optimizers: Iterable[Any]) -> SecondMoments | None:
    """Return the second moments that several workers average; None if they do not.

    Args:
        policy: how pushes are merged.
        frozen: whether frozen parameters are exchanged. A callback then adds them to the optimizers in mid-run, so
            that the optimizers of a worker which joins later have other parameters.
        optimizers: optimizers of the trainer.

    """
    if frozen or not policy.averages_moments:
        return None
    return SecondMoments(torch_optimizer(optimizer) for optimizer in optimizers)
