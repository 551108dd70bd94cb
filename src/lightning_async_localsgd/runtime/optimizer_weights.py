"""Inner optimizers that remember weights, or train other weights than they show.

A schedule-free optimizer trains at one point, shows another one, and remembers a third one. A Lookahead remembers slow
weights. When a worker adopts a model, what its optimizers remember of weights moves by the same difference as the
weights. What workers exchange, validate and save are the weights that an optimizer shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_MIN_COSINE = 0.8
_MAX_NORM_RATIO = 2.0
"""A tensor in an optimizer's state holds weights if its direction and norm are about those of the weights. Running
averages of gradients have another direction, and those of squares another norm."""

_MIN_ELEMENTS = 16
"""With fewer elements, a direction tells nothing."""

_STATISTICS = frozenset(
    {
        "acc_delta", "exp_avg", "exp_avg_sq", "exp_inf", "max_exp_avg_sq", "momentum_buffer", "grad_avg", "prev",
        "square_avg", "step", "step_size", "sum",
    }
)  # fmt: skip
"""Keys under which torch's optimizers keep running averages of gradients and the like."""


class OptimizerWeights:
    """What inner optimizers remember of the weights, and which weights they show.

    Whether a state holds weights is measured once, after the first steps, over all parameters that have the state.

    Args:
        optimizers: the inner optimizers.

    Raises:
        ValueError: An optimizer shows other weights than it trains, but does not tell which ones the module has.

    Example::

        >>> weight = torch.nn.Parameter(torch.ones(16))
        >>> optimizer = torch.optim.ASGD([weight], lr=0.5)  # It remembers an average of the weights.
        >>> weight.grad = torch.full((16,), 0.2)
        >>> _ = optimizer.step()
        >>> weights = OptimizerWeights([optimizer])
        >>> left = weights.leave()
        >>> _ = weight.data.add_(1.0)  # The worker adopts another model.
        >>> weights.arrive(left)
        >>> [round(float(value[0]), 3) for value in (weight, optimizer.state[weight]["ax"])]
        [1.9, 1.9]

    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = [inner for optimizer in optimizers for inner in nested_optimizers(optimizer)]
        self._switching = [optimizer for optimizer in self._optimizers if _can_switch(optimizer)]
        for optimizer in self._switching:
            _trains(optimizer)
        self._holds_weights: dict[tuple[int, str], bool] = {}

    def start(self) -> list[int]:
        """Prepare for the first model that is adopted. The module has the weights that the optimizers show.

        Returns:
            See :meth:`leave`.

        """
        training = [number for number, optimizer in enumerate(self._switching) if _trains(optimizer)]
        for number in training:
            _mark_as_shown(self._switching[number])
        self._move(-1)
        return training

    def leave(self) -> list[int]:
        """Put the weights that the optimizers show into the module, which may then be replaced.

        Until :meth:`arrive`, remembered weights are differences from the module's.

        Returns:
            Numbers of the optimizers that have to train again, for :meth:`arrive`.

        """
        training = [number for number, optimizer in enumerate(self._switching) if _trains(optimizer)]
        for number in training:
            self._switching[number].eval()  # type: ignore[attr-defined] # see _can_switch
        self._move(-1)
        return training

    def arrive(self, training: Sequence[int] = ()) -> None:
        """Continue from the module's present weights.

        Args:
            training: numbers of the optimizers that put the weights they train into the module.

        """
        self._move(1)
        for number in training:
            self._switching[number].train()  # type: ignore[attr-defined] # see _can_switch

    def _move(self, sign: int) -> None:
        with torch.no_grad():
            for state, key, parameter in list(self._remembered()):
                value = state[key]
                if sign > 0:
                    # The state of a worker that has diverged begins again with the adopted weights.
                    value.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
                value.add_(parameter.detach().to(value.device, value.dtype).reshape(value.shape), alpha=sign)

    def _remembered(self) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        """Yield the state, the key and the parameter of everything that optimizers remember of weights."""
        for number, optimizer in enumerate(self._optimizers):
            kept: dict[str, list[tuple[dict[str, Any], Tensor]]] = {}
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    state: dict[str, Any] = optimizer.state.get(parameter) or {}
                    for key, value in state.items():
                        if key not in _STATISTICS and isinstance(value, Tensor) and value.is_floating_point():
                            kept.setdefault(key, []).append((state, parameter))
            for key, places in kept.items():
                if (number, key) not in self._holds_weights:
                    is_known = key == "z" and optimizer in self._switching  # That of schedule-free optimizers.
                    self._holds_weights[number, key] = is_known or _holds_weights(key, places)
                if self._holds_weights[number, key]:
                    for state, parameter in places:
                        yield state, key, parameter


def _holds_weights(key: str, places: Sequence[tuple[dict[str, Any], Tensor]]) -> bool:
    """Return whether states with a key hold weights, judged over all parameters together."""
    product = squares = weight_squares = 0.0
    for state, parameter in places:
        value, weight = state[key], parameter.detach()
        if value.numel() != weight.numel():
            return False
        value, weight = value.to(weight.device, torch.float32).reshape(-1), weight.to(torch.float32).reshape(-1)
        product += float((value * weight).sum())
        squares += float(value.square().sum())
        weight_squares += float(weight.square().sum())
    norm, weight_norm = math.sqrt(squares), math.sqrt(weight_squares)
    if sum(parameter.numel() for _, parameter in places) < _MIN_ELEMENTS:
        return False
    if not (0.0 < norm < math.inf and 0.0 < weight_norm < math.inf):
        return False
    is_as_large = max(norm, weight_norm) <= _MAX_NORM_RATIO * min(norm, weight_norm)
    return is_as_large and product >= _MIN_COSINE * norm * weight_norm


def nested_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer and the optimizers that it wraps, outermost first."""
    found = [optimizer]
    for outer in found:
        found += [inner for inner in vars(outer).values() if isinstance(inner, Optimizer) and inner not in found]
    return found


def _can_switch(optimizer: Optimizer) -> bool:
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def _trains(optimizer: Optimizer) -> bool:
    """Return whether the module has the weights that an optimizer trains, and not those that it shows."""
    modes = [group["train_mode"] for group in optimizer.param_groups if "train_mode" in group]
    mode = any(modes) if modes else getattr(optimizer, "train_mode", None)
    if not isinstance(mode, bool):
        raise ValueError(
            f"{type(optimizer).__name__} has train() and eval(), so it shows other weights than it trains, but it does "
            "not tell which of them the module has: neither its param_groups nor itself have a train_mode. Workers "
            "must exchange the weights that it shows; use an optimizer of the schedulefree package, or one without "
            "train() and eval()"
        )
    return mode


def _mark_as_shown(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        if "train_mode" in group:
            group["train_mode"] = False
    if hasattr(optimizer, "train_mode"):
        optimizer.train_mode = False
