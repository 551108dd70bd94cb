"""Schedulers that follow a metric: rank 0 decides, and all ranks apply the decision.

The metric of a ``ReduceLROnPlateau`` is usually one that only rank 0 computes. Lightning steps the scheduler on rank 0
as usual, and each step's result reaches the other ranks with their next replies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_async_localsgd.lightning.mixed_in import mixed_in

if TYPE_CHECKING:
    import lightning.pytorch as pl

_NEVER = 2**62
"""Frequency with which Lightning never steps a scheduler."""

_MAX_GROUPS = 300
"""Number of parameter groups for which two numbers each, with all their digits, fit into a message."""


class PlateauSync:
    """Control a trainer's schedulers that follow a metric, until :meth:`restore`.

    Ranks above 0 never step these schedulers. If such a scheduler is the only one of its optimizer, they adopt rank 0's
    learning rates. If the optimizer has other schedulers, which advance on every rank, they multiply their rates by the
    factor by which rank 0's rates have changed.

    Args:
        trainer: the trainer, with restored schedulers if the run is resumed.
        send: on rank 0, function that gets the decisions after every step, in JSON's types; None on other ranks.

    Raises:
        ValueError: The optimizer has more parameter groups than fit into a message.

    """

    def __init__(self, trainer: pl.Trainer, send: Callable[[list[Any]], None] | None) -> None:
        configs = trainer.strategy.lr_scheduler_configs
        # With manual optimization Lightning does not set `reduce_on_plateau`.
        self._configs = [
            config for config in configs if config.reduce_on_plateau or isinstance(config.scheduler, ReduceLROnPlateau)
        ]
        self._send = send
        self._factors = [[1.0] * len(config.scheduler.optimizer.param_groups) for config in self._configs]
        self._only_scheduler = [
            sum(other.scheduler.optimizer is config.scheduler.optimizer for other in configs) == 1
            for config in self._configs
        ]
        self._frequencies = [config.frequency for config in self._configs]
        self._restores: list[Callable[[], None]] = []
        for index, config in enumerate(self._configs):
            if send is None:
                config.frequency = _NEVER  # Otherwise Lightning would look for the metric, and fail.
            self._restores.append(mixed_in(config.scheduler, _ObservedScheduler, _plateaus=self, _index=index))
        self._check_size()

    def apply(self, decisions: list[Any]) -> None:
        """Apply rank 0's latest decisions on another rank. Repeated or empty decisions change nothing."""
        if self._send is not None or not decisions:
            return
        for index, (config, decision) in enumerate(zip(self._configs, decisions, strict=True)):
            scheduler, groups = config.scheduler, config.scheduler.optimizer.param_groups
            before, factors = self._factors[index], _expand(decision["factors"], len(groups))
            before += [1.0] * (len(groups) - len(before))
            for at, (group, rate) in enumerate(zip(groups, _expand(decision["rates"], len(groups)), strict=True)):
                _set_rate(group, rate if self._only_scheduler[index] else float(group["lr"]) * factors[at] / before[at])
            self._factors[index] = factors
            for name, value in decision["state"].items():
                # Values that are not finite, such as the best metric before the first validation, arrive as strings.
                own = getattr(scheduler, name, None)
                setattr(scheduler, name, float(value) if isinstance(own, float) else value)
            if hasattr(scheduler, "_last_lr"):
                scheduler._last_lr = [group["lr"] for group in groups]

    def restore(self) -> None:
        """Let Lightning step the schedulers as usual again."""
        for config, frequency, restore in zip(self._configs, self._frequencies, self._restores, strict=True):
            config.frequency = frequency
            restore()
        self._configs, self._frequencies, self._restores = [], [], []

    def step(self, index: int, step: Callable[[], None]) -> None:
        """Step a scheduler and send the result on rank 0; do nothing on other ranks."""
        if self._send is not None:
            groups = self._configs[index].scheduler.optimizer.param_groups
            before = [float(group["lr"]) for group in groups]
            step()
            self._send_decisions(index, before)

    def _send_decisions(self, index: int, before: list[float]) -> None:
        """Send all decisions after scheduler ``index`` has changed the learning rates ``before``."""
        assert self._send is not None
        groups = self._configs[index].scheduler.optimizer.param_groups
        factors = self._factors[index]
        factors += [1.0] * (len(groups) - len(factors))
        for at, (group, rate) in enumerate(zip(groups, before, strict=True)):
            factors[at] *= float(group["lr"]) / rate if rate else 1.0
        self._check_size()
        self._send([self._decision(i, own) for i, own in enumerate(self._factors)])

    def _check_size(self) -> None:
        groups = sum(map(len, self._factors))
        if groups > _MAX_GROUPS:
            raise ValueError(
                f"ReduceLROnPlateau over {groups} parameter groups: a message to other ranks holds the learning rates "
                f"of {_MAX_GROUPS} groups; use fewer groups, or a schedule over steps or epochs"
            )

    def _decision(self, index: int, factors: Sequence[float]) -> dict[str, Any]:
        scheduler = self._configs[index].scheduler
        rates = [float(group["lr"]) for group in scheduler.optimizer.param_groups]
        state = scheduler.state_dict()
        return {
            "factors": _compress(factors),
            "rates": _compress(rates),
            "state": {
                name: _for_json(value) for name, value in state.items() if type(value) in (bool, int, float, str)
            },
        }


class _ObservedScheduler:
    """Mixin for a scheduler that follows a metric."""

    _plateaus: PlateauSync
    _index: int

    def step(self, *args: Any, **kwargs: Any) -> None:
        step = super().step  # type: ignore[misc]
        self._plateaus.step(self._index, lambda: step(*args, **kwargs))


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if hasattr(group["lr"], "fill_"):  # A captured or compiled optimizer has a tensor here.
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _compress(numbers: Sequence[float]) -> float | list[float]:
    """Return a single number if all groups have the same."""
    return numbers[0] if len(set(numbers)) == 1 else list(numbers)


def _expand(numbers: float | list[float], length: int) -> list[float]:
    """Return one number per group. Groups that the other rank does not have yet get the number of its last group."""
    known = numbers if isinstance(numbers, list) else [numbers]
    return (known + known[-1:] * length)[:length]


def _for_json(value: bool | int | float | str) -> bool | int | float | str:
    """Return a string in place of a float that is not finite."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
