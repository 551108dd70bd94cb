"""What rules around another rule have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_async_localsgd.outer.base import OuterOptimizer


class Wrapper(OuterOptimizer):
    """Passes everything on to a rule; subclasses change what they are about.

    Args:
        rule: the one inside.

    Raises:
        TypeError: ``rule`` is none.

    """

    def __init__(self, rule: OuterOptimizer) -> None:
        given: object = rule
        if not isinstance(given, OuterOptimizer):
            name = type(self).__name__
            raise TypeError(f"{name}: rule must be an outer optimizer, got {rule!r}; write {name}(LookAhead(lr=0.2))")
        self.rule = rule

    @override
    def setup(self, theta: Tensor, views: Mapping[str, Tensor], workers: int) -> None:
        self.rule.setup(theta, views, workers)

    @override
    def step(self, gradient: Tensor, views: Mapping[str, Tensor]) -> None:
        self.rule.step(gradient, views)

    @override
    def set_workers(self, workers: int) -> None:
        self.rule.set_workers(workers)

    @property
    @override
    def momentum_buffer(self) -> Tensor | None:
        return self.rule.momentum_buffer

    @override
    def restart_momentum(self) -> None:
        self.rule.restart_momentum()

    @property
    @override
    def collects(self) -> bool:
        return self.rule.collects

    @property
    @override
    def in_period(self) -> bool:
        return self.rule.in_period

    @property
    @override
    def held_back(self) -> int:
        return self.rule.held_back

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"name": type(self.rule).__name__, "rule": self.rule.state_dict()}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        own, name = type(self).__name__, type(self.rule).__name__
        missing = [key for key in ("name", "rule") if key not in state]
        if missing:
            raise ValueError(f"the saved state of {own} lacks {missing}")
        if state["name"] != name:
            raise ValueError(
                f"the checkpoint was written with {own}({state['name']}(...)), this run has {own}({name}(...)); use the"
                " same, or start from the checkpoint's weights only"
            )
        self.rule.load_state_dict(state["rule"])
