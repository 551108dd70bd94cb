"""The part that the live and the simulated strategy share: what happens when in a Trainer's ``fit``.

Before and after asynchronous training the strategy is an ordinary synchronous one. In between, from ``on_train_start``
until the budget is used up, every worker runs at its own speed. Collectives are local then. Rank 0 alone validates,
saves and logs, and it does so with the weights of the global model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.strategies.ddp import DDPStrategy
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_async_localsgd.lightning.batch_search import search_for
from lightning_async_localsgd.lightning.callback import AsyncLocalSGDCallback
from lightning_async_localsgd.lightning.checkpoints.contents import (
    CHECKPOINT_KEY,
    SavedModel,
    check_format,
    for_plugin,
    without_theta,
)
from lightning_async_localsgd.lightning.checkpoints.interval import check_interval
from lightning_async_localsgd.lightning.checkpoints.periodic import is_periodic, load_periodic
from lightning_async_localsgd.lightning.checkpoints.resuming import counted_step_offset, log_resumed_state
from lightning_async_localsgd.lightning.checkpoints.run_folder import folder_of, runs_of
from lightning_async_localsgd.lightning.checkpoints.worker_files import keep_files, name_folder, remove_worker_files
from lightning_async_localsgd.lightning.loop.announcement import announce
from lightning_async_localsgd.lightning.loop.averaging import averaging_callbacks, cancel_batch_norm_epochs
from lightning_async_localsgd.lightning.loop.beginning import check_beginning
from lightning_async_localsgd.lightning.loop.hooks import LoopHooks
from lightning_async_localsgd.lightning.loop.limits import SuspendedLimits, run_budget
from lightning_async_localsgd.lightning.option_checks import (
    check_callbacks,
    defaults_with_quorum,
    exchanges_frozen,
    warn_if_rounded,
)
from lightning_async_localsgd.lightning.own_batches import check_own_batches, parsed_batches, text_if_too_large
from lightning_async_localsgd.lightning.registration import text_for_other_package
from lightning_async_localsgd.lightning.run_settings import run_settings
from lightning_async_localsgd.lightning.trainer_access.callbacks import callbacks_of, searches_learning_rate
from lightning_async_localsgd.lightning.trainer_access.data import set_distributed_sampler
from lightning_async_localsgd.outer import OuterOptimizer, resolve_outer_optimizer
from lightning_async_localsgd.policies.grace import GraceWindow
from lightning_async_localsgd.policies.pacing import SpeedAwareSteps
from lightning_async_localsgd.policies.plan import Position
from lightning_async_localsgd.policies.worker_minimum import check_min_workers
from lightning_async_localsgd.protocol.checks import check_bool
from lightning_async_localsgd.protocol.layout import Layout
from lightning_async_localsgd.protocol.options import ExchangeOptions, checked_options
from lightning_async_localsgd.server.merge_policy import MergeOptions, MergePolicy
from lightning_async_localsgd.staleness import Staleness

if TYPE_CHECKING:
    from pathlib import Path

    import lightning.pytorch as pl
    from torch import Tensor

    from lightning_async_localsgd.lightning.data.training_data import TrainingData
    from lightning_async_localsgd.lightning.fit_state import FitState
    from lightning_async_localsgd.lightning.loop.controller import FitController
    from lightning_async_localsgd.policies.plan import RunBudget
    from lightning_async_localsgd.policies.worker_batches import WorkerBatches
    from lightning_async_localsgd.runtime.base import Runtime
    from lightning_async_localsgd.runtime.settings import RuntimeSettings
    from lightning_async_localsgd.server.observers import RunObserver


class _StrategyBase(DDPStrategy):
    """Base of the live and the simulated strategy. Their docstrings describe the options.

    Attributes:
        run_name: name of the run's directory.

    """

    strategy_name: str

    def __init__(
        self,
        local_steps: int | Literal["auto"],
        outer_optimizer: OuterOptimizer | Callable[[Iterable[Any]], Optimizer] | None,
        dynamic_local_steps: bool,
        grace: Literal["auto"] | float,
        quorum: int | Literal["all"],
        sync_warmup_steps: int | Literal["auto"],
        staleness: Staleness | None,
        merge: MergeOptions | None,
        exchange: ExchangeOptions | None,
        checkpoint_every: int | timedelta | None,
        min_workers: int,
        batch_size: Any,
        **lightning: Any,
    ) -> None:
        super().__init__(**lightning)
        local_steps, outer_optimizer = defaults_with_quorum(quorum, local_steps, outer_optimizer)
        self.pacing = SpeedAwareSteps(local_steps, check_bool("dynamic_local_steps", dynamic_local_steps))
        self.outer_optimizer = resolve_outer_optimizer(outer_optimizer)
        self.grace = GraceWindow(grace)
        self.merge_policy = MergePolicy(
            quorum, sync_warmup_steps, staleness, MergeOptions() if merge is None else merge
        )
        self.batches = parsed_batches(batch_size)
        self.merge_policy.check_with(self.outer_optimizer, self.grace, self.batches is not None)
        self.min_workers = check_min_workers(min_workers)
        self.exchange = checked_options(exchange)
        check_interval(checkpoint_every)
        self.checkpoint_every = checkpoint_every
        self.run_name = ""
        self._hooks = LoopHooks(self)
        self._fit: FitState | None = None
        # State of the last training with this object, from which a second fit continues.
        self._last_state: dict[str, Any] | None = None
        self._steps_done: int | None = None
        self._failed = False

    @override
    def __repr__(self) -> str:
        return text_for_other_package(type(self).__name__, Strategy)

    # ------------------------------------------------------ used by other modules

    @property
    def runtime(self) -> Runtime | None:
        """This process's part in asynchronous training; None before and after."""
        return None if self.controller is None else self.controller.runtime

    @property
    def controller(self) -> FitController | None:
        """The object that drives the loop in asynchronous training; None before and after."""
        return None if self._fit is None else self._fit.controller

    @property
    def optimizer_file(self) -> Path | None:
        """The file that this worker's inner optimizer states were loaded from."""
        return None if self._fit is None else self._fit.optimizer_file

    @property
    def joins(self) -> bool:
        """Whether this process joins a training that was already running when the process started."""
        return self._fit is not None and self._fit.grant is not None

    def takes_part(self, fitting: bool) -> bool:
        """Return whether this process takes part in the Trainer call that the script has reached."""
        return True

    def add_observer(self, observer: RunObserver) -> None:
        """Tell ``observer`` what happens to the server of this fit. Ranks above 0 have no server.

        Args:
            observer: sees every event if it is added before training begins, at the latest in a callback's
                ``on_train_start``. Later it sees what follows.

        Raises:
            RuntimeError: No ``fit`` is running.

        """
        if self._fit is None:
            raise RuntimeError("add_observer() needs a running fit; call it in a callback's setup or on_train_start")
        self._fit.observers.append(observer)
        if self.runtime is not None and self.runtime.server is not None:
            self.runtime.server.add_observer(observer)

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    # -------------------------------------------------- implemented by subclasses

    @property
    @abstractmethod
    def _initial_workers(self) -> int:
        """Number of workers that the run is started with."""

    @abstractmethod
    def _open_stage(self, fitting: bool) -> FitState | None:
        """Prepare a Trainer call, and make the state of a ``fit``."""

    @abstractmethod
    def _make_training_data(self, fit: FitState) -> TrainingData:
        """Make the training data of a fit."""

    @abstractmethod
    def _start_training(
        self, settings: RuntimeSettings, restored: dict[str, Any] | None, budget: RunBudget
    ) -> FitController:
        """Start asynchronous training."""

    def before_fit(self) -> None:
        """Search for this rank's batch size, if the option says so."""
        if self._fit is not None and self.batches is not None and self.batches.is_auto:
            search_for(self, self._trainer, self._fit)

    def _settle_batches(self, batches: WorkerBatches, fit: FitState) -> None:
        """Give the workers batches of their own sizes."""

    def _token(self) -> str | None:
        """Return the user's secret, with which workers may join while training runs."""
        return None

    def _end_restarts(self) -> None:
        """Restart no process from now on, because training has ended."""

    def _agree_after_training(self, controller: FitController) -> None:
        """Bring all ranks together after training, before the final model is compared."""

    def _share_after_training(self) -> None:
        """Give all ranks the states of rank 0's callbacks, after training."""

    def _close_stage(self) -> None:
        """Free what :meth:`_open_stage` has opened."""

    # ------------------------------------------------------------------- set-up

    @override
    def setup_environment(self) -> None:
        Strategy.setup_environment(self)  # Not DDPStrategy's, which opens a process group.
        self._failed = False
        trainer = self._trainer
        fit = self._fit = self._open_stage(trainer.state.fn == TrainerFn.FITTING)
        if fit is None:
            return
        self._last_state = None
        callbacks = callbacks_of(trainer)
        if not any(isinstance(callback, AsyncLocalSGDCallback) for callback in callbacks):
            callbacks.insert(0, AsyncLocalSGDCallback())
        self._hooks.add_to(trainer)
        # Training data is leased, and rank 0 validates on all data.
        fit.uses_distributed_sampler = set_distributed_sampler(trainer, False)
        fit.data = self._make_training_data(fit)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        fit = self._fit
        if fit is not None:
            # Refuse what cannot work before anything is trained.
            assert self.lightning_module is not None
            check_callbacks(trainer, joins=self.joins)
            check_beginning(trainer, self.merge_policy, self._initial_workers)
            check_own_batches(trainer, self.batches)
            self.merge_policy.check_frozen(self._exchanges_frozen)
            Layout.of(self.lightning_module, self._exchanges_frozen)
            run_budget(trainer, self._initial_workers)
        Strategy.setup(self, trainer)
        if fit is not None and trainer.max_steps != 0 and trainer.fit_loop.max_epochs != 0:
            # Before the loop first asks whether it is done: in a resumed run, this rank's own count may have passed a
            # limit that all ranks together have not reached.
            fit.limits = SuspendedLimits(trainer)

    @override
    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:  # type: ignore[override]
        """Return the model without a wrapper: gradients are not reduced."""
        return model

    @override
    def process_dataloader(self, dataloader: object) -> object:
        dataloader = super().process_dataloader(dataloader)
        fit = self._fit
        if fit is None or fit.searches_learning_rate or self._trainer.state.stage != RunningStage.TRAINING:
            return dataloader
        return fit.data.wrap(dataloader)

    @property
    def _exchanges_frozen(self) -> bool:
        return exchanges_frozen(self._trainer, self.exchange)

    # -------------------------------------------------- asynchronous training

    @override
    def on_train_start(self) -> None:
        trainer, fit = self._trainer, self._fit
        assert self.lightning_module is not None
        assert fit is not None
        if searches_learning_rate(trainer):
            fit.search_learning_rate(trainer)
            return
        restored, fit.restored = fit.restored, None
        if restored is not None or (self._steps_done is None and trainer.global_step > 0):
            log_resumed_state(restored, self._initial_workers, self.strategy_name)
        assert fit.limits is not None
        if cancel_batch_norm_epochs(trainer):
            fit.limits.suspend_epochs()
        if self.batches is not None:
            self._settle_batches(self.batches, fit)
        budget = run_budget(trainer, self._initial_workers, fit.data)
        done = self._steps_done
        if done is None:
            # A checkpoint of another strategy holds the steps that every rank would have taken.
            done = round(trainer.global_step * budget.total_per_rank_step(self._initial_workers))
        # A worker that joins takes the offset from the server, so that all ranks have the same.
        offset = counted_step_offset(trainer, fit.position, budget) if fit.grant is None else fit.grant.info.step_offset
        others = {"exchange_frozen": self._exchanges_frozen, "token": self._token()}
        settings = run_settings(self, trainer, fit, budget, restored, done, offset, **others)
        fit.controller = self._start_training(settings, restored, budget)
        announce(trainer, settings, self._initial_workers, self.strategy_name)
        warn_if_rounded(fit.controller.runtime.binding.layout, self.strategy_name)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.controller is not None:
            self.controller.count_batch(batch)

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        assert self.lightning_module is not None
        if self.lightning_module.automatic_optimization and self.controller is not None:
            self.controller.end_step()
        return output

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().training_step(*args, **kwargs)
        assert self.lightning_module is not None
        if not self.lightning_module.automatic_optimization and self.controller is not None:
            # The module steps its optimizers itself. Weights may change only now: between two of its optimizer steps,
            # an autograd graph may still need the old weights.
            self.controller.end_step()
        return output

    @override
    def on_validation_start(self) -> None:
        if self.controller is not None:
            self.controller.begin_validation()

    @override
    def on_validation_end(self) -> None:
        if self.controller is not None:
            self.controller.runtime.hide_global_model()
            self.controller.end_validation()

    @override
    def on_train_end(self) -> None:
        fit = self._fit
        assert fit is not None
        fit.searches_learning_rate = False
        controller = fit.controller
        if controller is None:
            return
        controller.finish()
        self._end_restarts()
        fit.controller = None  # Collectives are real again.
        trainer, runtime = self._trainer, controller.runtime
        assert self.lightning_module is not None
        self._agree_after_training(controller)
        unchanged = runtime.sync_final_state(averaged=bool(averaging_callbacks(trainer)))
        if self.is_global_zero:
            state = controller.state_dict()
            holds_it = unchanged and runtime.restores_global_model(self.lightning_module.state_dict())
            self._last_state = without_theta(state) if holds_it else state
            self._steps_done = self._last_state["budget"]["done"]
        controller.restore_trainer()
        fit.limits = None
        self._share_after_training()
        runtime.close()

    # -------------------------------------------------------------- collectives

    @property
    def _runs_apart(self) -> bool:
        return self._fit is not None and self._fit.runs_apart

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        if self.controller is not None and self.controller.collective_warnings is not None:
            self.controller.collective_warnings.on_all_gather()
        return super().all_gather(tensor, group, sync_grads)

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        if self.controller is not None and self.controller.collective_warnings is not None:
            self.controller.collective_warnings.on_reduce(tensor)
        return super().reduce(tensor, group, reduce_op)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        # Without a group, the inherited method would sum over one rank and compare the sum with the world size.
        if torch.distributed.is_initialized():
            return super().reduce_boolean_decision(decision, all)
        return decision

    # -------------------------------------------------------------- checkpoints

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = super().lightning_module_state_dict()
        fit, controller = self._fit, self.controller
        if fit is None or controller is None or not self.is_global_zero:
            return state
        controller.flush_round()
        tensors, version = controller.runtime.global_tensors()
        shown, restoring = controller.runtime.with_global_weights(state, tensors)
        fit.saved_model = SavedModel(version, restoring)
        return shown

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        server = self.add_server_state(checkpoint) if self.is_global_zero and "optimizer_states" in checkpoint else None
        if server is not None:
            name_folder(filepath, server, folder_of(self._trainer))
        super().save_checkpoint(for_plugin(checkpoint, self.checkpoint_io), filepath, storage_options)
        if server is not None:
            keep_files(filepath, server)
            if self.controller is not None:
                self.controller.request_saves(filepath, server)

    def add_server_state(self, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
        """Add the server's state to a checkpoint that the trainer has made, on rank 0; return the state, if any."""
        state = self._last_state
        if self._fit is not None and self.controller is not None:
            state = self.controller.state_dict()
            if self._fit.saved_model.is_in(checkpoint, state["model"]["version"]):
                state = without_theta(state)
        if state is not None:
            checkpoint[CHECKPOINT_KEY] = state = {**state, "run_name": self.run_name}
        return state

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            if self.controller is not None:
                self.controller.discard_checkpoint(filepath)
            remove_worker_files(filepath, runs_of(self._trainer))

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        load = load_periodic if is_periodic(checkpoint_path) else super().load_checkpoint
        checkpoint: dict[str, Any] = load(checkpoint_path, *args, **kwargs)
        if self._fit is not None:
            state = checkpoint.get(CHECKPOINT_KEY)
            if state is not None:
                check_format(state, checkpoint_path)
            self._fit.position = Position.in_state(state or {})
            if self.is_global_zero:
                self._fit.restored = state
        if self.joins:
            checkpoint.pop("loops", None)  # The run has moved on since; the server knows where it is now.
        return checkpoint

    # -------------------------------------------------------------------- the end

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._failed = True
        who = "rank 0" if self.is_global_zero else "it"  # Rank 0 tells its workers, and a worker tells rank 0.
        what = f"{type(exception).__name__}: {exception}".removesuffix(": ")
        if self._fit is not None and self.batches is not None:
            what = text_if_too_large(self.batches, self._fit, self._trainer, self.root_device, exception) or what
        self._abandon(f"{who} ended with {what}")

    def _abandon(self, reason: str) -> None:
        """End asynchronous training, if it is running, without its result."""
        self._end_restarts()
        fit = self._fit
        if fit is None:
            return
        fit.searches_learning_rate = False
        controller, fit.controller = fit.controller, None
        if controller is not None:
            with suppress(Exception):  # The user must see the error that came first.
                controller.runtime.close(reason)
            controller.restore_trainer()
        elif fit.limits is not None:
            fit.limits.restore()
        fit.limits = None

    @override
    def teardown(self) -> None:
        self._abandon("the trainer was torn down")
        if self._fit is not None:
            set_distributed_sampler(self._trainer, self._fit.uses_distributed_sampler)
            self._hooks.remove_from(self._trainer)
            self._fit = None
        self._close_stage()
        try:
            super().teardown()
        except NotImplementedError:
            # A model on the meta device cannot be moved to the CPU. It was refused before, and the user must see that.
            if not self._failed:
                raise
