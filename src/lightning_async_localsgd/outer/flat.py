"""The base class of outer optimizers that work on flat tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_async_localsgd.outer.base import CHUNK, OuterOptimizer, check_saved_tensors, chunks, parameter_slices


class FlatOptimizer(OuterOptimizer):
    """Base class of outer optimizers whose state consists of flat vectors as long as the model.

    This class allocates the vectors, restarts the momentum, and saves and loads the vectors by parameter name. A
    subclass lists its vectors in :attr:`vector_names` and implements :meth:`step` and :meth:`set_workers`. If it
    counts anything, it extends :meth:`setup`, :meth:`state_dict` and :meth:`load_state_dict`.

    Args:
        lr: learning rate, checked by the subclass.
        momentum: decay rate of the vector ``"momentum"``, checked by the subclass. 0 turns the momentum off.

    Attributes:
        vector_names: names of the vectors, used as keys of the saved state. Without ``"momentum"``, there is none.

    Example::

        >>> class HeavyBall(FlatOptimizer):
        ...     def step(self, gradient, views):
        ...         for theta, m, g in self._chunks(gradient):
        ...             m.mul_(self.momentum).add_(g)
        ...             theta.add_(m, alpha=-self.lr)
        ...
        ...     def set_workers(self, workers):
        ...         pass
        >>> theta = torch.ones(2)
        >>> outer_optimizer = HeavyBall(lr=0.5, momentum=0.9)
        >>> outer_optimizer.setup(theta, {"w": theta}, workers=1)
        >>> outer_optimizer.step(torch.ones(2), {})
        >>> theta
        tensor([0.5000, 0.5000])
        >>> outer_optimizer.state_dict()
        {'momentum': {'w': tensor([1., 1.])}}

    """

    vector_names: tuple[str, ...] = ("momentum",)

    def __init__(self, lr: float, momentum: float) -> None:
        self.lr = lr
        self.momentum = momentum
        self._theta: Tensor | None = None

    @override
    def setup(self, theta: Tensor, views: Mapping[str, Tensor], workers: int) -> None:
        self._check_workers(workers)
        # -0.0 instead of 0.0, because -0.0 + x is x for every x. The first sum then equals its only summand bit for
        # bit, even if that is -0.0.
        self._vectors = {name: torch.full_like(theta, -0.0) for name in self.vector_names}
        slices = parameter_slices(theta, views)
        self._parts = {
            name: {parameter: vector[slices[parameter]].view_as(view) for parameter, view in views.items()}
            for name, vector in self._vectors.items()
        }
        self._scratch = torch.empty(min(CHUNK, theta.numel()), dtype=theta.dtype)
        self._theta = theta

    @property
    @override
    def momentum_buffer(self) -> Tensor | None:
        self._ready()
        return self._vectors.get("momentum")

    @override
    def restart_momentum(self) -> None:
        self._ready()
        if self.momentum == 0.0:
            super().restart_momentum()
        self._vectors["momentum"].fill_(-0.0)

    @override
    def state_dict(self) -> dict[str, Any]:
        self._ready()
        return {
            name: {parameter: part.clone() for parameter, part in parts.items()} for name, parts in self._parts.items()
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ready()
        for name, parts in self._parts.items():
            check_saved_tensors(f"the saved {name!r} of {type(self).__name__}", state.get(name), parts)
        for name, parts in self._parts.items():
            for parameter, part in parts.items():
                part.copy_(state[name][parameter])

    def _chunks(self, *flats: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield chunks of the model, of each vector in the order of :attr:`vector_names`, and of each of ``flats``."""
        return chunks(self._ready(), *self._vectors.values(), *flats)

    def _descend(self, theta: Tensor, g: Tensor, m: Tensor, lr: float, weight: float) -> None:
        """Apply theta -= lr*(g + weight*m) to a chunk of the model.

        These are the operations of ``torch.optim.SGD(nesterov=True)``, in the same order, so the bits are the same.
        """
        theta.add_(torch.add(g, m, alpha=weight, out=self._scratch[: g.numel()]), alpha=-lr)

    def _check_workers(self, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"{type(self).__name__}: workers must be >= 1, got {workers}")

    def _ready(self) -> Tensor:
        """Return the model.

        Raises:
            RuntimeError: :meth:`setup` has not been called.

        """
        if self._theta is None:
            raise RuntimeError(f"{type(self).__name__} was used before setup()")
        return self._theta
