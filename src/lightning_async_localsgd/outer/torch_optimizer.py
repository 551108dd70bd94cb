"""Any ``torch.optim.Optimizer`` as outer optimizer, one step per push."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_async_localsgd.outer.base import OuterOptimizer
from lightning_async_localsgd.outer.vectors import slices

MOMENTA = ("momentum_buffer", "exp_avg")
"""How torch's optimizers name their momentum."""


class TorchOptimizer(OuterOptimizer):
    """Takes one step of a torch optimizer for each push, with the pseudo-gradient as gradient.

    The learning rate is the one of a single push: nothing is divided by the number of workers. With momentum and
    several workers this is the plain asynchronous rule that the paper warns of (section 4); it is here to compare
    with, and for optimizers of your own.

    A parameter that no worker has ever moved (frozen, or never used) is left alone, weight decay included.

    Args:
        optimizer: a subclass of ``torch.optim.Optimizer``, or a callable that makes one from an iterable of
            parameters.
        **kwargs: further arguments of ``optimizer``. They count also after a checkpoint with others was loaded; what
            is not given here is as it was in the checkpoint.

    Raises:
        TypeError: ``optimizer`` is neither, or does not take the arguments.
        ValueError: the optimizer refuses a value, has a learning rate <= 0, or can't be stepped once per push.

    Example::

        >>> from lightning_async_localsgd.outer import TorchOptimizer
        >>> theta = torch.ones(2)
        >>> rule = TorchOptimizer(torch.optim.SGD, lr=0.5)
        >>> rule.setup(theta, {"w": theta}, workers=2)
        >>> gradient = torch.tensor([0.4, 0.0])
        >>> rule.step(gradient, {"w": gradient})
        >>> theta
        tensor([0.8000, 1.0000])

    """

    def __init__(self, optimizer: Callable[[Iterable[Any]], Optimizer], **kwargs: Any) -> None:
        if not callable(optimizer):
            raise TypeError(
                f"outer optimizer: expected a torch.optim.Optimizer class or a callable that makes one, got"
                f" {str(optimizer)[:40]!r}; write for example TorchOptimizer(torch.optim.SGD, lr=0.7)"
            )
        self._factory: Callable[[Iterable[Any]], Optimizer] = functools.partial(optimizer, **kwargs)
        self._name = getattr(optimizer, "__name__", type(optimizer).__name__)
        self._replaces_model, self._momentum_name = self._try_out()
        self._optimizer: Optimizer | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> TorchOptimizer:
        # What makes the optimizer is the user's, and may know anything: that of a command line knows the trainer.
        copied = object.__new__(type(self))
        for name, value in self.__dict__.items():
            setattr(copied, name, value if name == "_factory" else copy.deepcopy(value, memo))
        return copied

    def __repr__(self) -> str:
        return f"TorchOptimizer({self._factory!r})"

    @override
    def setup(self, theta: Tensor, views: Mapping[str, Tensor], workers: int) -> None:
        # `nn.Parameter` shares the view's memory: the optimizer works on the global model itself.
        self._parameters = {name: nn.Parameter(view) for name, view in views.items()}
        self._optimizer = self._factory(list(self._parameters.values()))
        self._moved: set[str] = set()
        self._momentum = torch.zeros_like(theta) if self._momentum_name else None
        self._places = slices(theta, views)

    @override
    def step(self, gradient: Tensor, views: Mapping[str, Tensor]) -> None:
        optimizer = self._ready()
        for name, parameter in self._parameters.items():
            view = views[name]
            if name not in self._moved and bool(view.any()):
                self._moved.add(name)
            parameter.grad = view if name in self._moved else None
        optimizer.step()
        # The push's buffer belongs to somebody else as soon as this returns.
        for parameter in self._parameters.values():
            parameter.grad = None
        self._gather_momentum()

    @override
    def set_workers(self, workers: int) -> None:
        """Changes nothing: the learning rate is per push."""

    @property
    @override
    def momentum_buffer(self) -> Tensor | None:
        """Where the optimizer keeps one under a name that torch's have for it."""
        self._ready()
        return self._momentum

    @override
    def restart_momentum(self) -> None:
        # What others keep is tied to their count of steps.
        if self._momentum is None or not isinstance(self._ready(), torch.optim.SGD):
            super().restart_momentum()
        else:
            self._momentum.fill_(-0.0)

    @property
    @override
    def replaces_model(self) -> bool:
        return self._replaces_model if self._optimizer is None else _subtracts(self._optimizer)

    @override
    def state_dict(self) -> dict[str, Any]:
        optimizer = self._ready()
        names = list(self._parameters)
        saved = optimizer.state_dict()
        return {
            "optimizer": type(optimizer).__name__,
            "parameters": {name: list(parameter.shape) for name, parameter in self._parameters.items()},
            "moved": [name for name in names if name in self._moved],
            "state": {
                names[index]: {key: _copy(value) for key, value in state.items()}
                for index, state in saved["state"].items()
            },
            "groups": [
                {**{key: _copy(value) for key, value in group.items()}, "params": [names[i] for i in group["params"]]}
                for group in saved["param_groups"]
            ],
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        optimizer = self._ready()
        missing = [key for key in ("optimizer", "parameters", "moved", "state", "groups") if key not in state]
        if missing:
            raise ValueError(f"the saved state of the outer optimizer lacks {missing}")
        if state["optimizer"] != type(optimizer).__name__:
            raise ValueError(
                f"the checkpoint was written with outer optimizer {state['optimizer']}, this run has"
                f" {type(optimizer).__name__}; use the same, or start from the checkpoint's weights only"
            )
        shapes = {name: list(parameter.shape) for name, parameter in self._parameters.items()}
        different = sorted(
            name
            for name in shapes.keys() | state["parameters"].keys()
            if shapes.get(name) != state["parameters"].get(name)
        )
        if different:
            raise ValueError(
                f"the saved outer optimizer is of another model: names or shapes of {different[:5]} differ from this"
                " model's"
            )
        index = {name: i for i, name in enumerate(shapes)}
        present = optimizer.state_dict()["param_groups"]
        # torch assigns state by position within the groups, so theirs must list the same parameters in this order.
        groups = [{**group, "params": sorted(index[name] for name in group["params"])} for group in state["groups"]]
        if [group["params"] for group in groups] != [sorted(group["params"]) for group in present]:
            raise ValueError("the saved outer optimizer has other parameter groups than this run's")
        optimizer.load_state_dict(
            {
                "state": {
                    index[name]: {key: _copy(value) for key, value in values.items()}
                    for name, values in state["state"].items()
                },
                "param_groups": groups,
            }
        )
        given = self._factory.keywords  # type: ignore[attr-defined]
        for group in optimizer.param_groups:
            group.update({key: value for key, value in given.items() if key in group})
        self._moved = set(state["moved"])
        if self._momentum is not None:
            self._momentum.zero_()
            self._gather_momentum()

    def _gather_momentum(self) -> None:
        """Moves the parts of the momentum into one flat vector, on which the optimizer then goes on working."""
        if self._momentum is None or self._momentum_name is None:
            return
        optimizer = self._ready()
        for name, parameter in self._parameters.items():
            state = optimizer.state.get(parameter, {})
            part = state.get(self._momentum_name)
            place = self._momentum[self._places[name]]
            if isinstance(part, Tensor) and part.shape == parameter.shape and part.data_ptr() != place.data_ptr():
                state[self._momentum_name] = place.copy_(part.flatten()).view_as(parameter)

    def _try_out(self) -> tuple[bool, str | None]:
        """One step on a matrix of one element, so that bad arguments are named now and not when training has begun.

        Returns:
            Whether a step subtracts the gradient and nothing else, and the name of the momentum in the state, if any.

        """
        parameter = nn.Parameter(torch.zeros(1, 1))
        optimizer: object = self._factory([parameter])
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"outer optimizer: {self._name} made {optimizer!r}, which is no torch.optim.Optimizer; give a torch"
                " optimizer's class or a callable that makes one from parameters"
            )
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"outer optimizer: {self._name} evaluates the loss again and again in a step, which the server can't;"
                " use one that steps on gradients alone, such as torch.optim.SGD"
            )
        for group in optimizer.param_groups:
            if "lr" in group and not float(group["lr"]) > 0.0:
                raise ValueError(f"outer optimizer: lr of {self._name} must be > 0, got {float(group['lr'])}")
        parameter.grad = torch.zeros(1, 1)
        try:
            optimizer.step()
        except RuntimeError as error:
            raise ValueError(
                f"outer optimizer: {self._name} cannot step on a dense fp32 gradient ({error}); use another one"
            ) from error
        state = optimizer.state.get(parameter, {})
        names = [name for name in MOMENTA if isinstance(state.get(name), Tensor)]
        return _subtracts(optimizer), names[0] if names else None

    def _ready(self) -> Optimizer:
        if self._optimizer is None:
            raise RuntimeError("TorchOptimizer was used before setup()")
        return self._optimizer


def _subtracts(optimizer: Optimizer) -> bool:
    """Whether a step is exactly ``theta - gradient``."""
    return type(optimizer) is torch.optim.SGD and all(
        float(group["lr"]) == 1.0
        and not any(group[key] for key in ("momentum", "weight_decay", "dampening", "maximize"))
        for group in optimizer.param_groups
    )


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
