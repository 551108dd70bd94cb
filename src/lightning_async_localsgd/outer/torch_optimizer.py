"""Any ``torch.optim.Optimizer`` as the outer optimizer, one step per push."""

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

from lightning_async_localsgd.outer.base import OuterOptimizer, parameter_slices

MOMENTUM_KEYS = ("momentum_buffer", "exp_avg")
"""Keys under which torch's optimizers keep a momentum in their state."""


class TorchOptimizer(OuterOptimizer):
    """Any torch optimizer, which takes one step per push with the pseudo-gradient as the gradient.

    The learning rate applies to a single push. It is not divided by the number of workers. With momentum, several
    workers and no quorum, this is the plain asynchronous method that Liu et al. (arXiv 2401.09135, section 4) advise
    against. Use this class for comparisons and for optimizers of your own.

    A parameter is skipped, weight decay included, until a push changes it for the first time. Frozen and unused
    parameters therefore keep their values.

    Args:
        optimizer: subclass of ``torch.optim.Optimizer``, or a callable that makes an optimizer from an iterable of
            parameters.
        **kwargs: further arguments of ``optimizer``. They take precedence over the values in a checkpoint, while
            arguments that are left out are restored from the checkpoint.

    Raises:
        TypeError: ``optimizer`` is anything else, or does not accept ``kwargs``.
        ValueError: ``optimizer`` rejects a value, has a learning rate <= 0, or cannot take one step per push.

    Example::

        >>> import torch
        >>> from lightning_async_localsgd.outer import TorchOptimizer
        >>> theta = torch.ones(2)
        >>> outer_optimizer = TorchOptimizer(torch.optim.SGD, lr=0.5)
        >>> outer_optimizer.setup(theta, {"w": theta}, workers=2)
        >>> gradient = torch.tensor([0.4, 0.0])
        >>> outer_optimizer.step(gradient, {"w": gradient})
        >>> theta
        tensor([0.8000, 1.0000])

    """

    def __init__(self, optimizer: Callable[[Iterable[Any]], Optimizer], **kwargs: Any) -> None:
        if not callable(optimizer):
            raise TypeError(
                f"outer optimizer: expected a torch.optim.Optimizer class or a callable that makes an optimizer, got"
                f" {str(optimizer)[:40]!r}; use for example TorchOptimizer(torch.optim.SGD, lr=0.7)"
            )
        self._factory: Callable[[Iterable[Any]], Optimizer] = functools.partial(optimizer, **kwargs)
        self._name = getattr(optimizer, "__name__", type(optimizer).__name__)
        self._replaces_model, self._momentum_name = self._trial_step()
        self._optimizer: Optimizer | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> TorchOptimizer:
        # The factory comes from the user and may refer to anything: the one that LightningCLI makes refers to the
        # trainer. It is shared, not copied.
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
        self._changed: set[str] = set()
        self._momentum = torch.zeros_like(theta) if self._momentum_name else None
        self._slices = parameter_slices(theta, views)

    @override
    def step(self, gradient: Tensor, views: Mapping[str, Tensor]) -> None:
        optimizer = self._ready()
        for name, parameter in self._parameters.items():
            view = views[name]
            if name not in self._changed and bool(view.any()):
                self._changed.add(name)
            parameter.grad = view if name in self._changed else None
        optimizer.step()
        # The caller reuses the memory of the push as soon as this method returns.
        for parameter in self._parameters.values():
            parameter.grad = None
        self._gather_momentum()

    @override
    def set_workers(self, workers: int) -> None:
        pass  # The learning rate applies to a single push.

    @property
    @override
    def momentum_buffer(self) -> Tensor | None:
        self._ready()
        return self._momentum

    @override
    def restart_momentum(self) -> None:
        # Averages such as Adam's are corrected by the number of steps, which would have to be reset, too.
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
            "changed": [name for name in names if name in self._changed],
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
        missing = [key for key in ("optimizer", "parameters", "changed", "state", "groups") if key not in state]
        if missing:
            raise ValueError(f"the saved state of the outer optimizer lacks {missing}")
        if state["optimizer"] != type(optimizer).__name__:
            raise ValueError(
                f"the checkpoint was written with outer optimizer {state['optimizer']}, this run has"
                f" {type(optimizer).__name__}; use the same outer optimizer, or load the checkpoint's weights only"
            )
        shapes = {name: list(parameter.shape) for name, parameter in self._parameters.items()}
        different = sorted(
            name
            for name in shapes.keys() | state["parameters"].keys()
            if shapes.get(name) != state["parameters"].get(name)
        )
        if different:
            raise ValueError(
                f"the saved outer optimizer does not match this model: names or shapes of {different[:5]} differ"
            )
        index = {name: i for i, name in enumerate(shapes)}
        current = optimizer.state_dict()["param_groups"]
        # torch assigns state by position within the groups, so the saved groups must list the same parameters in the
        # order of this model.
        groups = [{**group, "params": sorted(index[name] for name in group["params"])} for group in state["groups"]]
        if [group["params"] for group in groups] != [sorted(group["params"]) for group in current]:
            raise ValueError("the parameter groups of the saved outer optimizer differ from those of this run")
        optimizer.load_state_dict(
            {
                "state": {
                    index[name]: {key: _copy(value) for key, value in values.items()}
                    for name, values in state["state"].items()
                },
                "param_groups": groups,
            }
        )
        arguments = self._factory.keywords  # type: ignore[attr-defined]
        for group in optimizer.param_groups:
            group.update({key: value for key, value in arguments.items() if key in group})
        self._changed = set(state["changed"])
        if self._momentum is not None:
            self._momentum.zero_()
            self._gather_momentum()

    def _gather_momentum(self) -> None:
        """Move the optimizer's momentum tensors into one flat vector, and let the optimizer work on views of it."""
        if self._momentum is None or self._momentum_name is None:
            return
        optimizer = self._ready()
        for name, parameter in self._parameters.items():
            state = optimizer.state.get(parameter, {})
            part = state.get(self._momentum_name)
            flat = self._momentum[self._slices[name]]
            if isinstance(part, Tensor) and part.shape == parameter.shape and part.data_ptr() != flat.data_ptr():
                state[self._momentum_name] = flat.copy_(part.flatten()).view_as(parameter)

    def _trial_step(self) -> tuple[bool, str | None]:
        """Take a step on a matrix of one element, so that bad arguments are reported before training begins.

        Returns:
            Whether a step only subtracts the gradient, and the key of the momentum in the optimizer's state or None.

        Raises:
            TypeError: the factory does not return a torch optimizer, or rejects an argument.
            ValueError: the optimizer rejects a value, or cannot be used as an outer optimizer.

        """
        parameter = nn.Parameter(torch.zeros(1, 1))
        optimizer: object = self._factory([parameter])
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"outer optimizer: {self._name} made {optimizer!r}, which is not a torch.optim.Optimizer; use a torch"
                " optimizer class or a callable that makes an optimizer from parameters"
            )
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"outer optimizer: {self._name} evaluates the loss within a step, which the server cannot do; use an"
                " optimizer that needs only gradients, such as torch.optim.SGD"
            )
        for group in optimizer.param_groups:
            if "lr" in group and not float(group["lr"]) > 0.0:
                raise ValueError(f"outer optimizer: lr of {self._name} must be > 0, got {float(group['lr'])}")
        parameter.grad = torch.zeros(1, 1)
        try:
            optimizer.step()
        except RuntimeError as error:
            raise ValueError(
                f"outer optimizer: {self._name} cannot step on a dense fp32 gradient ({error}); use another optimizer"
            ) from error
        state = optimizer.state.get(parameter, {})
        names = [name for name in MOMENTUM_KEYS if isinstance(state.get(name), Tensor)]
        return _subtracts(optimizer), names[0] if names else None

    def _ready(self) -> Optimizer:
        if self._optimizer is None:
            raise RuntimeError("TorchOptimizer was used before setup()")
        return self._optimizer


def _subtracts(optimizer: Optimizer) -> bool:
    """Return whether a step is exactly ``theta - gradient``."""
    return type(optimizer) is torch.optim.SGD and all(
        float(group["lr"]) == 1.0
        and not any(group[key] for key in ("momentum", "weight_decay", "dampening", "maximize"))
        for group in optimizer.param_groups
    )


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
