"""The Lightning strategy: what happens when in a ``Trainer``'s run.

Before and after the asynchronous phase of ``fit`` this is an ordinary synchronous strategy. Inside it, from
``on_train_start`` to the moment the budget is met, every rank runs at its own speed: collectives are local, rank 0
alone validates, saves and logs, and the weights it does that with are the global model's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer
from typing_extensions import override

from lightning_async_localsgd.averaging import averages, forgo_second_pass
from lightning_async_localsgd.callback import AsyncLocalSGDCallback
from lightning_async_localsgd.checkpoints import without_theta
from lightning_async_localsgd.children import ended_ranks, raise_if_process_ended
from lightning_async_localsgd.epochs import TrainingData
from lightning_async_localsgd.grace import GraceWindow
from lightning_async_localsgd.guard import UpdateGuard
from lightning_async_localsgd.hyperparameters import seconds, switch
from lightning_async_localsgd.interval import check_interval
from lightning_async_localsgd.joining import token_of
from lightning_async_localsgd.launcher import AsyncProcessLauncher, AsyncScriptLauncher
from lightning_async_localsgd.layout import Layout
from lightning_async_localsgd.limits import LiftedLimits, run_budget, steps_of_an_optimizer
from lightning_async_localsgd.merging import MergeOptions
from lightning_async_localsgd.options import ExchangeOptions
from lightning_async_localsgd.outer import Nesterov, OuterOptimizer, resolve_outer_optimizer
from lightning_async_localsgd.pacing import SpeedAwareSteps
from lightning_async_localsgd.phase import AsyncPhase
from lightning_async_localsgd.phase_base import Phase
from lightning_async_localsgd.plan import RunBudget, steps_ahead
from lightning_async_localsgd.refusals import (
    refuse_callbacks,
    refuse_merging,
    refuse_plugins,
    refuse_process_group,
    refuse_search,
    refuse_workers,
)
from lightning_async_localsgd.registration import register_names
from lightning_async_localsgd.restarts import WorkersLostError
from lightning_async_localsgd.saving import SavingStrategy
from lightning_async_localsgd.settings import PhaseSettings
from lightning_async_localsgd.staleness import Staleness
from lightning_async_localsgd.trainer_parts import (
    callbacks_of,
    load_states_of_callbacks,
    may_unfreeze,
    searches_learning_rate,
    states_of_callbacks,
)
from lightning_async_localsgd.training import AsyncTraining

# What the constructor's annotations name is imported above, at run time: command lines read it from the module.
if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch import Tensor

_LAUNCHERS = (AsyncScriptLauncher, AsyncProcessLauncher)


START_METHODS = ("popen", "spawn", "fork", "forkserver")
"""How ranks may be started."""


class AsyncLocalSGDStrategy(SavingStrategy):
    """Trains one model on ranks of unequal speed, none of which waits for another.

    Every rank takes local optimizer steps at its own pace, and merges what it has learned in a round into a global
    model on rank 0 the moment the round is done (Liu et al., *Asynchronous Local-SGD Training for Language Modeling*,
    arXiv 2401.09135). ``max_steps=S`` on k ranks means S*k local steps of all ranks together, the samples that
    ``"ddp"`` would have used. What is validated, saved, logged and left in the module at the end is the global model.

    Args:
        local_steps: local optimizer steps in a round of the fastest worker (the paper's H).
        outer_optimizer: how a round's pseudo-gradient changes the global model: a rule from
            :mod:`lightning_async_localsgd.outer`, or a callable that makes a torch optimizer from parameters, which is
            then stepped once per push. ``None`` is ``DelayedNesterov(lr=0.7, momentum=0.9)``, and with a ``quorum``
            other than 1 ``outer.Nesterov(lr=0.7, momentum=0.9)``.
        dynamic_local_steps: whether slower workers take proportionally fewer local steps, so that all rounds take
            about the same time (DyLU, equation 6).
        grace: for how long, from the first arrival on, finished workers wait to be dispatched together: seconds, 0 for
            not at all, or ``"auto"``: as long as it takes those who are about to finish, at most 15 % of their time.
        quorum: how many different workers hand in before their pushes are merged, as one step on their average: 1
            merges each push as it comes, ``"all"`` is synchronous DiLoCo.
        warmup_steps: steps per worker, counted as in ``max_steps``, in which the quorum comes down from all workers to
            ``quorum``, so that training begins synchronously.
        staleness: what becomes of pushes from older models: a stage of :mod:`lightning_async_localsgd.staleness`.
            ``None`` merges them like others.
        merge: weights of pushes, their average, and limits. ``None`` is ``MergeOptions()``.
        exchange: transport, port and encryption of the exchange between ranks. ``None`` is ``ExchangeOptions()``.
        start_timeout: seconds that rank 0 waits for the other ranks at the start, and they for rank 0.
        silence_timeout: seconds without a sign of life after which a worker, or the server, counts as gone. One that
            has come back from a longer silence is given up later the next time.
        max_restarts: how often the launcher starts a worker again that has died in training; it then rejoins.
        strict: whether the job ends with an error if a worker was lost, though the others have met the budget.
        checkpoint_every: how often rank 0 writes a checkpoint into the run's folder, and each worker its optimizers'
            states: a number of rounds merged, a ``timedelta``, or ``None`` for never.
        max_update_norm: the largest L2 norm of a pseudo-gradient that is merged; ``"auto"`` is a hundred times the
            median of the last ones, ``None`` is no limit. NaN and infinite values are never merged.
        token: secret of the run. With one, machines that know it may join while training runs. ``None`` takes the
            environment's ``ASYNC_LOCALSGD_TOKEN``; without that, the ranks agree on a random one among themselves.
        accelerator: see :class:`~lightning.pytorch.strategies.DDPStrategy`.
        parallel_devices: likewise.
        cluster_environment: likewise.
        checkpoint_io: likewise.
        precision_plugin: likewise.
        process_group_backend: of the process group that ``validate``, ``test`` and ``predict`` use; ``fit`` has none.
        timeout: of that process group.
        start_method: how ranks are started: ``"popen"`` runs the script again, ``"spawn"``, ``"fork"`` and
            ``"forkserver"`` use :mod:`multiprocessing`.

    Raises:
        ValueError: an option is outside its range; the text names it, its value and the way out.
        TypeError: ``outer_optimizer`` is none.

    Example::

        import lightning as L
        from lightning_async_localsgd import AsyncLocalSGDStrategy, DelayedNesterov

        strategy = AsyncLocalSGDStrategy(local_steps=50, outer_optimizer=DelayedNesterov(lr=0.7, momentum=0.9))
        trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=4, max_steps=1000)

    """

    strategy_name = "async_localsgd"

    def __init__(
        self,
        local_steps: int = 50,
        outer_optimizer: OuterOptimizer | Callable[[Iterable[Any]], Optimizer] | None = None,
        dynamic_local_steps: bool = True,
        grace: Literal["auto"] | float = "auto",
        quorum: int | Literal["all"] = 1,
        warmup_steps: int = 0,
        staleness: Staleness | None = None,
        merge: MergeOptions | None = None,
        exchange: ExchangeOptions | None = None,
        start_timeout: float = 1800.0,
        silence_timeout: float = 60.0,
        max_restarts: int = 3,
        strict: bool = False,
        checkpoint_every: int | timedelta | None = timedelta(minutes=10),
        max_update_norm: float | Literal["auto"] | None = "auto",
        token: str | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        super().__init__(
            exchange,
            start_timeout,
            token,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        SpeedAwareSteps(local_steps, dynamic_local_steps)  # Checks them where the user can see it.
        if start_method not in START_METHODS:
            raise ValueError(f"start_method={start_method!r} is unknown; use one of {', '.join(START_METHODS)}")
        if type(max_restarts) is not int or max_restarts < 0:
            raise ValueError(f"max_restarts={max_restarts!r} must be a number of restarts of each worker, 0 or more")
        check_interval(checkpoint_every)
        UpdateGuard(max_update_norm)
        self.max_restarts = max_restarts
        self.strict = switch("strict", strict)
        self.checkpoint_every = checkpoint_every
        self.max_update_norm = max_update_norm
        self.local_steps = local_steps
        if outer_optimizer is None and quorum != 1:
            outer_optimizer = Nesterov(lr=0.7, momentum=0.9)
        self.outer_optimizer = resolve_outer_optimizer(outer_optimizer)
        self.dynamic_local_steps = switch("dynamic_local_steps", dynamic_local_steps)
        self.grace = GraceWindow(grace)
        self.merge = merge if merge is not None else MergeOptions()
        refuse_merging(quorum, warmup_steps, staleness, self.merge, self.outer_optimizer, self.grace, max_update_norm)
        self.quorum = quorum
        self.warmup_steps = warmup_steps
        self.staleness = staleness
        self.silence_timeout = seconds("silence_timeout", silence_timeout)
        self._seed = 0
        self._limits: LiftedLimits | None = None
        self._data: TrainingData | None = None
        self._distributes_data = True
        self._searching = False
        self._done: int | None = None
        self._failed = False

    @override
    def __repr__(self) -> str:
        # A Trainer of Lightning's other package refuses this object, and shows it when it does.
        mine, other, path = "lightning.pytorch", "pytorch_lightning", "lightning_async_localsgd.pytorch_lightning"
        if not Strategy.__module__.startswith(mine):
            mine, other, path = other, mine, "lightning_async_localsgd"
        return f"<{type(self).__name__} for {mine}.Trainer; for {other}.Trainer there is {path}.{type(self).__name__}>"

    # ------------------------------------------------------------ registration

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        register_names(strategy_registry, cls)

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        refuse_plugins(self, self._start_method)
        invited = self._invitation
        if invited is None or not invited.stranger:  # Who joins later is none of those that the run was started with.
            self._refuse_workers(max(1, self.num_nodes * self.num_processes), token_of(self._token) is not None)
        if self._start_method == "popen" or (invited is not None and invited.stranger):
            self._launcher = AsyncScriptLauncher(
                self.cluster_environment, self.num_processes, self.num_nodes, self.max_restarts
            )
        else:
            self._launcher = AsyncProcessLauncher(self, self._start_method, self.max_restarts)

    def _refuse_workers(self, workers: int, joinable: bool) -> None:
        rule = resolve_outer_optimizer(self.outer_optimizer)
        refuse_workers(workers, joinable, self.quorum, self.warmup_steps, self.staleness, self.merge, rule, self.grace)

    # ------------------------------------------------------------------- set-up

    @override
    def setup_environment(self) -> None:
        Strategy.setup_environment(self)  # Not DDPStrategy's, which would open a process group.
        self._failed = False
        self._restored = self._position = None
        self._meet(self._trainer.state.fn == TrainerFn.FITTING)
        trainer = self._trainer
        if self.joins:
            trainer.num_sanity_val_steps = 0  # That is done before training.
        if trainer.state.fn == TrainerFn.FITTING:
            if self.world_size > 1:
                refuse_process_group()
            self._last_state = None
            self.inner_file = None
            callbacks = callbacks_of(trainer)
            own = next((one for one in callbacks if isinstance(one, AsyncLocalSGDCallback)), None)
            if own is not None:
                callbacks.remove(own)
            # The first of all: whoever comes after it sees the run's counts, and at its end the final model.
            callbacks.insert(0, own or AsyncLocalSGDCallback())
            connector = trainer._accelerator_connector
            self._distributes_data = connector.use_distributed_sampler
            connector.use_distributed_sampler = False  # Training data is leased, rank 0 validates on everything.
            told = int(os.environ.get("PL_GLOBAL_SEED", 0)), self.run_name
            if self._rendezvous is not None:
                told = self._rendezvous.broadcast(told)
            if self._entry is not None:
                told = self._entry.facts.seed, self._entry.facts.folder
            self._seed, self.run_name = told
            self._data = self._training_data(trainer)
        else:
            self._open_group()

    def _training_data(self, trainer: pl.Trainer) -> TrainingData:
        alone = self.world_size == 1 and token_of(self._token) is None
        return TrainingData(trainer, self.world_size, self._seed, self._distributes_data, self._rendezvous, alone)

    @property
    def _workers(self) -> int:
        """Workers that the run is started with."""
        return self.world_size

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            # What cannot work is refused before anything has been trained.
            assert self.lightning_module is not None
            refuse_callbacks(trainer)
            if self.joins:
                refuse_search(trainer)
            Layout.of(self.lightning_module, self._exchanges_frozen)
            run_budget(trainer, self._workers)
        Strategy.setup(self, trainer)
        if fitting and trainer.max_steps != 0 and trainer.fit_loop.max_epochs != 0:
            # Before the loop first asks whether it is done: a resumed rank's own count may be past a limit that all
            # ranks together have not reached.
            self._limits = LiftedLimits(trainer)
        if not fitting and self._rendezvous is not None:
            assert self.model is not None
            _sync_module_states(self.model)

    @override
    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:  # type: ignore[override]
        """No wrapper: gradients are not reduced."""
        return model

    @property
    def _exchanges_frozen(self) -> bool:
        frozen = self.exchange.frozen
        return may_unfreeze(self._trainer) if frozen == "auto" else frozen

    # ------------------------------------------------- the asynchronous phase

    @override
    def on_train_start(self) -> None:
        trainer = self._trainer
        assert self.lightning_module is not None
        if searches_learning_rate(trainer):
            # Rank 0 tries the learning rates, before anything is trained; the others wait for what it finds.
            self._searching = True
            if self.is_global_zero:
                # With the user's own loader: nothing can be leased yet.
                trainer.fit_loop._combined_loader = None
                trainer.fit_loop.setup_data()
            else:
                trainer.fit_loop.epoch_loop.max_steps = trainer.global_step
            return
        restored, self._restored = self._restored, None
        if restored is None and self._done is None and trainer.global_step > 0:
            rank_zero_info(
                f"The checkpoint holds no state of an {self.strategy_name} run: the global model starts from its "
                "weights, the outer optimizer from scratch."
            )
        if restored is not None and restored["initial_workers"] != self._workers:
            rank_zero_info(
                f"the checkpoint was written with {restored['initial_workers']} workers; going on with {self._workers}"
            )
        assert self._limits is not None
        assert self._data is not None
        if forgo_second_pass(trainer):
            self._limits.lift_epochs()
        budget = run_budget(trainer, self._workers, self._data)
        # What a checkpoint of another strategy says to be done is what every rank would have done.
        done = self._done
        if done is None:
            done = round(trainer.global_step * budget.total_per_planned_step(self._workers))
        settings = PhaseSettings(
            local_steps=self.local_steps,
            rule=resolve_outer_optimizer(self.outer_optimizer),
            dynamic_local_steps=self.dynamic_local_steps,
            grace=self.grace,
            exchange=self.exchange,
            start_timeout=self.start_timeout,
            silence_timeout=self.silence_timeout,
            budget=budget,
            done=done,
            ahead=self._steps_ahead(budget),
            frozen=self._exchanges_frozen,
            max_update_norm=self.max_update_norm,
            quorum=self.quorum,
            warmup_steps=self.warmup_steps,
            staleness=self.staleness,
            merge=self.merge,
            token=token_of(self._token),
            fit=self._fit,
            seed=self._seed,
            folder=self.run_name,
        )
        self._training = training = self._begin(settings, restored, budget)
        if any(entry.dtype == "torch.float64" for entry in training.phase.binding.layout.entries):
            rank_zero_warn(
                f"The global model of {self.strategy_name} is kept in fp32: parameters and buffers of dtype fp64 are "
                "rounded to it at every exchange. Within a round they are trained in fp64."
            )

    def _steps_ahead(self, budget: RunBudget) -> int:
        """Global steps that the trainer has counted beyond what the run calls done, the same on all ranks."""
        if self._entry is not None:
            return self._entry.facts.ahead
        counted = steps_of_an_optimizer(self._trainer)
        ahead = steps_ahead(self._position, budget, counted)
        if ahead:
            assert self._position is not None
            rank_zero_warn(
                f"each rank had {self._position.planned} optimizer steps in the epochs that are done, and with these "
                f"ranks and batches it would have had {counted - ahead}. As under DDP global_step goes on from "
                f"{counted}, and comes to {(budget.planned or 0) + ahead}: a learning-rate schedule that was made for "
                f"{budget.planned} steps (trainer.estimated_stepping_batches) ends elsewhere"
            )
        return ahead

    def _begin(self, settings: PhaseSettings, restored: dict[str, Any] | None, budget: RunBudget) -> AsyncTraining:
        """The asynchronous phase begins."""
        trainer = self._trainer
        assert self.lightning_module is not None
        assert self._data is not None
        assert self._limits is not None
        phase = AsyncPhase(
            settings,
            self.lightning_module,
            self._rendezvous,
            self.global_rank,
            self.world_size,
            restored=restored,
            watch=raise_if_process_ended,
            entry=self._entry,
        )
        if phase.open_to is not None:
            rank_zero_info(f"others may join at {phase.open_to} with this run's token")
        alone = restored.get("alone") if restored is not None and phase.alone else None
        try:
            training = AsyncTraining(trainer, phase, self._data, self._limits, budget, alone, self._entry)
        except BaseException:
            phase.close()
            raise
        if isinstance(self.launcher, _LAUNCHERS):
            self.launcher.mark_started(phase.ticket, phase.may_restart)
        if self._rendezvous is not None:
            self._rendezvous.tolerate_deaths()
        return training

    @override
    def process_dataloader(self, dataloader: object) -> object:
        dataloader = super().process_dataloader(dataloader)
        if self._data is not None and self._trainer.state.stage == RunningStage.TRAINING and not self._searching:
            return self._data.take(dataloader)
        return dataloader

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._training is not None:
            self._training.see_batch(batch)

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: Any = None,
        **kwargs: Any,
    ) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        assert self.lightning_module is not None
        if self.lightning_module.automatic_optimization:
            self._end_step()
        return output

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().training_step(*args, **kwargs)
        assert self.lightning_module is not None
        if not self.lightning_module.automatic_optimization:
            # The module has stepped its optimizers itself. Only now may weights change: between two of its steps an
            # autograd graph would still need the old ones.
            self._end_step()
        return output

    def _end_step(self) -> None:
        if self._training is not None:
            self._training.end_step()

    @override
    def on_validation_start(self) -> None:
        if self._training is not None:
            self._training.settle()
            self._training.phase.show_global_model()

    @override
    def on_validation_end(self) -> None:
        if self._training is not None:
            self._training.phase.hide_global_model()
            self._training.end_validation()

    @override
    def on_train_end(self) -> None:
        self._searching = False
        if self._training is not None:
            self._training.finish()
            self._end_restarts()
        # From here on collectives are real again.
        training, self._training = self._training, None
        if training is None:
            return
        trainer, phase = self._trainer, training.phase
        lost: list[int] = []
        assert self.lightning_module is not None
        if self._rendezvous is not None:
            self._rendezvous.meet_again()
            if self.is_global_zero:
                self._rendezvous.survivors = phase.survivors
            training.save_inner_states(self._rendezvous)
            self._rendezvous.barrier("end of training")
            training.gather_inner_states(self._rendezvous)
            lost = self._lost(phase)  # Now, while all that are left are still there.
            if self.is_global_zero:
                left = phase.survivors()
                self._rendezvous.survivors = lambda: left - ended_ranks()
            training.agree(self._rendezvous)
        untouched = phase.share_end(averaged=bool(averages(trainer)))
        if self.is_global_zero:
            state = training.state_dict()
            holds_it = untouched and phase.restored_by(self.lightning_module.state_dict())
            self._last_state = without_theta(state) if holds_it else state
            self._done = self._last_state["budget"]["done"]
        training.release()
        self._limits = None
        if self._rendezvous is not None:
            states = self._rendezvous.broadcast(states_of_callbacks(trainer))
            if not self.is_global_zero:
                load_states_of_callbacks(trainer, states)
        phase.close()
        if self.strict and lost:
            raise WorkersLostError(
                f"training is complete, but strict=True, and worker(s) {', '.join(map(str, lost))} were lost; what was "
                "to be saved is saved"
            )

    def _lost(self, phase: Phase) -> list[int]:
        """On rank 0: the workers of the beginning that are not there, and those whose pushes were refused for good."""
        if phase.server is None or self._rendezvous is None:
            return []
        there = phase.survivors() - phase.server.quarantined
        return [worker for worker in range(self.world_size) if worker not in there]

    # -------------------------------------------------------------- collectives

    @property
    @override
    def _apart(self) -> bool:
        return self._training is not None or self._searching

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        if self._training is not None and self._training.local_values is not None:
            self._training.local_values.gathers()
        return super().all_gather(tensor, group, sync_grads)

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        if self._training is not None and self._training.local_values is not None:
            self._training.local_values.reduces(tensor)
        return super().reduce(tensor, group, reduce_op)

    # -------------------------------------------------------------------- the end

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._failed = True
        self._abandon(f"rank {self.global_rank} ended with {type(exception).__name__}: {exception}")

    def _end_restarts(self) -> None:
        if isinstance(self.launcher, _LAUNCHERS):
            self.launcher.mark_ended()

    def _abandon(self, reason: str) -> None:
        self._searching = False
        self._end_restarts()
        training, self._training = self._training, None
        if training is not None:
            with suppress(Exception):  # Whatever went wrong first is what the user must see.
                training.phase.close(reason)
            training.release()
        elif self._limits is not None:
            self._limits.restore()
        self._limits = None

    @override
    def teardown(self) -> None:
        self._abandon("the trainer was torn down")
        if self._data is not None:
            self._trainer._accelerator_connector.use_distributed_sampler = self._distributes_data
            self._data = None
        self._part(waiting=not (self._failed and self.is_global_zero))
        if self._failed and isinstance(self.launcher, AsyncScriptLauncher):
            # In training the ranks of a node go on without the one that has launched them, elsewhere all are needed.
            module = self.lightning_module
            trainer = module._trainer if module is not None else None
            if self.is_global_zero or trainer is None or trainer.state.fn != TrainerFn.FITTING:
                self.launcher.end_processes()
        # A model on the meta device was refused, and cannot be moved to the CPU: the refusal is what the user must see.
        with suppress(NotImplementedError) if self._failed else nullcontext():
            super().teardown()
