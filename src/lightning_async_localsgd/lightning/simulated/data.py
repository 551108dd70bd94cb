"""Training data of virtual workers: each worker has its own batches, and Lightning gets those of the current worker.

Lightning has one loader, whose length is the share of a worker if all are equally fast. Lightning never iterates over
that loader: its data fetcher returns the next batch of the current worker instead. Lightning's epoch ends when as many
batches were trained on as an epoch of all workers together has, or when no worker has data left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.combined_loader import CombinedLoader
from typing_extensions import override

from lightning_async_localsgd.lightning.data.batch_sizes import OwnAccumulation, accumulated_batches
from lightning_async_localsgd.lightning.data.rng_state import set_random_state
from lightning_async_localsgd.lightning.data.sampling import can_be_leased, copy_with_own_leases, leased_sampler_of
from lightning_async_localsgd.lightning.data.training_data import TrainingData
from lightning_async_localsgd.lightning.mixed_in import mixed_in
from lightning_async_localsgd.lightning.trainer_access.data import (
    DataFetcher,
    DataLoaderIterDataFetcher,
    data_fetcher,
    with_loaders,
)
from lightning_async_localsgd.lightning.trainer_access.loop import control_steps, end_epochs_with_data

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.lightning.data.sampling import LeasedSampler
    from lightning_async_localsgd.lightning.data.training_data import OpenLeases
    from lightning_async_localsgd.simulation.machine import VirtualWorker
    from lightning_async_localsgd.simulation.runtime import SimulatedRuntime

_NO_BATCH = object()


class _WorkerBatches:
    """The batches of one worker, epoch after epoch.

    Args:
        loader: the worker's loaders.
        samplers: samplers of leased loaders by name; empty if the loaders are the worker's own.
        epoch: number of the first epoch.
        epochs: number of the epoch before which the batches end; None if they never end.
        length: maximum number of batches in an epoch.
        owner: description of the worker, for error texts.

    Attributes:
        samplers: samplers of leased loaders by name.
        batches_in_step: batches of the current optimizer step so far.
        batch_epoch: epoch of the last popped batch.
        loader: the worker's loaders.

    """

    def __init__(
        self,
        loader: CombinedLoader,
        samplers: dict[str, LeasedSampler],
        epoch: int,
        epochs: int | None,
        length: float = math.inf,
        owner: str = "",
    ) -> None:
        self.samplers = samplers
        self.batches_in_step = 0
        self.batch_epoch = epoch
        self.loader = loader
        self._epoch = epoch
        self._epochs = epochs
        self._length = length
        self._owner = owner
        self._iterator: Iterator[Any] | None = None
        self._batches_in_epoch = 0
        self._prefetched: Any = _NO_BATCH

    def pop(self) -> Any:
        """Return the next batch; :data:`_NO_BATCH` if the batches have ended."""
        self.prefetch()
        self.batch_epoch = self._epoch
        batch, self._prefetched = self._prefetched, _NO_BATCH
        return batch

    def prefetch(self) -> bool:
        """Fetch the next batch, and return whether there is one.

        Must not be called between a batch and its :meth:`LeasedSampler.mark_used`.
        """
        while self._prefetched is _NO_BATCH and not self._epochs_ended:
            if self._iterator is None:
                for sampler in self.samplers.values():
                    sampler.set_epoch(self._epoch)
                self._iterator = iter(self.loader)
                self._batches_in_epoch = 0
            if self.epoch_ended() and not self.samplers and self._batches_in_epoch == 0:
                raise ValueError(f"the loader of {self._owner} has no batches; every worker needs at least one")
        return self._prefetched is not _NO_BATCH

    def epoch_ended(self) -> bool:
        """Return whether the last popped batch was the last one of its epoch. Fetches the next batch to find out."""
        if self._prefetched is _NO_BATCH and self._iterator is not None:
            fetched = None if self._batches_in_epoch >= self._length else next(self._iterator, None)
            if fetched is None:
                self._iterator = None
                self._epoch += 1
            else:
                self._prefetched = fetched[0]
                self._batches_in_epoch += 1
        return self._iterator is None

    @property
    def _epochs_ended(self) -> bool:
        return self._epochs is not None and self._epoch >= self._epochs

    @property
    def exhausted(self) -> bool:
        """Whether the batches are known to have ended."""
        return self._prefetched is _NO_BATCH and self._epochs_ended


class SimulatedData(TrainingData):
    """The training data of one ``fit`` with virtual workers.

    Args:
        trainer: the trainer.
        workers: number of initial workers.
        seed: seed of the order of leased data.
        leased: whether the trainer's data may be leased (``use_distributed_sampler``).
        worker_data: returns each worker's own loader; None leases the trainer's data.
        by_samples: whether workers have batch sizes of their own, so that samples are leased.

    Attributes:
        last: whether the last returned batch is the last one of Lightning's epoch.
        ends_local_step: whether a local step ends with the last returned batch.
        begins_contribution: in the synchronous beginning, whether a worker's contribution to a step begins with it.
        ends_contribution: in the synchronous beginning, whether a worker's contribution to a step ends with it.

    """

    def __init__(
        self,
        trainer: pl.Trainer,
        workers: int,
        seed: int,
        leased: bool,
        worker_data: Callable[[int], Any] | None,
        by_samples: bool = False,
    ) -> None:
        super().__init__(trainer, workers, seed, leased and worker_data is None, None, by_samples=by_samples)
        self.last = False
        self.ends_local_step = self.begins_contribution = self.ends_contribution = True
        self._worker_data = worker_data
        self._own_loaders: dict[int, CombinedLoader] = {}
        # Session and batches of each worker: a worker that comes back gets a new session.
        self._worker_batches: dict[int, tuple[str, _WorkerBatches]] = {}
        self._current: _WorkerBatches | None = None
        self._runtime: SimulatedRuntime | None = None
        self._on_exhausted: Callable[[], None] = lambda: None
        self._epochs: int | None = None
        # Items of Lightning's current epoch so far: batches, or samples if these are leased.
        self._batches = 0
        self._epoch_batches = math.inf
        self._window_begins = self._window_ends = True

    @override
    def wrap(self, loader: object) -> object:
        """Replace a training data loader that Lightning sets up.

        Raises:
            ValueError: The loader's items cannot be leased.

        """
        if self._worker_data is not None:
            return loader
        if self._by_samples:
            return super().wrap(loader)
        if not self._leased or not can_be_leased(loader):
            reason = (
                f"the training data is a {type(loader).__name__} whose items cannot be leased by number"
                if self._leased
                else "with use_distributed_sampler=False the script itself shards the training data"
            )
            raise ValueError(
                f"{reason}, but all simulated workers share one process; pass worker_data=function to the strategy, "
                "which takes a worker's number and returns the loader of that worker"
            )
        return super().wrap(loader)

    def attach(self, runtime: SimulatedRuntime, on_exhausted: Callable[[], None], epochs: int | None) -> None:
        """Set the runtime whose workers get batches. Must be called before :meth:`begin`.

        Args:
            runtime: has the current worker.
            on_exhausted: called when the current worker has no more data. It ends training, or changes the worker.
            epochs: number of epochs in the run, if the end of the data ends the run; None otherwise.

        """
        self._runtime = runtime
        runtime.has_data = self.has_data
        self._on_exhausted = on_exhausted
        self._epochs = epochs

    @override
    def begin(self, open_leases: OpenLeases, restored: dict[str, Any] | None = None) -> None:
        """Begin training.

        Args:
            open_leases: not used, because each worker has its own lease buffers.
            restored: state to resume from, see :meth:`.TrainingData.state_dict`.

        Raises:
            ValueError: An epoch has fewer local steps than there are workers.
            TypeError: The module's ``training_step`` takes an iterator instead of batches.

        """
        trainer, loader = self._trainer, self._loader()
        bound = self._epoch_sampler(loader)
        self.global_epochs = bound is not None
        if bound is None:
            self._epoch_batches = trainer.num_training_batches * self._ranks
        else:
            self._epoch_batches = self._items(loader, bound)
            accumulated = accumulated_batches(trainer, 0)
            if math.ceil(self._epoch_batches / self.items_per_step(0)) < self._ranks:
                per_step = f", and a local step takes {accumulated} of them (accumulate_grad_batches)"
                raise ValueError(
                    f"seconds_per_step has {self._ranks} workers, but an epoch of the training data has only "
                    f"{-(-int(self._epoch_batches) // self.items_per_batch)} batches for all workers together"
                    f"{per_step if accumulated > 1 else ''}; use "
                    "fewer workers, more data or a smaller batch_size"
                )
        fetcher = data_fetcher(trainer)
        if isinstance(fetcher, DataLoaderIterDataFetcher):
            raise TypeError(
                "training_step(self, dataloader_iter) fetches its own batches, but a simulated cluster must pass the "
                "current worker's batch; use training_step(self, batch, batch_idx)"
            )
        if restored is not None:
            set_random_state(restored["random"])
        self._hold(fetcher)
        if trainer.fit_loop.restarted_mid_epoch:
            ready = int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)
            self._batches = (restored or {}).get("epoch_samples", 0) if self._by_samples else ready

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return {**state, "epoch_samples": self._batches} if self._by_samples else state

    @override
    def accumulate_own(self) -> Callable[[], None]:
        # Each worker accumulates its own number of batches, see next_batch().
        trainer, before = self._trainer, self._trainer.accumulate_grad_batches
        return lambda: setattr(trainer, "accumulate_grad_batches", before)

    def place_of_batch(self) -> tuple[int, bool]:
        """Return the epoch of the last returned batch, and whether the batch is its worker's last one in the epoch.

        Fetches the worker's next batch to find out, as a live worker does before it trains on a batch.
        """
        assert self._current is not None
        return self._current.batch_epoch, self._current.epoch_ended()

    @override
    def position_of_batch(self, epoch: int) -> int | None:
        assert self._current is not None
        return self._position_in(self._current.loader, epoch)

    @property
    @override
    def items_of_batch(self) -> int:
        assert self._current is not None
        return sum(sampler.items_of_next for sampler in self._current.samplers.values())

    @override
    def prepare(self) -> bool:
        # The loaders stay the same in all epochs.
        return False

    def next_batch(self) -> Any:
        """Return the next batch of the current worker.

        Raises:
            StopIteration: No worker has data left.

        """
        runtime = self._runtime
        assert runtime is not None
        while True:
            if runtime.stopped:
                raise StopIteration
            batches = self._batches_of(runtime.worker)
            batch = batches.pop()
            if batch is not _NO_BATCH:
                break
            self._on_exhausted()
        self._current = batches
        accumulated = accumulated_batches(self._trainer, self._trainer.current_epoch)
        if self._by_samples:
            of_script, accumulated = accumulated, self.batch_of(runtime.worker.number).accumulate
            self._trainer.accumulate_grad_batches = OwnAccumulation(accumulated, of_script)
        self._window_begins = batches.batches_in_step == 0
        # A window of accumulated batches may cross the end of an epoch of a worker's own data, but not of leased data.
        self._window_ends = batches.batches_in_step + 1 >= accumulated or (self.global_epochs and batches.epoch_ended())
        batches.batches_in_step = 0 if self._window_ends else batches.batches_in_step + 1
        self._batches += self.items_of_batch if self._by_samples else 1
        self.last = self._window_ends and self._is_last(batches)
        self.ends_local_step = self._window_ends
        if runtime.worker.synchronous:
            self._plan_contribution(runtime, batches)
        return batch

    def _plan_contribution(self, runtime: SimulatedRuntime, batches: _WorkerBatches) -> None:
        """Decide whether a contribution to a synchronous step begins and ends with the last returned batch.

        The optimizer takes the step after the last contribution.
        """
        worker = runtime.worker
        assert worker.current_round is not None
        self._window_begins = self.begins_contribution = self._window_begins and worker.round_steps == 0
        is_full = worker.round_steps + 1 >= worker.current_round.steps
        # As in a live run, a contribution ends with its worker's epoch. A replay takes its length from the log.
        has_ended = not runtime.replays and self.global_epochs and batches.epoch_ended()
        self.ends_contribution = self.ends_local_step and (is_full or has_ended)
        self._window_ends = self.ends_contribution and not any(
            runtime.replays or self.has_data(other) for other in runtime.simulator.awaited(worker)
        )

    def has_data(self, worker: VirtualWorker) -> bool:
        """Return whether a worker that has used all its batches can get another one."""
        return self._batches_of(worker).prefetch()

    def exhausted(self, fetch: bool) -> bool:
        """Return whether the last returned batch was the last one of its worker.

        Args:
            fetch: whether to fetch the worker's next batch in the last epoch to find out. The lease request must
                belong to the same round as the last batch.

        """
        batches = self._current
        if batches is None:
            return False
        if fetch and self._in_last_epoch:
            batches.prefetch()
        return batches.exhausted

    def begin_epoch(self) -> None:
        """Begin an epoch of Lightning's loop."""
        self._batches = max(0, self._batches - int(self._epoch_batches)) if self._epoch_batches < math.inf else 0
        self.last = False

    @override
    def count_batch(self, batch: Any) -> int | None:
        assert self._current is not None
        return self._mark_used(self._current.samplers)

    @override
    def end(self) -> None:
        """End training: Lightning fetches its own batches again."""
        super().end()
        self._worker_batches.clear()
        self._own_loaders.clear()
        self._current = self._runtime = None

    # ------------------------------------------------------------------ internal

    def _is_last(self, batches: _WorkerBatches) -> bool:
        assert self._runtime is not None
        current, live = self._runtime.worker, self._runtime.simulator.live
        if self._epoch_batches == math.inf:
            # Without a known length, the epochs are those of the first worker, as a live run's are those of rank 0.
            return current.number == min(live) and batches.epoch_ended()
        if batches.exhausted:
            # Other workers are asked only now: nothing is left that they could lease from one another.
            return not any(self.has_data(worker) for worker in list(live.values()) if worker is not current)
        return not self._in_last_epoch and self._batches >= self._epoch_batches

    @property
    def _in_last_epoch(self) -> bool:
        return self._epochs is not None and self._trainer.current_epoch + 1 >= self._epochs

    def _batches_of(self, worker: VirtualWorker) -> _WorkerBatches:
        session, batches = self._worker_batches.get(worker.number, ("", None))
        if batches is None or session != worker.session:
            batches = self._new_batches(worker)
            self._worker_batches[worker.number] = worker.session, batches
        return batches

    def _new_batches(self, worker: VirtualWorker) -> _WorkerBatches:
        epoch = self._trainer.fit_loop.epoch_progress.current.processed
        if self._worker_data is not None:
            # An epoch is as long as the worker's data. The trainer's number of batches is that of worker 0's data.
            limit = self._trainer.limit_train_batches
            unlimited = isinstance(limit, float) and limit == 1.0
            length = math.inf if unlimited else self._trainer.num_training_batches
            owner = f"worker {worker.number}, worker_data({worker.number}),"
            return _WorkerBatches(self._own_loader(worker.number), {}, epoch, None, length, owner)
        shared = self._loader()
        loader = with_loaders(shared, [copy_with_own_leases(part) for part in shared.flattened])
        assert all(leased_sampler_of(part) is not None for part in loader.flattened)
        samplers = self._start_samplers(loader, worker.lease_client.buffer, worker.number)
        return _WorkerBatches(loader, samplers, epoch, self._epochs)

    def _own_loader(self, number: int) -> CombinedLoader:
        if number not in self._own_loaders:
            assert self._worker_data is not None
            self._own_loaders[number] = as_combined_loader(self._worker_data(number))
        return self._own_loaders[number]

    def _hold(self, fetcher: DataFetcher) -> None:
        """Make Lightning's loop get its batches, and the ends of optimizer steps and epochs, from this object."""
        self._restores.callback(mixed_in(fetcher, _Played, source=self))
        fetcher.reset()
        self._restores.callback(end_epochs_with_data(self._trainer))
        # Lightning begins a window after a fixed number of batches, whichever workers they belong to.
        self._restores.callback(control_steps(self._trainer, lambda: self._window_begins, lambda: self._window_ends))


def as_combined_loader(data: Any) -> CombinedLoader:
    """Wrap a user's training data like Lightning does."""
    return data if isinstance(data, CombinedLoader) else CombinedLoader(data, "max_size_cycle")


class _Played(DataFetcher):
    """Mixin for the class of the trainer's data fetcher, which returns the current worker's batches."""

    source: SimulatedData

    def __iter__(self) -> DataFetcher:
        self.reset()
        return self

    def __next__(self) -> Any:
        self._start_profiler()
        try:
            batch = self.source.next_batch()
        except StopIteration:
            self.done = True
            raise
        finally:
            self._stop_profiler()
        self.fetched += 1
        self.done = self.source.last
        return batch, self.fetched - 1, 0

    def reset(self) -> None:
        """Begin an epoch. Its length is not known before its end."""
        super().reset()
        self.length = None
        self.done = False
        self.source.begin_epoch()
