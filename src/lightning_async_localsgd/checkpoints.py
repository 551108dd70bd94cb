"""What a checkpoint holds of the global model and of the server."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

if TYPE_CHECKING:
    from lightning.fabric.plugins import CheckpointIO


CHECKPOINT_KEY = "async_localsgd"
"""Where a checkpoint holds the server's state."""


class SavedModel:
    """Which tensors of a checkpoint are the global model, and of which version.

    Args:
        version: of the global model.
        restoring: tensors that restore it to the last bit, all together; none if there are no such tensors.

    """

    def __init__(self, version: int = -1, restoring: Iterable[Tensor] = ()) -> None:
        self._version = version
        self._restoring = [weakref.ref(tensor) for tensor in restoring]

    def is_in(self, checkpoint: dict[str, Any], version: int) -> bool:
        """Whether ``checkpoint`` is sure to restore the global model of ``version``.

        Callbacks and modules may have put something else there: averaged weights, or adapters only.
        """
        there = {id(value) for value in checkpoint.get("state_dict", {}).values()}
        tensors = [reference() for reference in self._restoring]
        # A tensor that is gone may have left its id to another one.
        return version == self._version and bool(tensors) and all(t is not None and id(t) in there for t in tensors)


def without_theta(state: dict[str, Any]) -> dict[str, Any]:
    """The server's state without the global model, which the checkpoint holds to the last bit anyway."""
    return {**state, "model": {key: value for key, value in state["model"].items() if key != "theta"}}


def on_host(tree: Any) -> Any:
    """The same with copies of all tensors in the host's memory, each with memory of its own."""
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:  # Tied weights stay one tensor.
            copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
        return copies[id(tensor)]

    return apply_to_collection(tree, Tensor, copy)


def frozen_in_time(checkpoint: dict[str, Any], checkpoint_io: CheckpointIO) -> dict[str, Any]:
    """The checkpoint with tensors that training doesn't change any more.

    The global model and the server's state are copies anyway. The rest, above all the optimizers' states, has to be
    copied for a plugin that may still be reading while training goes on, which is any but Lightning's plain one.
    """
    if type(checkpoint_io) is TorchCheckpointIO:
        return checkpoint
    copied: dict[str, Any] = apply_to_collection(checkpoint, Tensor, lambda tensor: tensor.detach().clone())
    return copied
