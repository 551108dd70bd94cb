"""The interface of outer optimizers, which change the global model by the workers' pseudo-gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

CHUNK = 256 * 1024
"""Number of elements (1 MiB in fp32) that are processed at a time in passes over the whole model.

A chunk is small enough to stay in the CPU cache between the operations of an optimizer. It also limits the scratch
memory that an optimizer needs.
"""


class OuterOptimizer(ABC):
    """Base class of outer optimizers.

    The constructor stores hyper-parameters and allocates no tensors, so an instance can be used as an option, pickled
    and copied. :meth:`setup` attaches the instance to a model and allocates its state. State is saved by parameter
    name. All methods of one instance are called from one thread.
    """

    @abstractmethod
    def setup(self, theta: Tensor, views: Mapping[str, Tensor], workers: int) -> None:
        """Attach the optimizer to a model and reset its state.

        Args:
            theta: parameters of the global model, flat fp32. :meth:`step` changes this tensor in place.
            views: shaped views into ``theta`` by parameter name.
            workers: number of live workers, >= 1.

        Raises:
            ValueError: the hyper-parameters do not fit ``workers``.

        """

    @abstractmethod
    def step(self, gradient: Tensor, views: Mapping[str, Tensor]) -> None:
        """Apply one push to ``theta`` in place.

        Args:
            gradient: pseudo-gradient (dispatched minus local parameters), flat fp32 and finite. Must not be changed.
            views: shaped views into ``gradient`` by parameter name.

        """

    @abstractmethod
    def set_workers(self, workers: int) -> None:
        """Set the number of live workers, >= 1.

        May change ``theta``. Must not fail for any number of workers, because training is running.
        """

    def set_local_steps(self, local_steps: int) -> None:
        """Set H, the local steps of the fastest worker's round, >= 1. By default, rounds do not matter.

        Called before every dispatch. May change ``theta``, and must not fail.
        """
        return

    @property
    def momentum_buffer(self) -> Tensor | None:
        """The momentum as a flat tensor of the length of ``theta``, or None without a momentum. Read-only."""
        return None

    def restart_momentum(self) -> None:
        """Reset the momentum to zero and keep the rest of the state.

        Called between two steps, after :meth:`setup`.

        Raises:
            ValueError: the optimizer has no momentum that can be restarted. This depends on the hyper-parameters only.

        """
        raise ValueError(
            f"{self!r} has no momentum that can be restarted; use an outer optimizer with momentum > 0, such as"
            " DelayedNesterov(momentum=0.9), or do not restart the momentum"
        )

    @property
    def averages_pushes(self) -> bool:
        """Whether the optimizer averages N pushes itself, and therefore needs each push separately."""
        return False

    @property
    def in_period(self) -> bool:
        """Whether the momentum still lacks pushes that :meth:`step` has received. Valid after :meth:`setup`."""
        return False

    @property
    def unapplied_pushes(self) -> int:
        """Number of received pushes that have not changed ``theta`` yet. Valid after :meth:`setup`."""
        return 0

    @property
    def replaces_model(self) -> bool:
        """Whether every step is exactly ``theta - gradient``. Valid after :meth:`setup`.

        With a single worker, the new global model then equals the local model. The worker can keep its weights, which
        avoids the rounding of two fp32 subtractions.
        """
        return False

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the whole state.

        Tensors are stored by parameter name. ``torch.load(weights_only=True)`` can read all values, and none shares
        memory with the optimizer.
        """

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state.

        Called after :meth:`setup`, when ``theta`` has been restored. May change ``theta`` if the period or the number
        of workers differs from the saved one.

        Raises:
            ValueError: ``state`` belongs to another optimizer class or another model. The text names the difference,
                and nothing has been changed.

        """


def chunks(*flats: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views of :data:`CHUNK` elements of flat tensors that have the same length.

    Elementwise operations give the same bits on chunks as on whole tensors.
    """
    for start in range(0, flats[0].numel(), CHUNK):
        yield tuple(flat[start : start + CHUNK] for flat in flats)


def check_saved_tensors(what: str, saved: Any, views: Mapping[str, Tensor]) -> None:
    """Check that ``saved`` holds a tensor for each of ``views``, with its shape, and nothing else.

    Args:
        what: subject of the error's text.
        saved: tensors by parameter name, as read from a checkpoint.
        views: tensors of this run's model by parameter name.

    Raises:
        ValueError: ``saved`` does not match. The text names the tensors.

    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"{what} must be a dictionary of tensors by name, got {type(saved).__name__}")
    missing = [name for name in views if name not in saved]
    unexpected = [str(name) for name in saved if name not in views]
    if missing or unexpected:
        parts = [f"{word} {names[:5]}" for word, names in (("missing", missing), ("unexpected", unexpected)) if names]
        raise ValueError(f"{what} does not match this model: {', '.join(parts)}")
    for name, view in views.items():
        shape = list(saved[name].shape) if isinstance(saved[name], Tensor) else type(saved[name]).__name__
        if shape != list(view.shape):
            raise ValueError(f"{what} does not match this model: {name!r} is {shape}, expected {list(view.shape)}")


def check_saved_integers(owner: str, state: Mapping[str, Any], names: list[str]) -> None:
    """Check that ``state`` has an integer under each of ``names``.

    Raises:
        ValueError: an entry is missing or not an integer.

    """
    for name in names:
        if type(state.get(name)) is not int:
            raise ValueError(f"the saved state of {owner} has no integer {name!r}")


def parameter_slices(theta: Tensor, views: Mapping[str, Tensor]) -> dict[str, slice]:
    """Return the slice of ``theta`` that each of ``views`` covers, by parameter name."""
    starts = {name: view.storage_offset() - theta.storage_offset() for name, view in views.items()}
    return {name: slice(start, start + views[name].numel()) for name, start in starts.items()}
