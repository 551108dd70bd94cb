"""Settings of a runtime: policies and numbers of one training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_async_localsgd.protocol.options import ExchangeOptions
from lightning_async_localsgd.protocol.traits import WorkerTraits
from lightning_async_localsgd.server.merge_policy import MergePolicy

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_async_localsgd.launch.evaluator_process import EvaluatorProcess
    from lightning_async_localsgd.outer import OuterOptimizer
    from lightning_async_localsgd.policies.grace import GraceWindow
    from lightning_async_localsgd.policies.pacing import SpeedAwareSteps
    from lightning_async_localsgd.policies.plan import RunBudget
    from lightning_async_localsgd.protocol.moments import SecondMoments
    from lightning_async_localsgd.runtime.optimizer_weights import OptimizerWeights
    from lightning_async_localsgd.server.observers import RunObserver


@dataclass(frozen=True)
class RuntimeSettings:
    """Policies and numbers of one training run.

    The policies are made once, by the strategy's constructor. Policies with a state of their own (``pacing`` and
    ``outer_optimizer``) are copies that belong to this run.

    Args:
        pacing: decides local steps per round (DyLU).
        outer_optimizer: changes the global model.
        grace: decides grace windows.
        budget: work that the trainer's limits allow.
        step_samples: samples in a step of the script's own batch size, if workers have batch sizes of their own. Then
            the run counts samples, see :class:`.StepSizes`. 0 counts steps.
        samples_of: returns the samples in a step of a worker of this process; 0 if the run counts steps.
        batch_size: describes the workers' batch sizes, so that hosts can compare them; "" if the run counts steps.
        merge: quorum, staleness stage, weights and limits of pushes.
        sync_warmup_steps: length of the synchronous beginning in steps per worker.
        exchange: transport, port, encryption and timeouts.
        min_workers: fewest live workers with which training goes on.
        steps_done: local steps of all workers that count as done at the start, where there is no saved server state.
        step_offset: global steps that the trainer has counted beyond the steps of this run, see
            :func:`.step_offset_of`.
        reserved_units: local steps of each epoch that are reserved for worker 0, see :meth:`.DataLeases.lead`.
        exchange_frozen: whether frozen parameters are exchanged like trainable ones.
        moments: second moments that several workers average; None if they do not.
        optimizer_weights: what the inner optimizers remember of weights; None if there are no optimizers.
        token: the user's secret, with which workers may join while training runs. None if there is none.
        fit_number: number of this fit in the script, from 1.
        seed: seed of the training data's order.
        run_name: name of the run's directory.
        traits: what the worker in this process computes with.
        observers: objects that the server tells what happens.
        evaluator: on rank 0, the process that validates for it; None if rank 0 validates, or an evaluator that joins.
        check_wait: called while this process waits for the server or for workers. Raises an error if waiting has become
            pointless.

    """

    pacing: SpeedAwareSteps
    outer_optimizer: OuterOptimizer
    grace: GraceWindow
    budget: RunBudget
    merge: MergePolicy = field(default_factory=MergePolicy)
    sync_warmup_steps: int = 0
    exchange: ExchangeOptions = field(default_factory=ExchangeOptions)
    min_workers: int = 1
    steps_done: int = 0
    step_offset: int = 0
    reserved_units: int = 1
    exchange_frozen: bool = False
    moments: SecondMoments | None = None
    optimizer_weights: OptimizerWeights | None = None
    token: str | None = field(default=None, repr=False)
    fit_number: int = 1
    seed: int = 0
    run_name: str = ""
    traits: WorkerTraits = field(default_factory=WorkerTraits)
    observers: tuple[RunObserver, ...] = ()
    evaluator: EvaluatorProcess | None = None
    check_wait: Callable[[], None] = lambda: None
    step_samples: int = 0
    samples_of: Callable[[int], int] = lambda worker: 0
    batch_size: str = ""
