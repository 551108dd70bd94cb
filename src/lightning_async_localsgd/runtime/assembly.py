"""Makes the coordinator of a run from the run's settings, for a live server and for a simulated cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.policies.budget import Budget
from lightning_async_localsgd.policies.data_leases import DataLeases
from lightning_async_localsgd.policies.guard import UpdateGuard
from lightning_async_localsgd.policies.plan import restored_done
from lightning_async_localsgd.policies.step_sizes import StepSizes
from lightning_async_localsgd.policies.synchronous_beginning import SynchronousBeginning
from lightning_async_localsgd.policies.worker_minimum import WorkerMinimum
from lightning_async_localsgd.server.coordinator import Coordinator
from lightning_async_localsgd.server.global_model import GlobalModel
from lightning_async_localsgd.server.merging import Merging

if TYPE_CHECKING:
    from lightning_async_localsgd.policies.plan import RunBudget
    from lightning_async_localsgd.protocol.layout import Layout
    from lightning_async_localsgd.runtime.settings import RuntimeSettings


def build_coordinator(
    settings: RuntimeSettings,
    layout: Layout,
    workers: int,
    incarnation: str,
    single_worker: bool = False,
    ranks: int | None = None,
) -> Coordinator:
    """Build the coordinator of a run. Its global model is all zeros: load the model, then a saved state.

    Args:
        settings: settings of the run. The coordinator takes over their pacing and outer optimizer.
        layout: layout of the exchanged tensors.
        workers: number of workers that the run begins with.
        incarnation: random name of this start of the server.
        single_worker: whether only one worker trains and none can join. If the outer step is also ``theta - g``, the
            run is plain training to the last bit, so an unusually large push is not refused.
        ranks: how many of the workers have the numbers 0, 1, ...; the others join. All of them if not given.

    Raises:
        ValueError: The outer optimizer's options do not fit the number of workers.

    """
    model = GlobalModel(layout, settings.outer_optimizer, workers)
    all_fp32 = all(spec.dtype == "torch.float32" for spec in layout.entries)
    plain_training = single_worker and settings.outer_optimizer.replaces_model and all_fp32 and settings.exchange.exact
    limit = settings.merge.options.max_update_norm
    settings.pacing.sizes = sizes = StepSizes(settings.step_samples)
    return Coordinator(
        model,
        settings.pacing,
        settings.grace,
        Budget(settings.budget.total, settings.steps_done, settings.budget.upper_bound(workers), sizes.unit),
        cohort=workers if ranks is None else ranks,
        expected=workers,
        incarnation=incarnation,
        guard=UpdateGuard(None if limit == "auto" and plain_training else limit),
        merging=Merging(model, settings.merge, sizes.counts_samples),
        leases=DataLeases(workers, reserved=settings.reserved_units, lead_unit=settings.samples_of(0) or 1),
        overlap=settings.exchange.overlap,
        beginning=SynchronousBeginning(0 if workers == 1 else settings.sync_warmup_steps, workers, sizes.unit),
        minimum=WorkerMinimum(settings.min_workers, settings.exchange.pause_timeout),
    )


def adapt_saved_state(state: dict[str, Any], budget: RunBudget, workers: int, virtual: bool) -> dict[str, Any]:
    """Adapt a saved server state to the number of workers and the budget of the run that is resumed.

    Args:
        state: see :meth:`.Runtime.state_dict`.
        budget: budget of the resumed run.
        workers: number of workers that the resumed run is started with.
        virtual: whether the resumed run is simulated. Speeds that were measured in the other kind of time are dropped.

    Returns:
        A new state. Its number of finished steps is the one of :func:`.restored_done`.

    """
    if ("simulation" in state) != virtual:
        state = {**state, "pacing": {"speeds": {}, "ratios": {}}}
    return {**state, "budget": {**state["budget"], "done": restored_done(state, budget, workers)}}
