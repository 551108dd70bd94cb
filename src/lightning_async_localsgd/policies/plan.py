"""The planned local steps of a run and its epochs, and the position of a run in that plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple


class EpochSteps(NamedTuple):
    """Planned steps of an epoch.

    Attributes:
        total: local steps of all workers together, or other units, see :class:`.StepSizes`.
        steps_per_rank: optimizer steps that each rank would take under DDP.

    """

    total: int
    steps_per_rank: int


@dataclass(frozen=True)
class RunBudget:
    """Planned steps of a run, from the trainer's limits.

    Attributes:
        total: local steps of all workers together, or other units, see :class:`.StepSizes`; None for no end.
        steps_per_rank: optimizer steps that each rank would take under DDP; None for no end.
        limit: the trainer's limit that the plan follows from.
        epochs: planned steps of each epoch, if ``max_epochs`` ends the run and all ranks share its epochs. ``total``
            and ``steps_per_rank`` are their sums. Empty otherwise.
        unit: units of a step of the script's own batch size.

    """

    total: int | None
    steps_per_rank: int | None
    limit: Literal["max_steps", "max_epochs"] | None = None
    epochs: tuple[EpochSteps, ...] = ()
    unit: int = 1

    @classmethod
    def of_epochs(cls, epochs: Sequence[EpochSteps], unit: int = 1) -> RunBudget:
        """Return the plan of a run that ends with its data."""
        total, steps_per_rank = (sum(numbers) for numbers in zip(*epochs, strict=True)) if epochs else (0, 0)
        return cls(total, steps_per_rank, "max_epochs", tuple(epochs), unit)

    @property
    def ends_with_data(self) -> bool:
        """Whether the end of the data ends the run, so that the numbers are estimates."""
        return self.limit == "max_epochs" and bool(self.epochs)

    def upper_bound(self, workers: int) -> int | None:
        """Return the largest number of units if the estimate is right; None if ``total`` is not an estimate.

        Each worker may end an epoch with an incomplete window of accumulated batches.
        """
        if not self.ends_with_data or self.total is None:
            return None
        return self.total + workers * len(self.epochs) * self.unit

    def total_per_rank_step(self, workers: int) -> float:
        """Return the units of all workers together per planned step of a rank."""
        return self.total / self.steps_per_rank if self.total and self.steps_per_rank else workers * self.unit


class Position(NamedTuple):
    """Position of a run that ends with its data. A resumed run may have another number of ranks or batches.

    Attributes:
        epochs: number of finished epochs, with a fraction.
        total: local steps of all workers together in these epochs.
        steps_per_rank: optimizer steps that each rank would have taken under DDP.

    """

    epochs: float
    total: int
    steps_per_rank: int

    @classmethod
    def of(cls, done: int, budget: RunBudget) -> Position | None:
        """Return the position after ``done`` local steps; None if the plan has fewer steps."""
        begin = 0
        for number, epoch in enumerate(budget.epochs):
            if done < begin + epoch.total:
                return cls.at(number + (done - begin) / epoch.total, budget)
            begin += epoch.total
        return cls.at(float(len(budget.epochs)), budget) if done == begin else None

    @classmethod
    def at(cls, epochs: float, budget: RunBudget) -> Position:
        """Return the position after ``epochs`` epochs."""
        whole = int(epochs)
        total, steps_per_rank = (sum(epoch[kind] for epoch in budget.epochs[:whole]) for kind in (0, 1))
        if whole < len(budget.epochs):
            present = budget.epochs[whole]
            total += round((epochs - whole) * present.total)
            steps_per_rank += round((epochs - whole) * present.steps_per_rank)
        return cls(epochs, total, steps_per_rank)

    @classmethod
    def in_state(cls, state: Mapping[str, Any]) -> Position | None:
        """Return the position in a server's saved state; None if there is none."""
        position = state.get("position")
        return None if position is None else cls(*position)


def restored_done(state: Mapping[str, Any], budget: RunBudget, workers: int) -> int:
    """Return the units that count as done in a run that resumes from a server's saved state.

    A run that ends with its data keeps its position in the data, whatever its ranks and batches are now. In other runs,
    the done steps per worker stay the same.
    """
    done, before = int(state["budget"]["done"]), int(state["initial_workers"])
    unit = int(state["budget"].get("unit", 1))
    if unit != budget.unit:  # Batch sizes are other ones, or workers had none of their own.
        done = round(done / unit * budget.unit)
    if not budget.ends_with_data:
        return round(done * workers / before)
    position = Position.in_state(state)
    return done if position is None else Position.at(position.epochs, budget).total


def step_offset_of(position: Position | None, budget: RunBudget, counted: int) -> int:
    """Return the global steps that a trainer has counted beyond the steps that its resumed run counts as done.

    Args:
        position: position that the run resumes from; None if there is none.
        budget: plan of the resumed run.
        counted: global steps that the trainer has counted.

    """
    if position is None or not budget.ends_with_data:
        return 0
    here = Position.at(position.epochs, budget)
    if here == position:
        return 0
    assert budget.total is not None
    assert budget.steps_per_rank is not None
    return counted - math.floor(here.total / max(1, budget.total) * budget.steps_per_rank)
