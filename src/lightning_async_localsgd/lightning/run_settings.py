"""Makes the settings of a run from the strategy's options and the trainer, when training starts."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Protocol

from lightning_async_localsgd.lightning.loop.beginning import beginning_length
from lightning_async_localsgd.lightning.loop.optimizer_reset import torch_optimizer
from lightning_async_localsgd.lightning.loop.second_moments import averaged_moments
from lightning_async_localsgd.lightning.loop.step_axis import reserved_units
from lightning_async_localsgd.outer import resolve_outer_optimizer
from lightning_async_localsgd.runtime.optimizer_weights import OptimizerWeights
from lightning_async_localsgd.runtime.settings import RuntimeSettings

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.lightning.fit_state import FitState
    from lightning_async_localsgd.outer import OuterOptimizer
    from lightning_async_localsgd.policies.grace import GraceWindow
    from lightning_async_localsgd.policies.pacing import SpeedAwareSteps
    from lightning_async_localsgd.policies.plan import RunBudget
    from lightning_async_localsgd.protocol.options import ExchangeOptions
    from lightning_async_localsgd.server.merge_policy import MergePolicy


class _Options(Protocol):
    """The strategy, as far as the settings follow from it."""

    pacing: SpeedAwareSteps
    outer_optimizer: OuterOptimizer
    grace: GraceWindow
    merge_policy: MergePolicy
    exchange: ExchangeOptions
    min_workers: int
    run_name: str
    optimizers: list[Any]


def run_settings(
    strategy: _Options,
    trainer: pl.Trainer,
    fit: FitState,
    budget: RunBudget,
    restored: dict[str, Any] | None,
    done: int,
    offset: int,
    **others: Any,
) -> RuntimeSettings:
    """Return the settings of the run that a fit is about to start.

    Args:
        strategy: has the options.
        trainer: the trainer, with its data and optimizers.
        fit: state of the fit.
        budget: work that the trainer's limits allow.
        restored: the server's state in the checkpoint that is resumed, on rank 0.
        done: units that count as done at the start, see :class:`.StepSizes`.
        offset: see :attr:`.RuntimeSettings.step_offset`.
        others: further settings by name.

    """
    policy, data = strategy.merge_policy, fit.data
    return RuntimeSettings(
        pacing=copy.deepcopy(strategy.pacing),
        outer_optimizer=resolve_outer_optimizer(strategy.outer_optimizer),
        grace=strategy.grace,
        budget=budget,
        step_samples=data.step_samples,
        samples_of=lambda worker: data.batch_of(worker).samples if data.step_samples else 0,
        batch_size=fit.batch_size,
        merge=policy,
        sync_warmup_steps=beginning_length(trainer, policy, budget, restored, done),
        exchange=strategy.exchange,
        min_workers=strategy.min_workers,
        steps_done=done,
        step_offset=offset,
        reserved_units=reserved_units(trainer, data, fit.workers),
        moments=averaged_moments(policy, others["exchange_frozen"], strategy.optimizers),
        optimizer_weights=OptimizerWeights([torch_optimizer(optimizer) for optimizer in strategy.optimizers]),
        fit_number=fit.number,
        seed=fit.seed,
        run_name=strategy.run_name,
        observers=tuple(fit.observers),
        **others,
    )
