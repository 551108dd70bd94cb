"""What a run is planned to come to in local steps, and how far in that plan it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple


class EpochSteps(NamedTuple):
    """What an epoch comes to.

    Attributes:
        total: local steps of all workers together.
        planned: optimizer steps that each rank would take under DDP.

    """

    total: int
    planned: int


@dataclass(frozen=True)
class RunBudget:
    """What a trainer's limits come to.

    Attributes:
        total: local steps of all workers together; None for no end.
        planned: the same as the optimizer steps that each rank would take under DDP; None for no end.
        limit: which of the trainer's limits it is.
        epochs: where each rank's own ``max_epochs`` ends the run, and epochs are the run's: what each of them is
            expected to come to, of which ``total`` and ``planned`` are the sums. Else nothing.

    """

    total: int | None
    planned: int | None
    limit: Literal["max_steps", "max_epochs"] | None = None
    epochs: tuple[EpochSteps, ...] = ()

    @classmethod
    def of_epochs(cls, epochs: Sequence[EpochSteps]) -> RunBudget:
        """The budget of a run that ends with its data."""
        total, planned = (sum(numbers) for numbers in zip(*epochs, strict=True)) if epochs else (0, 0)
        return cls(total, planned, "max_epochs", tuple(epochs))

    @property
    def ends_with_data(self) -> bool:
        """The data ends the run, and the numbers are what it is expected to come to."""
        return self.limit == "max_epochs" and bool(self.epochs)

    def at_most(self, workers: int) -> int | None:
        """Local steps that are not passed if the estimate was right; None where ``total`` is none.

        Each worker may end an epoch with a part of a window of accumulated batches.
        """
        return self.total + workers * len(self.epochs) if self.ends_with_data and self.total is not None else None

    def total_per_planned_step(self, workers: int) -> float:
        """Local steps of all workers together for each planned step of a rank."""
        return self.total / self.planned if self.total and self.planned else workers


class Position(NamedTuple):
    """How far a run is that ends with its data, for one that goes on from there and may have other ranks or batches.

    Attributes:
        epochs: that are done, with a part of one.
        total: local steps of all workers together that these have taken.
        planned: optimizer steps that each rank would have taken under DDP.

    """

    epochs: float
    total: int
    planned: int

    @classmethod
    def of(cls, done: int, budget: RunBudget) -> Position | None:
        """Of a run with so many local steps done; None if they are more than its data was expected to come to."""
        begin = 0
        for number, epoch in enumerate(budget.epochs):
            if done < begin + epoch.total:
                return cls.at(number + (done - begin) / epoch.total, budget)
            begin += epoch.total
        return cls.at(float(len(budget.epochs)), budget) if done == begin else None

    @classmethod
    def at(cls, epochs: float, budget: RunBudget) -> Position:
        """Where so many epochs of a run are done."""
        whole = int(epochs)
        total, planned = (sum(epoch[kind] for epoch in budget.epochs[:whole]) for kind in (0, 1))
        if whole < len(budget.epochs):
            present = budget.epochs[whole]
            total += round((epochs - whole) * present.total)
            planned += round((epochs - whole) * present.planned)
        return cls(epochs, total, planned)

    @classmethod
    def in_state(cls, state: Mapping[str, Any]) -> Position | None:
        """What a server's saved state says; None if it says nothing."""
        position = state.get("position")
        return None if position is None else cls(*position)


def restored_done(state: Mapping[str, Any], budget: RunBudget, workers: int) -> int:
    """Local steps that count as done in a run that goes on from a server's saved state.

    What ends with its data is as far in it as it was, whatever the ranks, batches and windows are now. Else what is
    done stays the same share of each worker's steps.
    """
    done, before = int(state["budget"]["done"]), int(state["initial_workers"])
    if not budget.ends_with_data:
        return round(done * workers / before)
    position = Position.in_state(state)
    return done if position is None else Position.at(position.epochs, budget).total


def steps_ahead(position: Position | None, budget: RunBudget, counted: int) -> int:
    """Global steps that a trainer has counted beyond what its run, as it goes on now, calls done.

    Args:
        position: that the run goes on from; None if there is none.
        budget: of the run.
        counted: steps that the trainer has counted.

    """
    if position is None or not budget.ends_with_data:
        return 0
    here = Position.at(position.epochs, budget)
    if here == position:
        return 0
    assert budget.total is not None
    assert budget.planned is not None
    return counted - math.floor(here.total / max(1, budget.total) * budget.planned)
