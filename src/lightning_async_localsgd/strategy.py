"""The Lightning strategy: what happens when in a ``Trainer``'s run.

Before and after the asynchronous phase of ``fit`` this is an ordinary synchronous strategy. Inside it, from
``on_train_start`` to the moment the budget is met, every rank runs at its own speed: collectives are local, rank 0
alone validates, saves and logs, and the weights it does that with are the global model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, FSDPPrecision, XLAPrecision
from lightning.pytorch.strategies.ddp import DDPStrategy
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.distributed.constants import default_pg_timeout
from typing_extensions import override

from lightning_async_localsgd.callback import AsyncLocalSGDCallback
from lightning_async_localsgd.grace import GraceWindow
from lightning_async_localsgd.launcher import (
    AsyncProcessLauncher,
    AsyncScriptLauncher,
    ended_ranks,
    raise_if_process_ended,
)
from lightning_async_localsgd.layout import Layout
from lightning_async_localsgd.limits import LiftedLimits, run_budget
from lightning_async_localsgd.options import ExchangeOptions
from lightning_async_localsgd.outer import OuterOptimizer, resolve_outer_optimizer
from lightning_async_localsgd.pacing import SpeedAwareSteps
from lightning_async_localsgd.phase import AsyncPhase, PhaseSettings, share_integers
from lightning_async_localsgd.registration import register_names
from lightning_async_localsgd.rendezvous import Rendezvous
from lightning_async_localsgd.schedules import ProgressSchedulers
from lightning_async_localsgd.trainer_parts import (
    RestingCallbacks,
    batch_size,
    callbacks_of,
    load_states_of_callbacks,
    make_finite,
    states_of_callbacks,
    torch_optimizer,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    import lightning.pytorch as pl
    from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
    from lightning.fabric.utilities.types import _PATH
    from lightning.pytorch.accelerators import Accelerator
    from lightning.pytorch.plugins.precision import Precision
    from lightning.pytorch.strategies.strategy import TBroadcast
    from torch.optim import Optimizer

CHECKPOINT_KEY = "async_localsgd"
"""Where a checkpoint holds the server's state."""


class AsyncLocalSGDStrategy(DDPStrategy):
    """Trains one model on ranks of unequal speed, none of which waits for another.

    Every rank takes local optimizer steps at its own pace, and merges what it has learned in a round into a global
    model on rank 0 the moment the round is done (Liu et al., *Asynchronous Local-SGD Training for Language Modeling*,
    arXiv 2401.09135). ``max_steps=S`` on k ranks means S*k local steps of all ranks together, the samples that
    ``"ddp"`` would have used. What is validated, saved, logged and left in the module at the end is the global model.

    Args:
        local_steps: local optimizer steps in a round of the fastest worker (the paper's H).
        outer_optimizer: how a round's pseudo-gradient changes the global model: a rule from
            :mod:`lightning_async_localsgd.outer`, or a callable that makes a torch optimizer from parameters, which is
            then stepped once per push. ``None`` is ``DelayedNesterov(lr=0.7, momentum=0.9)``.
        dynamic_local_steps: whether slower workers take proportionally fewer local steps, so that all rounds take
            about the same time (DyLU, equation 6).
        grace: for how long, from the first arrival on, finished workers wait to be dispatched together: seconds, 0 for
            not at all, or ``"auto"``: as long as it takes those who are about to finish, at most 15 % of a round.
        exchange: transport, port and encryption of the exchange between ranks. ``None`` is ``ExchangeOptions()``.
        start_timeout: seconds that rank 0 waits for the other ranks at the start, and they for rank 0.
        silence_timeout: seconds without a sign of life after which a worker, or the server, counts as gone.
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
        exchange: ExchangeOptions | None = None,
        start_timeout: float = 1800.0,
        silence_timeout: float = 60.0,
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
        for name, seconds in (("start_timeout", start_timeout), ("silence_timeout", silence_timeout)):
            if not 0 < seconds < math.inf:
                raise ValueError(f"{name}={seconds!r} must be a positive number of seconds")
        if exchange is not None and not isinstance(exchange, ExchangeOptions):
            raise TypeError(f"exchange={exchange!r} must be an ExchangeOptions, or None for its defaults")
        self.local_steps = local_steps
        self.outer_optimizer = resolve_outer_optimizer(outer_optimizer)
        self.dynamic_local_steps = dynamic_local_steps
        self.grace = GraceWindow(grace)
        self.exchange = exchange if exchange is not None else ExchangeOptions()
        self.start_timeout = float(start_timeout)
        self.silence_timeout = float(silence_timeout)
        self._rendezvous: Rendezvous | None = None
        self._phase: AsyncPhase | None = None
        self._limits: LiftedLimits | None = None
        self._schedulers: ProgressSchedulers | None = None
        self._resting: RestingCallbacks | None = None
        self._step_hook: Any = None
        self._restored: dict[str, Any] | None = None
        self._last_state: dict[str, Any] | None = None
        self._done: int | None = None
        self._failed = False
        self._saved_version = 0

    # ------------------------------------------------------------ registration

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        register_names(strategy_registry, cls)

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        # The trainer has just given this strategy everything that was chosen: the earliest moment to refuse.
        self._refuse_plugins()
        if self._start_method == "popen":
            self._launcher = AsyncScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = AsyncProcessLauncher(self, start_method=self._start_method)

    # ------------------------------------------------------------------- set-up

    @property
    def phase(self) -> AsyncPhase | None:
        """The asynchronous phase while it lasts."""
        return self._phase

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    @override
    def setup_environment(self) -> None:
        Strategy.setup_environment(self)  # Not DDPStrategy's, which would open a process group.
        self.set_world_ranks()
        self._failed = False
        self._restored = None
        trainer = self._trainer
        if self.world_size > 1:
            reset_seed()  # So that all ranks build the same model and agree on permutations.
            environment = self.cluster_environment
            assert environment is not None
            self._rendezvous = Rendezvous(
                environment.main_address,
                environment.main_port,
                self.global_rank,
                self.world_size,
                self.start_timeout,
                raise_if_process_ended,
                ended_ranks,
            )
        else:
            # Nothing to distribute: samples come in the order of the user's own sampler, as on a single device.
            trainer._accelerator_connector.use_distributed_sampler = False
        if trainer.state.fn == TrainerFn.FITTING:
            self._last_state = None
            callbacks = callbacks_of(trainer)
            if not any(isinstance(callback, AsyncLocalSGDCallback) for callback in callbacks):
                # Before the callbacks that save checkpoints: these see what is there at the end of training.
                at = sum(not isinstance(callback, Checkpoint) for callback in callbacks)
                callbacks.insert(at, AsyncLocalSGDCallback())
        elif self._rendezvous is not None:
            self._rendezvous.barrier("process group")
            self._process_group_backend = self._get_process_group_backend()
            device = self.root_device
            self._rendezvous.open_group(
                self._process_group_backend, self._timeout, device_id=None if device.type == "cpu" else device
            )

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self._refuse_unsupported(trainer)
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

    def _refuse_plugins(self) -> None:
        """What the trainer was given besides and cannot work here."""
        if self._layer_sync is not None and self.num_nodes * self.num_processes > 1:
            raise ValueError(
                "sync_batchnorm=True needs all ranks in every forward pass, but with async_localsgd ranks run at their "
                "own speed; use sync_batchnorm=False: running statistics are merged with the model"
            )
        if isinstance(self.precision_plugin, (FSDPPrecision, DeepSpeedPrecision, XLAPrecision)):
            plugin = type(self.precision_plugin).__name__
            raise ValueError(
                f"plugins={plugin} belongs to another strategy; with async_localsgd every rank holds the whole model: "
                "leave the plugin out and choose Trainer(precision=...)"
            )
        # Whether the outer optimizer's options fit the number of workers: tried on a model of one parameter.
        rule = resolve_outer_optimizer(self.outer_optimizer)
        rule.setup(torch.zeros(1), {"": torch.zeros(1)}, max(1, self.num_nodes * self.num_processes))

    def _refuse_unsupported(self, trainer: pl.Trainer) -> None:
        """What cannot work is refused before anything has been trained."""
        assert self.lightning_module is not None
        Layout.of(self.lightning_module)
        run_budget(trainer, self.world_size)

    # ------------------------------------------------- the asynchronous phase

    @override
    def on_train_start(self) -> None:
        trainer = self._trainer
        assert self.lightning_module is not None
        restored, self._restored = self._restored, None
        if restored is None and self._done is None and trainer.global_step > 0:
            rank_zero_info(
                f"The checkpoint holds no state of an {self.strategy_name} run: the global model starts from its "
                "weights, the outer optimizer from scratch."
            )
        if self.world_size > 1 and any(config.reduce_on_plateau for config in self.lr_scheduler_configs):
            raise ValueError(
                "ReduceLROnPlateau follows a metric that rank 0 alone computes, and the other ranks run at their own "
                "speed; with async_localsgd use a schedule over steps or epochs"
            )
        settings = PhaseSettings(
            local_steps=self.local_steps,
            rule=resolve_outer_optimizer(self.outer_optimizer),
            dynamic_local_steps=self.dynamic_local_steps,
            grace=self.grace,
            exchange=self.exchange,
            start_timeout=self.start_timeout,
            silence_timeout=self.silence_timeout,
            total=run_budget(trainer, self.world_size),
            done=trainer.global_step * self.world_size if self._done is None else self._done,
        )
        self._phase = AsyncPhase(
            settings,
            self.lightning_module,
            self._rendezvous,
            self.global_rank,
            self.world_size,
            restored=restored,
            watch=raise_if_process_ended,
        )
        launcher = self.launcher
        if self.is_global_zero and isinstance(launcher, (AsyncScriptLauncher, AsyncProcessLauncher)):
            launcher.mark_started()
        if self._rendezvous is not None:
            self._rendezvous.tolerate_deaths()
        self._schedulers = ProgressSchedulers(trainer, self._phase.progress)
        assert self._limits is not None
        if self._phase.stopped:  # So few steps that none were left for this rank.
            self._limits.stop()
        self._step_hook = torch_optimizer(self.optimizers[0]).register_step_post_hook(self._on_optimizer_stepped)
        for callback in callbacks_of(trainer):
            if isinstance(callback, AsyncLocalSGDCallback):
                callback.on_async_phase_start(trainer, self._phase)
        if not self.is_global_zero:
            # Ranks above 0 neither validate nor save.
            trainer.limit_val_batches = 0
            self._resting = RestingCallbacks(trainer)

    def _on_optimizer_stepped(self, *_: Any) -> None:
        if self._phase is not None:
            self._phase.worker.count_step()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._phase is not None:
            self._phase.see_batch(batch_size(batch))

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
        phase = self._phase
        if phase is None or phase.stopped:
            return
        phase.end_step()
        if phase.worker.diverged:
            # The model that came back is sound, the optimizer's averages are not: what is not finite in them starts
            # from zero again, everything else stays.
            for optimizer in self.optimizers:
                make_finite(torch_optimizer(optimizer))
        self._follow(phase)

    def _follow(self, phase: AsyncPhase) -> None:
        """Schedulers follow the progress, and the trainer stops when the run has ended."""
        assert self._schedulers is not None
        assert self._limits is not None
        self._schedulers.advance(phase.progress)
        if phase.stopped:
            self._limits.stop()

    def finish_training(self) -> None:
        """Ends training for everybody if it has not ended yet; afterwards the module holds the final global model.

        Called where this rank's loop comes to its end by itself (``trainer.should_stop``).
        """
        phase = self._phase
        if phase is not None and not phase.stopped:
            phase.finish()
            self._follow(phase)

    @override
    def on_validation_start(self) -> None:
        if self._phase is not None:
            self._phase.show_global_model()

    @override
    def on_validation_end(self) -> None:
        if self._phase is not None:
            self._phase.hide_global_model()
            trainer = self._trainer
            if trainer.should_stop and trainer.fit_loop._can_stop_early and not self._phase.stopped:
                self._phase.request_stop()

    @override
    def on_train_end(self) -> None:
        self.finish_training()
        phase, self._phase = self._phase, None
        if phase is None:
            return
        trainer = self._trainer
        assert self.lightning_module is not None
        if self._rendezvous is not None:
            if self.is_global_zero:
                self._rendezvous.survivors = phase.survivors
            self._rendezvous.barrier("end of training")
            if self.is_global_zero:
                left = phase.survivors()
                self._rendezvous.survivors = lambda: left - ended_ranks()
            share_integers(self.lightning_module, self._rendezvous)
        if self.is_global_zero:
            self._last_state = self._without_theta(phase.state_dict())
            self._done = self._last_state["budget"]["done"]
        self._leave_phase()
        if self._rendezvous is not None:
            states = self._rendezvous.broadcast(states_of_callbacks(trainer))
            if not self.is_global_zero:
                load_states_of_callbacks(trainer, states)
        phase.close()

    def _leave_phase(self) -> None:
        """Gives Lightning back what was taken from it."""
        if self._step_hook is not None:
            self._step_hook.remove()
            self._step_hook = None
        if self._schedulers is not None:
            self._schedulers.release()
            self._schedulers = None
        if self._limits is not None:
            self._limits.restore()
            self._limits = None
        if self._resting is not None:
            self._resting.wake()
            self._resting = None

    # -------------------------------------------------------------- collectives

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if self._phase is not None:
            return
        if torch.distributed.is_initialized():
            super().barrier(*args, **kwargs)
        elif self._rendezvous is not None:
            self._rendezvous.barrier(str(args[0]) if args else kwargs.get("name"))

    @override
    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        if self._phase is not None:
            return obj
        if torch.distributed.is_initialized():
            return super().broadcast(obj, src)
        if self._rendezvous is not None:
            return self._rendezvous.broadcast(obj, src)  # type: ignore[no-any-return]
        return obj

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        # Without a group the inherited one would sum over one rank and compare with the world size.
        if torch.distributed.is_initialized():
            return super().reduce_boolean_decision(decision, all)
        return decision

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        module = self.lightning_module
        if module is not None and module._trainer is not None:
            state = module.trainer.state
            if state.fn == TrainerFn.FITTING and state.stage in (RunningStage.SANITY_CHECKING, RunningStage.VALIDATING):
                # Rank 0 validates alone, so it validates on everything.
                return {"num_replicas": 1, "rank": 0}
        return super().distributed_sampler_kwargs

    # -------------------------------------------------------------- checkpoints

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = super().lightning_module_state_dict()
        if self._phase is None or not self.is_global_zero:
            return state
        tensors, self._saved_version = self._phase.global_tensors()
        return self._phase.in_place_of(state, tensors)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        if self.is_global_zero and "optimizer_states" in checkpoint:
            state = self._last_state
            if self._phase is not None:
                state = self._phase.state_dict()
                if state["model"]["version"] == self._saved_version:
                    state = self._without_theta(state)
            if state is not None:
                checkpoint[CHECKPOINT_KEY] = state
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _without_theta(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state without the model, where the checkpoint's own weights are the same to the last bit."""
        module = self.lightning_module
        assert module is not None
        if any(p.dtype != torch.float32 for p in [*module.parameters(), *module.buffers()] if p.is_floating_point()):
            return state
        return {**state, "model": {key: value for key, value in state["model"].items() if key != "theta"}}

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        if self._trainer.state.fn == TrainerFn.FITTING and self.is_global_zero:
            self._restored = checkpoint.get(CHECKPOINT_KEY)
        return checkpoint

    # -------------------------------------------------------------------- the end

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._failed = True
        self._abandon(f"rank {self.global_rank} ended with {type(exception).__name__}: {exception}")

    def _abandon(self, reason: str) -> None:
        phase, self._phase = self._phase, None
        if phase is not None:
            with suppress(Exception):  # Whatever went wrong first is what the user must see.
                phase.close(reason)
        self._leave_phase()

    @override
    def teardown(self) -> None:
        self._abandon("the trainer was torn down")
        if self._rendezvous is not None:
            self._rendezvous.close_group()
            if not (self._failed and self.is_global_zero):
                self._rendezvous.conclude()
            self._rendezvous = None
        if self._failed and self.is_global_zero and isinstance(self.launcher, AsyncScriptLauncher):
            self.launcher.end_processes()
        super().teardown()
