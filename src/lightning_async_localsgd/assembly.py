"""The decisions of a run, put together from its settings: the same ones for the live server and a simulated cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_async_localsgd.budget import Budget
from lightning_async_localsgd.coordinator import Coordinator
from lightning_async_localsgd.global_model import GlobalModel
from lightning_async_localsgd.guard import UpdateGuard
from lightning_async_localsgd.merging import Merging
from lightning_async_localsgd.pacing import SpeedAwareSteps

if TYPE_CHECKING:
    from lightning_async_localsgd.layout import Layout
    from lightning_async_localsgd.settings import PhaseSettings


def build_coordinator(
    settings: PhaseSettings, layout: Layout, workers: int, incarnation: str, exact: bool = False
) -> Coordinator:
    """The coordinator of a run, with a model of zeros: whoever calls fills it, and then restores a saved state.

    Args:
        settings: of the phase; the coordinator takes over their outer optimizer.
        layout: of the model.
        workers: that the run is started with.
        incarnation: random name of this start of the server.
        exact: there is one worker, and none can join. Where the outer step is just theta - g, such a run is plain
            training to the last bit, which leaves out no step because it is an unusual one.

    Raises:
        ValueError: the outer optimizer's options don't fit the number of workers.

    """
    model = GlobalModel(layout, settings.rule, workers)
    plain = exact and settings.rule.replaces_model and all(entry.dtype == "torch.float32" for entry in layout.entries)
    limit = None if settings.max_update_norm == "auto" and plain else settings.max_update_norm
    return Coordinator(
        model,
        SpeedAwareSteps(settings.local_steps, settings.dynamic_local_steps),
        settings.grace,
        Budget(settings.budget.total, settings.done, settings.budget.at_most(workers)),
        cohort=workers,
        incarnation=incarnation,
        guard=UpdateGuard(limit),
        merging=Merging(model, workers, settings.quorum, settings.warmup_steps, settings.staleness, settings.merge),
    )
