"""What other threads may ask the server about the run."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_async_localsgd.server.coordinator import Coordinator
    from lightning_async_localsgd.server.run_stats import RunSnapshot, WorkerTotals

_T = TypeVar("_T")


class ServerQueries(ABC):
    """Questions about the run. Any thread may ask them, and waits for the owner thread."""

    _snapshot: RunSnapshot

    @abstractmethod
    def _ask(self, question: Callable[[Coordinator], _T]) -> _T:
        """Run ``question`` in the owner thread, between two events, and return its answer."""

    @property
    def snapshot(self) -> RunSnapshot:
        """State of the run after the last event."""
        return self._snapshot

    @property
    def quarantined(self) -> frozenset[int]:
        """Workers that are refused for the rest of the run, after the last event."""
        return self._snapshot.quarantined

    @property
    def live(self) -> list[int]:
        """Live workers, in order of their numbers."""
        return self._ask(lambda coordinator: coordinator.live)

    @property
    def missing(self) -> list[int]:
        """Workers of the cohort that have not joined yet; empty once training has started."""
        return self._ask(lambda coordinator: coordinator.membership.missing)

    @property
    def missing_joiners(self) -> int:
        """Number of workers that have to join by hand before training starts."""

        def count(coordinator: Coordinator) -> int:
            return coordinator.membership.missing_count - len(coordinator.membership.missing)

        return self._ask(count)

    @property
    def present(self) -> set[int]:
        """Live workers, and those that have left after the end of training."""
        return self._ask(lambda coordinator: coordinator.membership.stayed | set(coordinator.live))

    @property
    def finished(self) -> bool:
        """Whether all workers have been sent the final model."""
        return self._ask(lambda coordinator: coordinator.finished)

    @property
    def synchronous_steps(self) -> int:
        """Number of complete steps of the synchronous beginning."""
        return self._ask(lambda coordinator: coordinator.beginning.completed)

    @property
    def optimizer_files(self) -> dict[int, str]:
        """The last :attr:`.Push.optimizer_file` of each worker."""
        return self._ask(lambda coordinator: dict(coordinator.membership.optimizer_files))

    def totals(self) -> dict[int, WorkerTotals]:
        """Return copies of the totals of all workers."""
        return self._ask(
            lambda coordinator: {n: dataclasses.replace(totals) for n, totals in coordinator.totals.items()}
        )
