"""The first event of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_async_localsgd.server.events import FORMAT, Event

if TYPE_CHECKING:
    from lightning_async_localsgd.server.coordinator import Coordinator


def begin_event(coordinator: Coordinator, now: float) -> Event:
    """Return the first event of a run, which says what a replay needs to begin with."""
    content = {
        "format": FORMAT,
        "incarnation": coordinator.incarnation,
        "workers": coordinator.membership.expected,
        "ranks": coordinator.membership.cohort,
        "min_workers": coordinator.minimum.workers,
        "version": coordinator.model.version,
        "done": coordinator.budget.done,
        "total": coordinator.budget.total,
        "fingerprint": coordinator.model.layout.fingerprint,
    }
    if coordinator.membership.sizes.counts_samples:
        content["step_samples"] = coordinator.membership.sizes.reference
    return Event("begin", now, content)
