"""What an outer optimizer is: the rule by which a worker's pseudo-gradient changes the global model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

CHUNK = 256 * 1024
"""Elements (1 MiB of fp32) that whole-model passes work on at a time: small enough to stay in the cache between the
operations of a rule, and the only scratch memory that a rule needs."""


class OuterOptimizer(ABC):
    """A recipe, and once :meth:`setup` was called, its state beside the global model.

    Constructing one is cheap and allocates nothing, so that it can be given as an option, pickled and copied. All
    state belongs to the parameters by name. Methods are called by one thread.
    """

    @abstractmethod
    def setup(self, theta: Tensor, views: Mapping[str, Tensor], workers: int) -> None:
        """Takes charge of a model and starts from fresh state.

        Args:
            theta: the global model's parameters, flat fp32; this very memory is changed by :meth:`step`.
            views: shaped views into ``theta`` by parameter name.
            workers: live workers, >= 1.

        Raises:
            ValueError: the hyper-parameters don't fit ``workers``.

        """

    @abstractmethod
    def step(self, gradient: Tensor, views: Mapping[str, Tensor]) -> None:
        """Applies one push to ``theta``, in place.

        Args:
            gradient: the pseudo-gradient (dispatched - local), flat and finite; must not be changed.
            views: shaped views into ``gradient`` by parameter name.

        """

    @abstractmethod
    def set_workers(self, workers: int) -> None:
        """From now on there are ``workers`` live workers, >= 1. May change ``theta``; never fails during training."""

    @property
    def momentum_buffer(self) -> Tensor | None:
        """The momentum as one flat tensor like ``theta``, for monitoring; None where a rule keeps none."""
        return None

    def restart_momentum(self) -> None:
        """Sets the momentum to zero; the rest of the state stays. Called between two steps, after :meth:`setup`.

        Raises:
            ValueError: the rule has no momentum that could be restarted. Depends on its hyper-parameters alone.

        """
        raise ValueError(
            f"{self!r} has no momentum that could be restarted; use a rule with a momentum > 0, such as"
            " DelayedNesterov(momentum=0.9), or no restarts"
        )

    @property
    def collects(self) -> bool:
        """Whether the rule itself averages N pushes, and so has to be given each push on its own."""
        return False

    @property
    def in_period(self) -> bool:
        """Whether pushes were taken in that are not in the momentum yet. Meaningful after :meth:`setup`."""
        return False

    @property
    def held_back(self) -> int:
        """Pushes that were taken in and have not moved ``theta`` yet. Meaningful after :meth:`setup`."""
        return 0

    @property
    def replaces_model(self) -> bool:
        """Whether every step is exactly ``theta - gradient``. Meaningful after :meth:`setup`.

        A single worker may then keep its weights as they are: the new global model is its local model, and two fp32
        subtractions would only round it.
        """
        return False

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Copies of the whole state: tensors by parameter name, and else what ``torch.load(weights_only=True)`` reads.

        Nothing in it shares memory with the rule.
        """

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``; called after :meth:`setup`, when ``theta`` has been restored.

        May change ``theta`` where the period or the number of workers is another one than when it was saved.

        Raises:
            ValueError: ``state`` is of another rule or model; the text names what does not fit. Nothing was changed.

        """


def chunks(*flats: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of :data:`CHUNK` elements of flat tensors of one length, side by side.

    Chunking changes no bit of what an elementwise operation computes.
    """
    for start in range(0, flats[0].numel(), CHUNK):
        yield tuple(flat[start : start + CHUNK] for flat in flats)


def check_named(what: str, saved: Any, views: Mapping[str, Tensor]) -> None:
    """Checks that ``saved`` holds exactly the tensors in ``views``, by name and shape.

    Raises:
        ValueError: it does not; the text begins with ``what`` and names the tensors.

    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"{what} must be a dictionary of tensors by name, got {type(saved).__name__}")
    missing = [name for name in views if name not in saved]
    unexpected = [str(name) for name in saved if name not in views]
    if missing or unexpected:
        parts = [f"{word} {names[:5]}" for word, names in (("lacks", missing), ("has unknown", unexpected)) if names]
        raise ValueError(f"{what} is of another model: it {' and '.join(parts)}")
    for name, view in views.items():
        shape = list(saved[name].shape) if isinstance(saved[name], Tensor) else type(saved[name]).__name__
        if shape != list(view.shape):
            raise ValueError(f"{what} is of another model: {name!r} is {shape}, expected {list(view.shape)}")
