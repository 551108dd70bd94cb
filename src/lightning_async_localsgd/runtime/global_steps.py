"""Global steps: the progress of all workers in the unit of ``trainer.global_step``.

A global step is a local step of every worker. In a run with an end, global steps are scaled so that the end of the
local steps of all workers is the end of the steps that each rank would take under DDP.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lightning_async_localsgd.policies.plan import RunBudget

_UNCONFIRMED = 1e-3
"""Subtracted from the estimated progress until the server confirms the end of the run."""

TOLERANCE = 1e-6
"""The progress is a sum of estimates. If it misses a whole number by less than this, it counts as that number."""


class EpochSpan(NamedTuple):
    """The global steps of an epoch that all workers share.

    Attributes:
        begin: global steps before the epoch.
        end: global steps after the epoch; infinite if the run ends before the epoch does.

    """

    begin: float
    end: float

    def step_of(self, estimate: float, is_last: bool) -> int:
        """Return the global step of a worker that trains on a batch of the epoch.

        The estimate is the progress of all workers, which may have used up the epoch's data before this worker knows,
        or may be in a later epoch. The end of the epoch belongs to the step at which its data is used up.

        Args:
            estimate: estimated global steps after the batch.
            is_last: whether the batch is the worker's last one in the epoch.

        """
        step = math.floor(estimate + TOLERANCE)
        if self.end == math.inf:
            return max(step, math.floor(self.begin + TOLERANCE))
        end = math.ceil(self.end - TOLERANCE)
        return end if is_last else min(max(step, math.floor(self.begin + TOLERANCE)), end - 1)


def to_global_steps(
    local_steps: float, confirmed: float, budget: RunBudget, workers: int, step_offset: int = 0
) -> float:
    """Convert local steps of all workers to global steps.

    If workers have batch sizes of their own, all numbers of local steps are numbers of samples, see
    :class:`.StepSizes`.

    Args:
        local_steps: local steps of all workers together.
        confirmed: local steps of all workers together that the server has counted.
        budget: budget of the run.
        workers: number of workers that the run was started with.
        step_offset: global steps that the trainer has counted beyond the steps of this run.

    """
    total, steps_per_rank = budget.total, budget.steps_per_rank
    if not total or not steps_per_rank:
        return local_steps / (workers * budget.unit)
    upper_bound = budget.upper_bound(workers)
    if upper_bound is None or confirmed <= upper_bound:  # Otherwise there is more data than expected.
        local_steps = min(local_steps, total)
    return local_steps / total * steps_per_rank + step_offset


def below_end(global_steps: float, budget: RunBudget, step_offset: int = 0) -> float:
    """Return ``global_steps``, slightly reduced if they are exactly the end of the run.

    For estimates: only the server knows that the run has ended, and the last validation must not start before that.
    """
    steps_per_rank = budget.steps_per_rank
    if steps_per_rank is None or global_steps != steps_per_rank + step_offset:
        return global_steps
    return global_steps - _UNCONFIRMED


def to_local_steps(global_steps: float, budget: RunBudget, workers: int, step_offset: int = 0) -> float:
    """Convert global steps to local steps of all workers: the inverse of :func:`to_global_steps`.

    Args:
        global_steps: global steps.
        budget: budget of the run.
        workers: number of workers that the run was started with.
        step_offset: global steps that the trainer has counted beyond the steps of this run.

    """
    total, steps_per_rank = budget.total, budget.steps_per_rank
    if not total or not steps_per_rank:
        return global_steps * workers * budget.unit
    return (global_steps - step_offset) / steps_per_rank * total
