"""The Lightning strategy that simulates a cluster of workers in one process, in virtual time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_async_localsgd.launch.joining import begin_call
from lightning_async_localsgd.lightning.checkpoints.run_folder import prepare_fit
from lightning_async_localsgd.lightning.fit_state import FitState
from lightning_async_localsgd.lightning.loop.controller import FitController
from lightning_async_localsgd.lightning.option_checks import check_minimum, check_plugins, check_simulated_callbacks
from lightning_async_localsgd.lightning.own_batches import check_virtual_batches, settle_virtual_batches
from lightning_async_localsgd.lightning.registration import register_simulated
from lightning_async_localsgd.lightning.simulated.controller import SimulatedFitController
from lightning_async_localsgd.lightning.simulated.data import SimulatedData, as_combined_loader
from lightning_async_localsgd.lightning.strategy_base import _StrategyBase
from lightning_async_localsgd.lightning.trainer_access.data import has_training_data, set_training_data
from lightning_async_localsgd.lightning.trainer_access.strategy import Launcher
from lightning_async_localsgd.outer import OuterOptimizer
from lightning_async_localsgd.policies.worker_batches import BatchSize
from lightning_async_localsgd.protocol.options import ExchangeOptions
from lightning_async_localsgd.server.merge_policy import MergeOptions
from lightning_async_localsgd.simulation.devices import Arrival, Cluster, Death, Link, Slowdown, StepSeconds
from lightning_async_localsgd.simulation.replay import Recording
from lightning_async_localsgd.simulation.runtime import SimulatedRuntime
from lightning_async_localsgd.staleness import Staleness

# Command lines read the constructor's annotations from this module, so their names are imported at run time.
if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.policies.plan import RunBudget
    from lightning_async_localsgd.policies.worker_batches import WorkerBatches
    from lightning_async_localsgd.runtime.settings import RuntimeSettings


PAPERS_DEVICES = (0.58, 0.75, 1.51, 3.33)
"""Seconds of a local step on the devices of arXiv 2401.09135, section 3."""


class _SimulationLauncher(Launcher):
    """Launches no processes: all workers are simulated in this one."""

    @property
    @override
    def is_interactive_compatible(self) -> bool:
        return True

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        # Like the other launchers, decide on the run directory and the checkpoint before anything else.
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            args = prepare_fit(trainer, args)
        return function(*args, **kwargs)

    @override
    def kill(self, signum: int) -> None:
        return


class SimulatedAsyncLocalSGDStrategy(_StrategyBase):
    """Simulate :class:`.AsyncLocalSGDStrategy` on a cluster of your choice, in one process on one device.

    All local steps of all workers are computed, one after the other, and the code of the live server makes all
    decisions. Only time is virtual. Loss curves, staleness and waiting times are those of the cluster, and
    ``async/virtual_seconds`` is the time that the cluster would have taken. The same seed gives the same result, to
    the last bit. A run that is resumed from a checkpoint continues like a live run: its workers begin new rounds.

    Args:
        seconds_per_step: seconds of a local step on each worker's machine, as numbers or :class:`.StepSeconds`. The
            number of entries is the number of workers. The default is the four unequal devices of the paper.
        exchange_seconds: link of each worker to the server, or one for all workers: a :class:`.Link`, or the seconds
            that a message needs in one direction.
        schedule: what happens to machines: :class:`.Slowdown`, :class:`.Death` and :class:`.Arrival` objects.
        worker_data: function that takes a worker's number and returns the training loader of that worker, for unequal
            shards. The loader is iterated again whenever it ends. The function is called once for each worker, before
            training, also for workers that arrive later. If the trainer has training data as well, that data only
            defines the length of an epoch. ``None`` leases the trainer's data to all workers, as in a live run.
        inner_states_on_cpu: whether the inner optimizer states of workers that are not being computed are kept in the
            host's memory. Otherwise, the device holds the states of all workers.
        seed: seed of the jitter of step times, an integer >= 0.
        replay: file of events that :class:`.AsyncLocalSGDCallback` has written in a live or simulated run. That run is
            then replayed: its times and decisions are taken from the file, and only the steps of its workers are
            computed again. ``replay`` cannot be combined with ``seconds_per_step``, ``exchange_seconds`` or
            ``schedule``.
        local_steps: as in :class:`.AsyncLocalSGDStrategy`, like all following options.
        outer_optimizer: how a pseudo-gradient changes the global model.
        dynamic_local_steps: whether slower workers take fewer local steps.
        grace: length of the grace window, in virtual seconds.
        quorum: number of workers whose pushes are merged as one step.
        sync_warmup_steps: steps per worker of the synchronous beginning, or ``"auto"``.
        staleness: what happens to pushes from old models.
        merge: weights, average and limits; ``quorum_seconds`` is in virtual seconds.
        overlap: whether workers go on training while their pushes are in flight, see
            :attr:`.ExchangeOptions.overlap`.
        upload: how the parameters of pushes travel, see :attr:`.ExchangeOptions.upload`.
        download: how the parameters of models travel, see :attr:`.ExchangeOptions.download`.
        min_workers: fewest live workers with which training goes on.
        batch_size: batch sizes of workers that differ from the data loader's, by worker, such as
            ``{0: 64, 1: (16, 4)}``. ``seconds_per_step`` is then the time of a worker's own steps.
        pause_timeout: virtual seconds after which a pause for lack of workers ends the run with an error.
        checkpoint_every: interval of the run's own checkpoints; a ``timedelta`` is real time.
        accelerator: see :class:`~lightning.pytorch.strategies.SingleDeviceStrategy`.
        checkpoint_io: writes and reads checkpoints.
        precision_plugin: precision of training.

    Raises:
        ValueError: An option is outside its range. The text names the option, its value and the way out.
        TypeError: An option is of another type.

    Example::

        import lightning as L
        from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy

        strategy = SimulatedAsyncLocalSGDStrategy([0.58, 0.75, 1.51, 3.33])
        trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=1, max_steps=1000)

    """

    strategy_name = "async_localsgd_simulated"

    def __init__(
        self,
        seconds_per_step: Sequence[float | StepSeconds] = PAPERS_DEVICES,
        exchange_seconds: float | Link | Sequence[float | Link] = 0.0,
        schedule: Sequence[Slowdown | Death | Arrival] = (),
        worker_data: Callable[[int], Any] | None = None,
        inner_states_on_cpu: bool = False,
        seed: int = 0,
        replay: str | PathLike[str] | None = None,
        local_steps: int | Literal["auto"] = "auto",
        outer_optimizer: OuterOptimizer | Callable[[Iterable[Any]], Optimizer] | None = None,
        dynamic_local_steps: bool = True,
        grace: Literal["auto"] | float = "auto",
        quorum: int | Literal["all"] = 1,
        sync_warmup_steps: int | Literal["auto"] = 0,
        staleness: Staleness | None = None,
        merge: MergeOptions | None = None,
        overlap: bool = False,
        upload: Literal["fp32", "bf16", "int8", "int4"] = "fp32",
        download: Literal["fp32", "bf16", "int8"] = "fp32",
        min_workers: int = 1,
        batch_size: dict[int, BatchSize] | None = None,
        pause_timeout: float = 1800.0,
        checkpoint_every: int | timedelta | None = timedelta(minutes=10),
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        self.scenario: Cluster | Recording = Cluster(seconds_per_step, exchange_seconds, schedule)
        if replay is not None:
            is_set = {
                "seconds_per_step": tuple(seconds_per_step) != PAPERS_DEVICES,
                "exchange_seconds": exchange_seconds != 0.0,
                "schedule": bool(schedule),
            }
            if any(is_set.values()):
                raise ValueError(
                    f"replay={str(replay)!r} takes all times from its log, so leave out "
                    f"{', '.join(name for name in is_set if is_set[name])}"
                )
            self.scenario = Recording(replay)
        if worker_data is not None and not callable(worker_data):
            raise ValueError(
                f"worker_data={worker_data!r} must be a function that takes a worker's number and returns the loader "
                "of that worker"
            )
        if type(inner_states_on_cpu) is not bool:
            raise ValueError(
                f"inner_states_on_cpu={inner_states_on_cpu!r} must be True (host memory) or False (device memory)"
            )
        if type(seed) is not int or seed < 0:
            raise ValueError(f"seed={seed!r} must be an integer >= 0")
        super().__init__(
            local_steps,
            outer_optimizer,
            dynamic_local_steps,
            grace,
            quorum,
            sync_warmup_steps,
            staleness,
            merge,
            ExchangeOptions(overlap=overlap, upload=upload, download=download, pause_timeout=pause_timeout),
            checkpoint_every,
            min_workers,
            batch_size,
            accelerator=accelerator,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        check_virtual_batches(self.batches, worker_data)
        self.worker_data = worker_data
        self._worker_loaders: dict[int, Any] = {}
        self.inner_states_on_cpu = inner_states_on_cpu
        self.seed = seed
        self._virtual_seconds: float | None = None

    @property
    def virtual_seconds(self) -> float | None:
        """Virtual seconds that the cluster has needed for the current ``fit`` so far, or for the last one."""
        if isinstance(self.runtime, SimulatedRuntime):
            self._virtual_seconds = self.runtime.virtual_seconds
        return self._virtual_seconds

    # ------------------------------------------------------------ registration

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        register_simulated(strategy_registry, cls)

    @override
    def _configure_launcher(self) -> None:
        processes = self.num_nodes * self.num_processes
        if processes > 1:
            raise ValueError(
                f"strategy={self.strategy_name!r} simulates all workers on one device, but the trainer has {processes} "
                "devices; set devices=1 and num_nodes=1: the number of workers is the length of seconds_per_step"
            )
        check_plugins(self, self.strategy_name, "")
        self._launcher = _SimulationLauncher()
        arrivals = isinstance(self.scenario, Cluster) and bool(self.scenario.arrivals)
        check_minimum(self.min_workers, len(self.scenario.worker_numbers), "give the schedule more arrivals")
        self.merge_policy.check_workers(self.scenario.initial_workers, arrivals, self.outer_optimizer, self.grace)
        if self.batches is not None:
            self.batches.check_workers(len(self.scenario.worker_numbers), others_may_join=False)

    @property
    @override
    def _initial_workers(self) -> int:
        return self.scenario.initial_workers

    @override
    def _open_stage(self, fitting: bool) -> FitState | None:
        _, fit_number = begin_call(fitting)
        self.set_world_ranks()
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        return FitState(fit_number, seed, workers=self._initial_workers) if fitting else None

    # ------------------------------------------------------------------- set-up

    @override
    def connect(self, model: pl.LightningModule) -> None:
        super().connect(model)
        trainer = self._trainer
        self._worker_loaders = {}
        if self.worker_data is not None and trainer.state.fn == TrainerFn.FITTING:
            if not has_training_data(trainer):
                # Lightning needs training data to define the length of an epoch.
                set_training_data(trainer, self._loader_of(0))
            else:
                rank_zero_warn(
                    "The workers train on the loaders of worker_data. The trainer's own training data only defines the "
                    "length of an epoch."
                )

    @override
    def on_train_end(self) -> None:
        runtime = self.runtime
        super().on_train_end()
        if runtime is not None:
            self._virtual_seconds = runtime.virtual_seconds

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            check_simulated_callbacks(trainer)
        super().setup(trainer)
        if self.worker_data is not None and trainer.state.fn == TrainerFn.FITTING:
            # Make the loaders of all workers now, so that an error for one worker does not end a running training.
            for worker in self.scenario.worker_numbers:
                self._loader_of(worker)

    def _loader_of(self, worker: int) -> Any:
        """Return a worker's own training data."""
        assert self.worker_data is not None
        if worker not in self._worker_loaders:
            try:
                data = self.worker_data(worker)
            except Exception as error:
                raise ValueError(
                    f"worker_data({worker}) failed with {type(error).__name__}: {error}; the function must return a "
                    f"loader for each worker of the run, including workers that arrive later: "
                    f"{', '.join(map(str, self.scenario.worker_numbers))}"
                ) from error
            if data is None:
                raise ValueError(
                    f"worker_data({worker}) returned None; the function must return the loader of worker {worker}"
                )
            loaders = as_combined_loader(data).flattened
            invalid = next((loader for loader in loaders if not hasattr(loader, "__iter__")), None)
            if invalid is not None:
                raise TypeError(
                    f"worker_data({worker}) returned {invalid!r}, which is not iterable; the function must return the "
                    f"loader of worker {worker}, or a list or dictionary of loaders"
                )
            self._worker_loaders[worker] = data
        return self._worker_loaders[worker]

    @override
    def _make_training_data(self, fit: FitState) -> SimulatedData:
        trainer = self._trainer
        if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined] # set by one of its connectors
            raise ValueError(
                "reload_dataloaders_every_n_epochs does not work with a simulated cluster, because its workers are in "
                "different epochs at the same time; set it to 0"
            )
        loader_of = None if self.worker_data is None else self._loader_of
        leased, by_samples = fit.uses_distributed_sampler, self.batches is not None
        return SimulatedData(trainer, self._initial_workers, fit.seed, leased, loader_of, by_samples)

    @override
    def _settle_batches(self, batches: WorkerBatches, fit: FitState) -> None:
        settle_virtual_batches(batches, self.scenario.worker_numbers, self._trainer, fit)

    @override
    def _start_training(
        self, settings: RuntimeSettings, restored: dict[str, Any] | None, budget: RunBudget
    ) -> FitController:
        fit = self._fit
        assert self.lightning_module is not None
        assert fit is not None
        assert isinstance(fit.data, SimulatedData)
        assert fit.limits is not None
        if restored is not None and isinstance(self.scenario, Recording):
            raise ValueError(
                f"replay={self.scenario.path!r} starts at the beginning of the recorded run, so it cannot be combined "
                "with ckpt_path; leave ckpt_path out"
            )
        runtime = SimulatedRuntime(settings, self.scenario, self.lightning_module, self.seed, restored)
        saved = {} if restored is None else restored
        try:
            return SimulatedFitController(
                self._trainer,
                runtime,
                fit.data,
                fit.limits,
                budget,
                saved.get("training_data"),
                saved.get("simulation", {}).get("workers", {}),
                self.inner_states_on_cpu,
                self.checkpoint_every,
            )
        except BaseException:
            runtime.close()
            raise
