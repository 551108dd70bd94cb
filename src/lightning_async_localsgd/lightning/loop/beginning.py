"""The length of the synchronous beginning, as the strategy's option and the trainer say it, and what it cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.optim import LBFGS
from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, LinearLR, OneCycleLR, SequentialLR

from lightning_async_localsgd.lightning.loop.optimizer_reset import torch_optimizer
from lightning_async_localsgd.policies.synchronous_beginning import automatic_length

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch import nn

    from lightning_async_localsgd.policies.plan import RunBudget
    from lightning_async_localsgd.runtime.settings import RuntimeSettings
    from lightning_async_localsgd.server.merge_policy import MergePolicy

_LONGEST_WARMUP = 100_000
"""Number of steps up to which the factors of a ``LambdaLR`` are looked at."""


def check_beginning(trainer: pl.Trainer, policy: MergePolicy, workers: int) -> None:
    """Check that gradients can be averaged before the optimizer's steps, before anything is trained.

    Args:
        trainer: the trainer.
        policy: has the option.
        workers: number of workers that the run is started with.

    Raises:
        ValueError: The run shall begin synchronously, and its module or precision does not allow that.

    """
    option = policy.sync_warmup_steps
    if option == 0 or workers == 1:
        return
    name = f"sync_warmup_steps={option!r} averages the gradients of all ranks before the optimizer's step, but"
    if not trainer.lightning_module.automatic_optimization:
        raise ValueError(
            f"{name} with automatic_optimization=False the module steps its optimizers itself; use automatic "
            "optimization, or sync_warmup_steps=0"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            f"{name} with precision='16-mixed' each rank's gradient scaler decides by itself whether to skip a step; "
            "use precision='bf16-mixed', or sync_warmup_steps=0"
        )


def beginning_length(
    trainer: pl.Trainer,
    policy: MergePolicy,
    budget: RunBudget,
    restored: Mapping[str, Any] | None,
    done: int = 0,
) -> int:
    """Return the length of the synchronous beginning, in steps per worker.

    Args:
        trainer: the trainer, with its optimizers and schedulers.
        policy: has the option.
        budget: the run's budget.
        restored: the server's state in the checkpoint that is resumed, on rank 0. Only rank 0's result counts.
        done: local steps of all workers that count as done at the start.

    Raises:
        ValueError: The optimizer evaluates gradients more than once in a step.

    """
    option = policy.sync_warmup_steps
    if option == 0:
        return 0
    if any(isinstance(torch_optimizer(optimizer), LBFGS) for optimizer in trainer.optimizers):
        raise ValueError(
            f"sync_warmup_steps={option!r} averages gradients once in a step, but LBFGS evaluates the loss several "
            "times; use another optimizer, or sync_warmup_steps=0"
        )
    saved = None if restored is None else restored.get("beginning")
    if saved is not None and not saved["on"]:
        return 0
    if option != "auto":
        return option
    if saved is not None:
        return int(saved["steps"])
    is_fresh = not (trainer.ckpt_path or done or pretrained_part(trainer.lightning_module))
    return automatic_length(warmup_steps(trainer), budget.steps_per_rank, is_fresh)


def pretrained_part(module: nn.Module) -> str | None:
    """Return which part of the module says that its weights were loaded from somewhere, and how; None if none does.

    Models of the library ``transformers`` do so after ``from_pretrained``, but also if they have random weights and the
    configuration of a model that can be loaded.
    """
    for path, part in module.named_modules():
        name = getattr(part, "name_or_path", None)
        if isinstance(name, str) and name:
            return f"{path or 'the module'} has name_or_path={name!r}"
    return None


def pretrained_text(trainer: pl.Trainer, settings: RuntimeSettings) -> str | None:
    """Return :func:`pretrained_part` if the run has no synchronous beginning for that reason; None otherwise.

    Args:
        trainer: the trainer, with its optimizers and schedulers.
        settings: settings of the run.

    """
    length = settings.sync_warmup_steps
    if settings.merge.sync_warmup_steps != "auto" or length > 0 or trainer.ckpt_path or settings.steps_done:
        return None
    would_begin = automatic_length(warmup_steps(trainer), settings.budget.steps_per_rank, starts_fresh=True) > 0
    return pretrained_part(trainer.lightning_module) if would_begin else None


def warmup_steps(trainer: pl.Trainer) -> int:
    """Return the number of steps in which the first scheduler raises the learning rate from the start; 0 if none.

    Recognized are the schedulers of torch that begin with a rise (``LinearLR``, ``OneCycleLR``), a ``SequentialLR`` or
    ``ChainedScheduler`` that begins with one of them, and a ``LambdaLR`` whose factor rises from step to step.
    """
    configs = trainer.strategy.lr_scheduler_configs
    if not configs or configs[0].interval != "step":
        return 0
    return _warmup_of(configs[0].scheduler) * int(configs[0].frequency)


def _warmup_of(scheduler: Any) -> int:
    if isinstance(scheduler, SequentialLR):
        return _warmup_of(scheduler._schedulers[0])
    if isinstance(scheduler, ChainedScheduler):
        return max(_warmup_of(part) for part in scheduler._schedulers)
    if isinstance(scheduler, OneCycleLR):
        return int(scheduler._schedule_phases[0]["end_step"])
    if isinstance(scheduler, LinearLR):
        return int(scheduler.total_iters) if scheduler.start_factor < scheduler.end_factor else 0
    if isinstance(scheduler, LambdaLR):
        factor, step = scheduler.lr_lambdas[0], 0
        while step < _LONGEST_WARMUP and factor(step + 1) > factor(step):
            step += 1
        return step
    return 0
