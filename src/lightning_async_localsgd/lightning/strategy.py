"""The Lightning strategy that trains on ranks of unequal speed, each in a process of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer
from typing_extensions import override

from lightning_async_localsgd.launch.children import report_failure
from lightning_async_localsgd.launch.evaluator_process import EvaluatorProcess
from lightning_async_localsgd.launch.joining import Invitation, begin_call, enter, invitation, takes_part, token_of
from lightning_async_localsgd.launch.stage_group import StageGroup
from lightning_async_localsgd.launch.uncaught import print_in_one_line
from lightning_async_localsgd.lightning.checkpoints.contents import CHECKPOINT_KEY
from lightning_async_localsgd.lightning.checkpoints.optimizer_states import resume_optimizers
from lightning_async_localsgd.lightning.data.training_data import TrainingData
from lightning_async_localsgd.lightning.evaluator import check_can_evaluate, evaluate
from lightning_async_localsgd.lightning.fit_state import FitState
from lightning_async_localsgd.lightning.launchers.host_ranks import JoiningEnvironment, adopt_ranks
from lightning_async_localsgd.lightning.launchers.meeting import meet_ranks, share_model, shown_ranks
from lightning_async_localsgd.lightning.launchers.process_launcher import AsyncProcessLauncher
from lightning_async_localsgd.lightning.launchers.script_launcher import AsyncScriptLauncher
from lightning_async_localsgd.lightning.loop.controller import FitController
from lightning_async_localsgd.lightning.loop.rank_zero_callbacks import callback_states, load_callback_states
from lightning_async_localsgd.lightning.lost_workers import agree_after_training, raise_if_lost
from lightning_async_localsgd.lightning.option_checks import (
    check_no_process_group,
    check_plugins,
    check_processes,
    check_workers,
)
from lightning_async_localsgd.lightning.own_batches import settle_batches
from lightning_async_localsgd.lightning.registration import register_names
from lightning_async_localsgd.lightning.strategy_base import _StrategyBase
from lightning_async_localsgd.lightning.trainer_access.launchers import script_command
from lightning_async_localsgd.lightning.trainer_access.strategy import trainer_of
from lightning_async_localsgd.lightning.waiting import WaitCheck
from lightning_async_localsgd.outer import OuterOptimizer
from lightning_async_localsgd.policies.worker_batches import BatchSizes
from lightning_async_localsgd.protocol.checks import check_bool
from lightning_async_localsgd.protocol.options import ExchangeOptions
from lightning_async_localsgd.protocol.traits import WorkerTraits
from lightning_async_localsgd.runtime.live import LiveRuntime
from lightning_async_localsgd.server.merge_policy import MergeOptions
from lightning_async_localsgd.staleness import Staleness

# Command lines read the constructor's annotations from this module, so their names are imported at run time.
if TYPE_CHECKING:
    from pathlib import Path

    import lightning.pytorch as pl
    from lightning.pytorch.strategies.strategy import TBroadcast
    from torch import Tensor

    from lightning_async_localsgd.launch.joining import JoinGrant
    from lightning_async_localsgd.launch.rendezvous import Rendezvous
    from lightning_async_localsgd.policies.plan import RunBudget
    from lightning_async_localsgd.policies.worker_batches import WorkerBatches
    from lightning_async_localsgd.runtime.settings import RuntimeSettings

_log = logging.getLogger(__name__)

_LAUNCHERS = (AsyncScriptLauncher, AsyncProcessLauncher)


class AsyncLocalSGDStrategy(_StrategyBase):
    """Train one model on ranks of unequal speed, without any rank waiting for another.

    Every rank takes local optimizer steps at its own pace. When it has finished a round of them, it merges the
    round's pseudo-gradient into a global model on rank 0 (Liu et al., *Asynchronous Local-SGD Training for Language
    Modeling*, arXiv 2401.09135). ``max_steps=S`` on k ranks means S*k local steps of all ranks together, the samples
    that ``"ddp"`` would have used. The model that is validated, saved, logged and left in the module at the end is the
    global model.

    Args:
        local_steps: local optimizer steps in a round of the fastest worker (H in the paper). ``"auto"`` takes the
            shortest rounds whose exchange takes at most 2 % of a worker's time, see :class:`.RoundLength`; with a
            ``quorum`` other than 1, it is 50.
        outer_optimizer: how a pseudo-gradient changes the global model: an outer optimizer from
            :mod:`lightning_async_localsgd.outer`, or a callable that makes a torch optimizer from parameters, which is
            then stepped once per push. ``None`` is ``DelayedNesterov(lr="auto", momentum="auto")``, and with a
            ``quorum`` other than 1 ``outer.Nesterov(lr=0.7, momentum=0.9)``.
        dynamic_local_steps: whether slower workers take proportionally fewer local steps, so that all rounds take
            about the same time (DyLU, equation 6 of the paper).
        grace: seconds from the first arrival during which finished workers wait to be dispatched together. 0 is no
            waiting. ``"auto"`` waits for workers that are about to finish, at most 15 % of the round's time.
        quorum: number of different workers whose pushes are merged as one step on their average. 1 merges each push
            when it arrives, ``"all"`` is synchronous DiLoCo.
        sync_warmup_steps: steps per worker, as in ``max_steps``, in which the gradients of all workers are averaged, as
            with ``"ddp"``. ``"auto"``: the learning rate's warm-up, at least a tenth of a short run.
        staleness: what happens to pushes from old models: a stage of :mod:`lightning_async_localsgd.staleness`.
            ``None`` merges them like others.
        merge: weights of pushes, their average, and limits. ``None`` is ``MergeOptions()``.
        exchange: transport, encryption, timeouts and token of the exchange between ranks. ``None`` is
            ``ExchangeOptions()``.
        max_restarts: how often the launcher restarts a worker that has died in training. The worker then rejoins.
        fail_on_lost_workers: whether the job ends with an error if a worker was lost, even though the remaining workers
            have used up the budget.
        expected_workers: number of workers with which the run begins, ranks and workers that join together. Rank 0
            waits for them. ``None`` begins with the ranks.
        min_workers: fewest live workers with which training goes on. With fewer it is paused: no worker begins a new
            round, and nothing is lost. A pause longer than ``exchange.pause_timeout`` ends the run with an error and
            a checkpoint. 1 never pauses training.
        batch_size: batch sizes of workers that differ from the data loader's: by rank, where ``(16, 4)`` accumulates 4
            batches of 16, a function of a device's bytes, or ``"auto"`` (what fits). Progress then counts samples.
        evaluator: whether one more process on the host of rank 0 validates the global model, so that rank 0 goes on
            training meanwhile.
        checkpoint_every: how often rank 0 writes a checkpoint into the run's directory, and each worker its inner
            optimizer states: a number of merged rounds, a ``timedelta``, or ``None`` for never.
        accelerator: see :class:`~lightning.pytorch.strategies.DDPStrategy`, as for the arguments up to
            ``precision_plugin``.
        parallel_devices: devices of this node's ranks.
        cluster_environment: ranks and addresses.
        checkpoint_io: writes and reads checkpoints.
        precision_plugin: precision of training.
        process_group_backend: backend of the process group in ``validate``, ``test`` and ``predict``. ``fit`` has no
            process group.
        timeout: limit for each operation of that process group.
        start_method: how ranks are started: ``"popen"`` runs the script again, ``"spawn"``, ``"fork"`` and
            ``"forkserver"`` use :mod:`multiprocessing`.

    Raises:
        ValueError: An option is outside its range. The text names the option, its value and the way out.
        TypeError: An option is of another type.

    Example::

        import lightning as L
        from lightning_async_localsgd import AsyncLocalSGDStrategy

        strategy = AsyncLocalSGDStrategy(local_steps=50)
        trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=4, max_steps=1000)

    """

    strategy_name = "async_localsgd"

    def __init__(
        self,
        local_steps: int | Literal["auto"] = "auto",
        outer_optimizer: OuterOptimizer | Callable[[Iterable[Any]], Optimizer] | None = None,
        dynamic_local_steps: bool = True,
        grace: Literal["auto"] | float = "auto",
        quorum: int | Literal["all"] = 1,
        sync_warmup_steps: int | Literal["auto"] = 0,
        staleness: Staleness | None = None,
        merge: MergeOptions | None = None,
        exchange: ExchangeOptions | None = None,
        max_restarts: int = 3,
        fail_on_lost_workers: bool = False,
        expected_workers: int | None = None,
        min_workers: int = 1,
        batch_size: BatchSizes | None = None,
        evaluator: bool = False,
        checkpoint_every: int | timedelta | None = timedelta(minutes=10),
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
            local_steps,
            outer_optimizer,
            dynamic_local_steps,
            grace,
            quorum,
            sync_warmup_steps,
            staleness,
            merge,
            exchange,
            checkpoint_every,
            min_workers,
            batch_size,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        check_processes(start_method, max_restarts, expected_workers, evaluator)
        self.max_restarts = max_restarts
        self.fail_on_lost_workers = check_bool("fail_on_lost_workers", fail_on_lost_workers)
        self.expected_workers = expected_workers
        self.evaluator = evaluator
        self._rendezvous: Rendezvous | None = None
        self._grant: JoinGrant | None = None
        self._group = StageGroup(process_group_backend)
        self._environment = ExitStack()
        self._ranks: int | None = None

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        register_names(strategy_registry, cls)

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        check_plugins(self, self.strategy_name, self._start_method)
        joins_late = self._joins_late
        check_hosts = adopt_ranks(self, self._start_method, self.exchange.start_timeout)
        if not joins_late:  # A late joiner is not one of the workers that the run was started with.
            # No process but those of the run knows the address of a Unix socket.
            others_may_join = self._token() is not None and self.exchange.transport != "ipc"
            check_workers(self.expected_workers, self.min_workers, self.world_size, others_may_join)
            self.merge_policy.check_workers(self._initial_workers, others_may_join, self.outer_optimizer, self.grace)
            if self.batches is not None:
                self.batches.check_workers(self._initial_workers, others_may_join)
        if self._start_method == "popen" or joins_late:
            self._launcher = AsyncScriptLauncher(
                self.cluster_environment, self.num_processes, self.num_nodes, self.max_restarts, check_hosts
            )
        else:
            self._launcher = AsyncProcessLauncher(self, self._start_method, self.max_restarts)

    # ------------------------------------------------------------------- joining

    @property
    def _invitation(self) -> Invitation | None:
        """The invitation to a running training in this process's environment, if any."""
        return invitation(self.exchange.token, self.exchange.encrypt)

    @property
    def _joins_late(self) -> bool:
        """Whether this process joins as a worker that the run was not started with."""
        return (invited := self._invitation) is not None and invited.late_joiner

    @override
    def _token(self) -> str | None:
        return token_of(self.exchange.token)

    @override
    def takes_part(self, fitting: bool) -> bool:
        return (grant := self._enter()) is None or takes_part(grant, fitting)

    def _enter(self) -> JoinGrant | None:
        """Join the training that the environment names, if any."""
        invited = self._invitation
        return None if invited is None else enter(invited, self.exchange.start_timeout, self.expected_workers)

    @override
    def set_world_ranks(self) -> None:
        if self._joins_late:
            assert self.cluster_environment is not None
            self.cluster_environment = JoiningEnvironment.of(self.cluster_environment, self._grant)
        super().set_world_ranks()

    @property
    @override
    def world_size(self) -> int:
        # In fit, data libraries are shown all workers, in a variable from which torchrun's environment reads the ranks.
        return super().world_size if self._ranks is None else self._ranks

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        # A late joiner has no share of its own in data that is split in advance.
        replicas = self.world_size if self._fit is None else self._initial_workers
        return {"num_replicas": replicas, "rank": self.global_rank % replicas}

    # ------------------------------------------------------- before and after a stage

    @property
    @override
    def _initial_workers(self) -> int:
        return self.expected_workers or self.world_size

    @override
    def _open_stage(self, fitting: bool) -> FitState | None:
        run, fit_number = begin_call(fitting)
        self._grant = None
        if (grant := self._enter()) is not None:
            self._grant = grant if fitting and grant.info.fit_number == fit_number else None
        self.set_world_ranks()
        trainer = self._trainer
        self._show_ranks(trainer, fitting)
        self._rendezvous = meet_ranks(
            self, self._grant, run, self.exchange.start_timeout, self.expected_workers, self.batches
        )
        if self._grant is not None:
            trainer.num_sanity_val_steps = 0  # The sanity check comes before training.
        if not fitting:
            self._open_group()
            return None
        if self.world_size > 1:
            check_no_process_group()
        shared = int(os.environ.get("PL_GLOBAL_SEED", 0)), self.run_name
        if self._rendezvous is not None:
            shared = self._rendezvous.broadcast(shared)
        if self._grant is not None:
            shared = self._grant.info.seed, self._grant.info.run_name
        seed, self.run_name = shared
        return FitState(fit_number, seed, self._grant, workers=self._initial_workers)

    def _show_ranks(self, trainer: pl.Trainer, fitting: bool) -> None:
        """Let data libraries know this rank, until the stage is closed."""
        self._environment.close()
        self._ranks = super().world_size
        ranks = self._initial_workers if fitting else self.world_size
        self._environment.enter_context(shown_ranks(self, trainer, ranks, fitting and self.world_size > 1))

    def _open_group(self) -> None:
        """Open the process group of ``validate``, ``test`` and ``predict``, as DDP does."""
        self._process_group_backend = self._group.chosen
        usual, precision = self._get_process_group_backend(), str(self.precision_plugin.precision)
        self._process_group_backend = self._group.open(
            self._rendezvous, self.root_device, usual, precision, self._timeout
        )

    @override
    def _make_training_data(self, fit: FitState) -> TrainingData:
        single = self.world_size == 1 and self._token() is None and not self.evaluator
        leased, by_samples = fit.uses_distributed_sampler, self.batches is not None
        data = TrainingData(
            self._trainer, self._initial_workers, fit.seed, leased, self._rendezvous, single, by_samples
        )
        self._environment.callback(data.close)
        return data

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        if self._fit is not None and self.evaluator and not self.joins:
            check_can_evaluate(trainer)
        if self._fit is None and self._rendezvous is not None:
            assert self.model is not None
            self._environment.callback(share_model(self._group, self.model))

    @override
    def _settle_batches(self, batches: WorkerBatches, fit: FitState) -> None:
        settle_batches(batches, self._trainer, fit, self.root_device, self._rendezvous)

    @override
    def _close_stage(self) -> None:
        self._environment.close()
        self._ranks = None
        self._group.close()
        if self._rendezvous is not None:
            self._rendezvous.close_group()
            if not (self._failed and self.is_global_zero):
                self._rendezvous.finish()
            self._rendezvous = None
        if self._failed and isinstance(self.launcher, AsyncScriptLauncher):
            # In training, the ranks of a node continue without the rank that has launched them. Elsewhere all are
            # needed.
            trainer = trainer_of(self.lightning_module)
            if self.is_global_zero or trainer is None or trainer.state.fn != TrainerFn.FITTING:
                self.launcher.end_processes()

    # -------------------------------------------------- asynchronous training

    @override
    def _start_training(
        self, settings: RuntimeSettings, restored: dict[str, Any] | None, budget: RunBudget
    ) -> FitController:
        fit = self._fit
        assert self.lightning_module is not None
        assert fit is not None
        assert fit.limits is not None
        if self.evaluator and self.is_global_zero:
            evaluator = EvaluatorProcess(*script_command())
            self._environment.callback(evaluator.end)
            settings = replace(settings, evaluator=evaluator)
        traits = WorkerTraits.of_this_process(self.root_device, str(self.precision_plugin.precision))
        check_wait = WaitCheck(self._trainer, needs_ranks=fit.grant is None)
        settings = replace(settings, check_wait=check_wait, traits=traits)
        module, place = self.lightning_module, (self.global_rank, self._initial_workers, self.world_size)
        runtime = LiveRuntime(settings, module, self._rendezvous, *place, restored, fit.grant)
        check_wait.begin_training()
        if runtime.join_address is not None:
            rank_zero_info(f"Workers may join this run at {runtime.join_address} with its token.")
        data_state = restored.get("training_data") if restored is not None and runtime.single_process else None
        try:
            controller = FitController(
                self._trainer, runtime, fit.data, fit.limits, budget, data_state, fit.grant, self.checkpoint_every
            )
        except BaseException:
            runtime.close()
            raise
        if isinstance(self.launcher, _LAUNCHERS):
            self.launcher.mark_started(runtime.ticket, runtime.may_restart)
        if self._rendezvous is not None:
            self._rendezvous.ignore_ended_processes()
        return controller

    @override
    def on_train_start(self) -> None:
        grant, limits = self._grant, None if self._fit is None else self._fit.limits
        if grant is not None and limits is not None and grant.evaluates:
            evaluate(self._trainer, grant, limits, self.exchange, self.merge_policy, self._exchanges_frozen)
        else:
            super().on_train_start()

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        if self.fail_on_lost_workers and self._fit is not None:
            raise_if_lost(self._fit.lost_workers)

    @override
    def _end_restarts(self) -> None:
        if isinstance(self.launcher, _LAUNCHERS):
            self.launcher.mark_ended()

    @override
    def _agree_after_training(self, controller: FitController) -> None:
        assert self._fit is not None
        agree_after_training(self._rendezvous, controller, self._fit, self.world_size, self._initial_workers)

    @override
    def on_exception(self, exception: BaseException) -> None:
        follows = print_in_one_line(exception, self.global_rank, None if self._grant is None else self._grant.name)
        if self._rendezvous is not None and self.is_global_zero and isinstance(exception, Exception) and not follows:
            # Before the other ranks say that they end, too. Python prints the traceback when they have ended.
            _log.error("rank 0 ended with %s: %s", type(exception).__name__, exception)
        if self._grant is not None and self._grant.evaluates:
            report_failure(f"{type(exception).__name__}: {exception}")
        super().on_exception(exception)

    @override
    def _share_after_training(self) -> None:
        if self._rendezvous is not None:
            states = self._rendezvous.broadcast(callback_states(self._trainer))
            if not self.is_global_zero:
                load_callback_states(self._trainer, states)

    # -------------------------------------------------------------- collectives

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        gather = super().all_gather
        return self._group.run(lambda each: gather(each, group, sync_grads), tensor)  # type: ignore[no-any-return]

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        reduce = super().reduce
        return self._group.run(lambda each: reduce(each, group, reduce_op), tensor)

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if self._runs_apart:
            return
        if torch.distributed.is_initialized():
            super().barrier(*args, **kwargs)
        elif self._rendezvous is not None:
            self._rendezvous.barrier(str(args[0]) if args else kwargs.get("name"))

    @override
    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        if self._runs_apart:
            return obj
        if torch.distributed.is_initialized():
            return super().broadcast(obj, src)
        if self._rendezvous is not None:
            return self._rendezvous.broadcast(obj, src)  # type: ignore[no-any-return]
        return obj

    # -------------------------------------------------------------- checkpoints

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        if isinstance(self.launcher, AsyncProcessLauncher) and self.launcher.has_untrained_model:
            # Callbacks that save after an exception also do so in the process that has launched the ranks.
            rank_zero_warn(f"Not saved to {filepath}: the ranks have failed, and this process has no trained model.")
            return
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        server = checkpoint.get(CHECKPOINT_KEY)
        if self.is_global_zero or server is None or server.get("beginning", {}).get("on"):
            super().load_optimizer_state_dict(checkpoint)
        else:
            # The checkpoint has rank 0's state, which all share in the beginning. Later ones are in files of the run.
            file = resume_optimizers(self._trainer, checkpoint, server)
            if self._fit is not None:
                self._fit.optimizer_file = file
