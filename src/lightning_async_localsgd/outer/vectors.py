"""Flat vectors beside the global model: what outer optimizers keep, such as a momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_async_localsgd.outer.base import check_named


class ModelVectors:
    """Vectors like ``theta``, at rest at first, whose parts are saved under the parameters' names.

    A checkpoint can so be gone on from by a model that has its parameters in another order.

    Args:
        owner: the rule that keeps them, for errors.
        theta: the global model's parameters, flat.
        views: shaped views into ``theta`` by parameter name.
        names: of the vectors.

    Example::

        >>> theta = torch.ones(2)
        >>> vectors = ModelVectors("SomeRule", theta, {"w": theta}, ["momentum"])
        >>> vectors["momentum"].add_(1.0)
        tensor([1., 1.])
        >>> vectors.state_dict()
        {'momentum': {'w': tensor([1., 1.])}}

    """

    def __init__(self, owner: str, theta: Tensor, views: Mapping[str, Tensor], names: list[str]) -> None:
        self._owner = owner
        # Negative zeros, because -0 + x is x for every x: the first momentum is then the first mean bit for bit, the
        # sign of a zero included.
        self._flat = {name: torch.full_like(theta, -0.0) for name in names}
        places = slices(theta, views)
        self._views = {
            name: {parameter: flat[places[parameter]].view_as(view) for parameter, view in views.items()}
            for name, flat in self._flat.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._flat[name]

    def rest(self, name: str) -> None:
        """Sets a vector to zero, as it was at first."""
        self._flat[name].fill_(-0.0)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Copies, by vector and parameter."""
        return {
            name: {parameter: view.clone() for parameter, view in views.items()} for name, views in self._views.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies every vector from ``state``, which may hold other things besides.

        Raises:
            ValueError: a vector is missing or of another model. Nothing was changed.

        """
        for name, views in self._views.items():
            check_named(f"the saved {name!r} of {self._owner}", state.get(name), views)
        for name, views in self._views.items():
            for parameter, view in views.items():
                view.copy_(state[name][parameter])


def slices(theta: Tensor, views: Mapping[str, Tensor]) -> dict[str, slice]:
    """Where in ``theta`` each of the ``views`` into it lies."""
    starts = {name: view.storage_offset() - theta.storage_offset() for name, view in views.items()}
    return {name: slice(start, start + views[name].numel()) for name, start in starts.items()}


def check_integers(owner: str, state: Mapping[str, Any], names: list[str]) -> None:
    """Checks that ``state`` has an integer under each of the ``names``.

    Raises:
        ValueError: it has not.

    """
    for name in names:
        if type(state.get(name)) is not int:
            raise ValueError(f"the saved state of {owner} lacks {name!r}, or it is no integer")
