"""Schedulers that follow a metric: rank 0 decides, all ranks follow.

The metric of a ``ReduceLROnPlateau`` is, as a rule, one that rank 0 alone computes. So rank 0 lets Lightning step the
scheduler as ever, and what each step came to reaches the others with their next replies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.utilities.types import LRSchedulerConfig

_NEVER = 2**62
"""A frequency at which Lightning never gets to step a scheduler itself."""

_MOST_GROUPS = 300
"""Two numbers for each of so many parameter groups fit into a message, whatever the numbers."""


class FollowedPlateaus:
    """Takes hold of a trainer's metric-following schedulers until :meth:`release`.

    Ranks above 0 never step theirs. Where such a scheduler is the only one of its optimizer they take over rank 0's
    learning rates as they are. Where there are others besides, which move on by themselves on every rank, they take
    over the factor by which rank 0's rates were changed.

    Args:
        trainer: the trainer, its schedulers restored if it resumes.
        tell: on rank 0, called with what every step has come to, in JSON's types; None on the others.

    Raises:
        ValueError: the optimizer has more parameter groups than can be told.

    """

    def __init__(self, trainer: pl.Trainer, tell: Callable[[list[Any]], None] | None) -> None:
        configs = trainer.strategy.lr_scheduler_configs
        # With manual optimization Lightning does not mark them.
        self._configs = [
            config for config in configs if config.reduce_on_plateau or isinstance(config.scheduler, ReduceLROnPlateau)
        ]
        self._tell = tell
        self._factors = [[1.0] * len(config.scheduler.optimizer.param_groups) for config in self._configs]
        self._alone = [
            sum(other.scheduler.optimizer is config.scheduler.optimizer for other in configs) == 1
            for config in self._configs
        ]
        self._frequencies = [config.frequency for config in self._configs]
        self._classes = [type(config.scheduler) for config in self._configs]
        for index, config in enumerate(self._configs):
            self._take(index, config)
        self._check_size()

    def follow(self, decisions: list[Any]) -> None:
        """Ranks above 0: does what rank 0 has told last; nothing, if that is empty or has been done."""
        if self._tell is not None or not decisions:
            return
        for index, (config, decision) in enumerate(zip(self._configs, decisions, strict=True)):
            scheduler, groups = config.scheduler, config.scheduler.optimizer.param_groups
            before, factors = self._factors[index], _spread(decision["factors"], len(groups))
            before += [1.0] * (len(groups) - len(before))
            for at, (group, rate) in enumerate(zip(groups, _spread(decision["rates"], len(groups)), strict=True)):
                _set_rate(group, rate if self._alone[index] else float(group["lr"]) * factors[at] / before[at])
            self._factors[index] = factors
            for name, value in decision["state"].items():
                # Numbers that are not finite, such as the best value before the first, come as texts.
                own = getattr(scheduler, name, None)
                setattr(scheduler, name, float(value) if isinstance(own, float) else value)
            if hasattr(scheduler, "_last_lr"):
                scheduler._last_lr = [group["lr"] for group in groups]

    def release(self) -> None:
        """Gives the schedulers back to Lightning."""
        for config, frequency, own in zip(self._configs, self._frequencies, self._classes, strict=True):
            config.frequency = frequency
            config.scheduler.__class__ = own
        self._configs, self._frequencies, self._classes = [], [], []

    def _take(self, index: int, config: LRSchedulerConfig) -> None:
        """Rank 0: every step of the scheduler is told, whoever takes it. Others: it is not stepped."""

        def step(scheduler: Any, *args: Any, **kwargs: Any) -> None:
            if self._tell is not None:
                before = [float(group["lr"]) for group in scheduler.optimizer.param_groups]
                own.step(scheduler, *args, **kwargs)
                self._decided(index, before)

        if self._tell is None:
            config.frequency = _NEVER  # Lightning must not even look for the metric.
        # In the class, because a scheduler's attributes are its state, which is saved.
        own = type(config.scheduler)
        config.scheduler.__class__ = type(own.__name__, (own,), {"__module__": own.__module__, "step": step})

    def _decided(self, index: int, before: list[float]) -> None:
        assert self._tell is not None
        groups = self._configs[index].scheduler.optimizer.param_groups
        factors = self._factors[index]
        factors += [1.0] * (len(groups) - len(factors))
        for at, (group, rate) in enumerate(zip(groups, before, strict=True)):
            factors[at] *= float(group["lr"]) / rate if rate else 1.0
        self._check_size()
        self._tell([self._decision(i, own) for i, own in enumerate(self._factors)])

    def _check_size(self) -> None:
        groups = sum(map(len, self._factors))
        if groups > _MOST_GROUPS:
            raise ValueError(
                f"ReduceLROnPlateau over {groups} parameter groups: the learning rates of more than {_MOST_GROUPS} do "
                "not fit into a message to the other ranks; use fewer groups, or a schedule over steps or epochs"
            )

    def _decision(self, index: int, factors: Sequence[float]) -> dict[str, Any]:
        scheduler = self._configs[index].scheduler
        rates = [float(group["lr"]) for group in scheduler.optimizer.param_groups]
        state = scheduler.state_dict()
        return {
            "factors": _gathered(factors),
            "rates": _gathered(rates),
            "state": {name: _plain(value) for name, value in state.items() if type(value) in (bool, int, float, str)},
        }


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if hasattr(group["lr"], "fill_"):  # A tensor, of an optimizer that is captured or compiled.
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _gathered(numbers: Sequence[float]) -> float | list[float]:
    """One number, if all groups have the same."""
    return numbers[0] if len(set(numbers)) == 1 else list(numbers)


def _spread(numbers: float | list[float], length: int) -> list[float]:
    """The numbers of ``length`` groups; the last one's for groups that another rank does not have yet."""
    known = numbers if isinstance(numbers, list) else [numbers]
    return (known + known[-1:] * length)[:length]


def _plain(value: bool | int | float | str) -> bool | int | float | str:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
