"""The Lightning strategy whose workers are virtual: a whole cluster on one device, in virtual time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_async_localsgd.merging import MergeOptions
from lightning_async_localsgd.outer import OuterOptimizer
from lightning_async_localsgd.refusals import refuse_callbacks_of_one_worker, refuse_plugins
from lightning_async_localsgd.registration import register_simulated
from lightning_async_localsgd.run_folder import prepare_fit
from lightning_async_localsgd.simulation.data import SimulatedData, combined
from lightning_async_localsgd.simulation.devices import Arrival, Cluster, Death, Link, Slowdown, StepSeconds
from lightning_async_localsgd.simulation.phase import SimulatedPhase
from lightning_async_localsgd.simulation.replay import Recording
from lightning_async_localsgd.simulation.training import SimulatedTraining
from lightning_async_localsgd.staleness import Staleness
from lightning_async_localsgd.strategy import AsyncLocalSGDStrategy

# What the constructor's annotations name is imported above, at run time: command lines read it from the module.
if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.plan import RunBudget
    from lightning_async_localsgd.settings import PhaseSettings
    from lightning_async_localsgd.training import AsyncTraining


PAPERS_DEVICES = (0.58, 0.75, 1.51, 3.33)
"""Seconds that a local step takes on the devices of arXiv 2401.09135, section 3."""


class _SimulationLauncher(_Launcher):
    """Launches nothing: all is done in this process."""

    @property
    @override
    def is_interactive_compatible(self) -> bool:
        return True

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Settles where a fit's files go and what it goes on from, and runs ``function``."""
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            args = prepare_fit(trainer, args)
        return function(*args, **kwargs)

    @override
    def kill(self, signum: int) -> None:
        """There is no other process."""


class SimulatedAsyncLocalSGDStrategy(AsyncLocalSGDStrategy):
    """Trains as :class:`.AsyncLocalSGDStrategy` would on a cluster of your choice, in one process on one device.

    Every local step of every worker is computed, one after the other, and every decision is made by the live server's
    own code; only time is virtual. Loss curves, staleness and waiting times are those of the cluster, and
    ``async/virtual_seconds`` says how long it would have taken. The same seed gives the same bits. A run that goes on
    from a checkpoint does so as a live one does: its workers begin new rounds.

    Args:
        seconds_per_step: what a local step takes on each worker's machine; their number is that of the workers. By
            default the four unequal devices of the paper.
        exchange_seconds: each worker's link to the server, or one for all: a :class:`.Link`, or the seconds that a
            message needs each way.
        schedule: what happens to machines: :class:`.Slowdown`, :class:`.Death` and :class:`.Arrival` objects.
        worker_data: gives a worker's number its own training data, for unequal shards: a loader, which is iterated
            again whenever it ends. It is called once for each worker of a fit, before training, with the number of
            each one that arrives later, too. If the trainer has training data all the same, that only says how long an
            epoch is. None leases the trainer's training data to all workers, as a live run does.
        inner_states_on_cpu: whether the inner optimizers' states of workers that are not at turn are kept in the host's
            memory; otherwise the device needs room for one a worker.
        seed: of the jitter of step times, an integer >= 0.
        replay: file of events that :class:`.AsyncLocalSGDCallback` has written in a live or simulated run, to play
            that run again instead: its times and decisions are given, only what its workers computed is computed anew.
            ``seconds_per_step``, ``exchange_seconds`` and ``schedule`` have no part in that.
        local_steps: as in :class:`.AsyncLocalSGDStrategy`.
        outer_optimizer: likewise.
        dynamic_local_steps: likewise.
        grace: likewise, in virtual seconds.
        quorum: likewise.
        warmup_steps: likewise.
        staleness: likewise.
        merge: likewise, ``quorum_seconds`` in virtual seconds.
        max_update_norm: likewise.
        checkpoint_every: likewise; a ``timedelta`` is of real time.
        accelerator: see :class:`~lightning.pytorch.strategies.SingleDeviceStrategy`.
        checkpoint_io: likewise.
        precision_plugin: likewise.

    Raises:
        ValueError: an option is outside its range; the text names it, its value and the way out.
        TypeError: ``outer_optimizer`` is none.

    Example::

        import lightning as L
        from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy

        strategy = SimulatedAsyncLocalSGDStrategy([0.58, 0.75, 1.51, 3.33], local_steps=50)
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
        local_steps: int = 50,
        outer_optimizer: OuterOptimizer | Callable[[Iterable[Any]], Optimizer] | None = None,
        dynamic_local_steps: bool = True,
        grace: Literal["auto"] | float = "auto",
        quorum: int | Literal["all"] = 1,
        warmup_steps: int = 0,
        staleness: Staleness | None = None,
        merge: MergeOptions | None = None,
        max_update_norm: float | Literal["auto"] | None = "auto",
        checkpoint_every: int | timedelta | None = timedelta(minutes=10),
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        self.script: Cluster | Recording = Cluster(seconds_per_step, exchange_seconds, schedule)
        if replay is not None:
            given = {
                "seconds_per_step": tuple(seconds_per_step) != PAPERS_DEVICES,
                "exchange_seconds": exchange_seconds != 0.0,
                "schedule": bool(schedule),
            }
            if any(given.values()):
                raise ValueError(
                    f"replay={str(replay)!r} has the times of its run, and {', '.join(n for n in given if given[n])} "
                    "would be of no use; leave it out"
                )
            self.script = Recording(replay)
        if worker_data is not None and not callable(worker_data):
            raise ValueError(
                f"worker_data={worker_data!r} must be a function that gets a worker's number and returns the loader "
                "of that worker"
            )
        if type(inner_states_on_cpu) is not bool:
            raise ValueError(
                f"inner_states_on_cpu={inner_states_on_cpu!r} must be True, for the host's memory, or False, for the "
                "device's"
            )
        if type(seed) is not int or seed < 0:
            raise ValueError(f"seed={seed!r} must be an integer >= 0")
        super().__init__(
            local_steps=local_steps,
            outer_optimizer=outer_optimizer,
            dynamic_local_steps=dynamic_local_steps,
            grace=grace,
            quorum=quorum,
            warmup_steps=warmup_steps,
            staleness=staleness,
            merge=merge,
            max_update_norm=max_update_norm,
            checkpoint_every=checkpoint_every,
            accelerator=accelerator,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self.worker_data = worker_data
        self._given: dict[int, Any] = {}
        self.inner_states_on_cpu = inner_states_on_cpu
        self.seed = seed
        self._virtual_seconds: float | None = None

    @property
    def virtual_seconds(self) -> float | None:
        """Seconds that the cluster needs for the present ``fit``, so far, or has needed for the last one."""
        if isinstance(self.phase, SimulatedPhase):
            self._virtual_seconds = self.phase.virtual_seconds
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
                f"strategy={self.strategy_name!r} plays all workers in one process on one device, and the trainer was "
                f"given {processes} devices; set devices=1 and num_nodes=1: seconds_per_step says how many workers "
                "there are"
            )
        refuse_plugins(self, "")
        self._launcher = _SimulationLauncher()
        arrivals = isinstance(self.script, Cluster) and bool(self.script.arrivals)
        self._refuse_workers(self.script.initial, joinable=arrivals)

    @property
    @override
    def _invitation(self) -> None:
        return None

    @property
    @override
    def _workers(self) -> int:
        return self.script.initial

    # ------------------------------------------------------------------- set-up

    @override
    def connect(self, model: pl.LightningModule) -> None:
        super().connect(model)
        trainer = self._trainer
        self._given = {}
        if self.worker_data is not None and trainer.state.fn == TrainerFn.FITTING:
            source = trainer.fit_loop._data_source
            if not source.is_defined():
                # How long the epochs of workers are is what the first one's data says.
                source.instance = self._data_of(0)
            else:
                rank_zero_warn(
                    "workers train on what worker_data gives them; of the trainer's own training data the length of an "
                    "epoch alone is used"
                )

    @override
    def on_train_end(self) -> None:
        phase = self.phase
        super().on_train_end()
        if phase is not None:
            self._virtual_seconds = phase.virtual_seconds

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            refuse_callbacks_of_one_worker(trainer)
        super().setup(trainer)
        if self.worker_data is not None and trainer.state.fn == TrainerFn.FITTING:
            # All of them now: a number that the function does not know must not end a run that is under way.
            for worker in self.script.numbers:
                self._data_of(worker)

    def _data_of(self, worker: int) -> Any:
        """The worker's own training data."""
        assert self.worker_data is not None
        if worker not in self._given:
            try:
                data = self.worker_data(worker)
            except Exception as error:
                raise ValueError(
                    f"worker_data({worker}) failed with {type(error).__name__}: {error}; it must return the loader of "
                    f"worker {worker}: the run has the workers {', '.join(map(str, self.script.numbers))}, those that "
                    "arrive later included"
                ) from error
            if data is None:
                raise ValueError(f"worker_data({worker}) returned None; it must return the loader of worker {worker}")
            odd = next((one for one in combined(data).flattened if not hasattr(one, "__iter__")), None)
            if odd is not None:
                raise TypeError(
                    f"worker_data({worker}) returned {odd!r} where a loader must be, which cannot be iterated over; it "
                    f"must return the loader of worker {worker}, or loaders in a list or a dictionary"
                )
            self._given[worker] = data
        return self._given[worker]

    @override
    def _open_group(self) -> None:
        """A single process needs none."""

    @override
    def _training_data(self, trainer: pl.Trainer) -> SimulatedData:
        if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined] # set by one of its connectors
            raise ValueError(
                "reload_dataloaders_every_n_epochs does not go together with a simulated cluster, whose workers are in "
                "different epochs at the same time; leave it at 0"
            )
        own = None if self.worker_data is None else self._data_of
        return SimulatedData(trainer, self._workers, self._seed, self._distributes_data, own)

    @override
    def _begin(self, settings: PhaseSettings, restored: dict[str, Any] | None, budget: RunBudget) -> AsyncTraining:
        assert self.lightning_module is not None
        assert isinstance(self._data, SimulatedData)
        assert self._limits is not None
        settings = replace(settings, token=None)
        if restored is not None and isinstance(self.script, Recording):
            raise ValueError(
                f"replay={self.script.path!r} begins at the beginning of the logged run; leave ckpt_path out"
            )
        phase = SimulatedPhase(settings, self.script, self.lightning_module, self.seed, restored)
        alone = None if restored is None else restored.get("alone")
        inner = {} if restored is None else restored.get("simulation", {}).get("inner", {})
        try:
            return SimulatedTraining(
                self._trainer, phase, self._data, self._limits, budget, alone, inner, self.inner_states_on_cpu
            )
        except BaseException:
            phase.close()
            raise
