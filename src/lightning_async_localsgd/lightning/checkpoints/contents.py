"""What a checkpoint contains of the global model and of the server."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_async_localsgd.runtime.base import STATE_FORMAT

if TYPE_CHECKING:
    from lightning.fabric.plugins import CheckpointIO


CHECKPOINT_KEY = "async_localsgd"
"""Key of the server's state in a checkpoint."""


def check_format(state: Mapping[str, Any], path: object) -> None:
    """Check that a checkpoint's server state can be read.

    Raises:
        ValueError: Another version of this package has written the state.

    """
    if state.get("format") != STATE_FORMAT:
        raise ValueError(
            f"{path} holds an async_localsgd state of format {state.get('format')}, but this version reads format "
            f"{STATE_FORMAT}; resume with the version of lightning-async-localsgd that has written it, or start a new "
            "run from its weights with load_from_checkpoint()"
        )


class SavedModel:
    """The tensors of a checkpoint that hold the global model, and its version.

    Args:
        version: version of the global model.
        tensors: tensors that together restore the model exactly; empty if the checkpoint has no such tensors.

    """

    def __init__(self, version: int = -1, tensors: Iterable[Tensor] = ()) -> None:
        self._version = version
        self._tensors = [weakref.ref(tensor) for tensor in tensors]

    def is_in(self, checkpoint: dict[str, Any], version: int) -> bool:
        """Return whether ``checkpoint`` restores the global model of ``version`` exactly.

        Callbacks and modules may have replaced the weights, for example by averages, or saved adapters only.
        """
        saved = {id(value) for value in checkpoint.get("state_dict", {}).values()}
        tensors = [reference() for reference in self._tensors]
        # The id of a deleted tensor may belong to another tensor now.
        return version == self._version and bool(tensors) and all(t is not None and id(t) in saved for t in tensors)


def without_theta(state: dict[str, Any]) -> dict[str, Any]:
    """Return the server's state without the global model, if the checkpoint holds the model exactly anyway."""
    return {**state, "model": {key: value for key, value in state["model"].items() if key != "theta"}}


def copy_to_host(tree: Any) -> Any:
    """Copy all tensors of a collection to the host's memory, each into memory of its own. Tied tensors stay tied."""
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
        return copies[id(tensor)]

    return apply_to_collection(tree, Tensor, copy)


def for_plugin(checkpoint: dict[str, Any], checkpoint_io: CheckpointIO) -> dict[str, Any]:
    """Return the checkpoint with copies of tensors that training changes, unless the plugin saves immediately.

    The global model and the server's state are copies already. Other tensors, mainly the optimizers' states, are copied
    for every plugin except Lightning's default one, because a plugin may still read them while training goes on.
    """
    if type(checkpoint_io) is TorchCheckpointIO:
        return checkpoint
    copied: dict[str, Any] = apply_to_collection(checkpoint, Tensor, lambda tensor: tensor.detach().clone())
    return copied
