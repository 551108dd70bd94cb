"""The training data of virtual workers: each has a stream of batches of its own, and Lightning gets them by turns.

Lightning holds one loader, as long as each worker's share would be if all were equally fast. It never iterates it: its
fetcher is given the next batch of the worker at whose turn it is. An epoch of Lightning's is over when as many batches
were trained on as one epoch of all workers together has, or when nobody has data any more.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lightning_async_localsgd.epochs import TrainingData
from lightning_async_localsgd.randomness import set_random_state
from lightning_async_localsgd.sampling import can_be_leased, leased_again, leased_sampler_of
from lightning_async_localsgd.trainer_parts import accumulated_batches

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.epochs import OpenStock
    from lightning_async_localsgd.sampling import LeasedSampler
    from lightning_async_localsgd.simulation.machine import VirtualWorker
    from lightning_async_localsgd.simulation.phase import SimulatedPhase

_NOTHING = object()


class _Stream:
    """The batches of one worker, epoch after epoch.

    Args:
        loader: its loaders.
        samplers: of those that are leased; none if they are the worker's own.
        epoch: the first one.
        end: epochs; None to go on and on.
        length: batches after which an epoch of the worker's own is over, if it is not over before.
        owner: whose data it is, in words.

    Attributes:
        samplers: as given.
        in_step: batches of the present optimizer step.

    """

    def __init__(
        self,
        loader: CombinedLoader,
        samplers: dict[str, LeasedSampler],
        epoch: int,
        end: int | None,
        length: float = math.inf,
        owner: str = "",
    ) -> None:
        self.samplers = samplers
        self.in_step = 0
        self._loader = loader
        self._epoch = epoch
        self._end = end
        self._length = length
        self._owner = owner
        self._iterator: Iterator[Any] | None = None
        self._in_epoch = 0
        self._ahead: Any = _NOTHING

    def take(self) -> Any:
        """The next batch; :data:`_NOTHING` if there is none any more."""
        self.ready()
        batch, self._ahead = self._ahead, _NOTHING
        return batch

    def ready(self) -> bool:
        """Whether there is another batch. Not to be asked between a batch and its :meth:`LeasedSampler.use_one`."""
        while self._ahead is _NOTHING and not self._ended:
            if self._iterator is None:
                for sampler in self.samplers.values():
                    sampler.set_epoch(self._epoch)
                self._iterator = iter(self._loader)
                self._in_epoch = 0
            if self.epoch_over() and not self.samplers and self._in_epoch == 0:
                raise ValueError(f"the loader of {self._owner} has no batches; every worker needs some")
        return self._ahead is not _NOTHING

    def epoch_over(self) -> bool:
        """Whether the worker has had the last batch of its epoch."""
        if self._ahead is _NOTHING and self._iterator is not None:
            found = None if self._in_epoch >= self._length else next(self._iterator, None)
            if found is None:
                self._iterator = None
                self._epoch += 1
            else:
                self._ahead = found[0]
                self._in_epoch += 1
        return self._iterator is None

    @property
    def _ended(self) -> bool:
        return self._end is not None and self._epoch >= self._end

    @property
    def out(self) -> bool:
        """There is no other batch."""
        return self._ahead is _NOTHING and self._ended


class SimulatedData(TrainingData):
    """The training data of one ``fit`` with virtual workers.

    Args:
        trainer: the trainer.
        workers: initial workers.
        seed: of the order of leased data.
        leased: whether data is to be shared out (``use_distributed_sampler``).
        worker_data: gives each worker's own loader; None leases the trainer's.

    Attributes:
        last: the batch that was given last is the last one of Lightning's epoch.

    """

    def __init__(
        self,
        trainer: pl.Trainer,
        workers: int,
        seed: int,
        leased: bool,
        worker_data: Callable[[int], Any] | None,
    ) -> None:
        super().__init__(trainer, workers, seed, leased and worker_data is None, None)
        self.last = False
        self._worker_data = worker_data
        self._own: dict[int, CombinedLoader] = {}
        self._streams: dict[int, tuple[str, _Stream]] = {}
        self._current: _Stream | None = None
        self._phase: SimulatedPhase | None = None
        self._retire: Callable[[], None] = lambda: None
        self._end: int | None = None
        self._batches = 0
        self._epoch_batches = math.inf
        self._window_begins = self._window_ends = True

    def take(self, loader: object) -> object:
        """See :meth:`.TrainingData.take`.

        Raises:
            ValueError: the loader's items cannot be handed out.

        """
        if self._worker_data is not None:
            return loader
        if not self._leased or not can_be_leased(loader):
            why = (
                f"the training data is a {type(loader).__name__} whose items cannot be handed out by number"
                if self._leased
                else "use_distributed_sampler=False leaves the division of the training data among processes to the "
                "script"
            )
            raise ValueError(
                f"{why}, and all workers of a simulated cluster are in one process; give the strategy "
                "worker_data=function, which gets a worker's number and returns the loader of that worker"
            )
        return super().take(loader)

    def attach(self, phase: SimulatedPhase, retire: Callable[[], None], end: int | None) -> None:
        """Called before :meth:`begin`.

        Args:
            phase: knows at whose turn it is.
            retire: called when the worker at turn has no more data.
            end: epochs of the run, where its end is the data's; None otherwise.

        """
        self._phase = phase
        self._retire = retire
        self._end = end

    def begin(self, open_stock: OpenStock, restored: dict[str, Any] | None = None) -> None:
        """Training begins.

        Args:
            open_stock: not used: every worker has stocks of its own.
            restored: what an earlier run left behind, see :meth:`.TrainingData.state_dict`.

        Raises:
            ValueError: there are more workers than items.
            TypeError: the module takes an iterator in the place of batches.

        """
        trainer, loader = self._trainer, self._loader()
        bound = self._bound_sampler(loader)
        self.global_epochs = bound is not None
        if bound is None:
            self._epoch_batches = trainer.num_training_batches * self._ranks
        else:
            self._epoch_batches = self._items(loader, bound)
            accumulated = accumulated_batches(trainer, 0)
            if math.ceil(self._epoch_batches / accumulated) < self._ranks:
                windows = f", of which a local step takes {accumulated} (accumulate_grad_batches)"
                raise ValueError(
                    f"seconds_per_step has {self._ranks} workers, but an epoch of the training data has only "
                    f"{self._epoch_batches} batches for all of them{windows if accumulated > 1 else ''}; take fewer "
                    "workers, more data or a smaller batch_size"
                )
        fetcher = trainer.fit_loop._data_fetcher
        if isinstance(fetcher, _DataLoaderIterDataFetcher):
            raise TypeError(
                "training_step(self, dataloader_iter) fetches batches by itself, but in a simulated cluster each batch "
                "is of the worker at whose turn it is; write training_step(self, batch, batch_idx)"
            )
        if restored is not None:
            set_random_state(restored["random"])
        self._hold(fetcher)
        if trainer.fit_loop.restarted_mid_epoch:
            self._batches = int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def prepare(self) -> bool:
        """An epoch of Lightning's is about to begin. The data is that of the beginning."""
        return False

    def next_batch(self) -> Any:
        """The next batch of the worker at turn.

        Raises:
            StopIteration: nobody has any more.

        """
        phase = self._phase
        assert phase is not None
        while True:
            if phase.stopped:
                raise StopIteration
            stream = self._stream_of(phase.worker)
            batch = stream.take()
            if batch is not _NOTHING:
                break
            self._retire()
        self._current = stream
        accumulated = accumulated_batches(self._trainer, self._trainer.current_epoch)
        self._window_begins = stream.in_step == 0
        # Of a worker's own data an epoch need not have whole windows either; it goes on in the next one.
        self._window_ends = stream.in_step + 1 >= accumulated or (self.global_epochs and stream.epoch_over())
        stream.in_step = 0 if self._window_ends else stream.in_step + 1
        self._batches += 1
        self.last = self._window_ends and self._is_last(stream)
        return batch

    def has_data(self, worker: VirtualWorker) -> bool:
        """Whether a worker who has used all that it has taken can get more."""
        return self._stream_of(worker).ready()

    def out_of_data(self, look: bool) -> bool:
        """Whether the batch that was given last was its worker's last.

        Args:
            look: for another one in the last epoch, if that has not been done yet. Its worker will have asked for it
                in the same round.

        """
        stream = self._current
        if stream is None:
            return False
        if look and self._in_last_epoch:
            stream.ready()
        return stream.out

    def begin_epoch(self) -> None:
        """An epoch of Lightning's begins."""
        self._batches = max(0, self._batches - int(self._epoch_batches)) if self._epoch_batches < math.inf else 0
        self.last = False

    def see_batch(self, batch: Any) -> None:
        """See :meth:`.TrainingData.see_batch`."""
        assert self._current is not None
        for sampler in self._current.samplers.values():
            sampler.use_one()

    def end(self) -> None:
        """Training is over: Lightning fetches by itself again."""
        loop = self._trainer.fit_loop.epoch_loop
        loop.__dict__.pop("_should_accumulate", None)
        loop.automatic_optimization.__dict__.pop("_make_zero_grad_fn", None)
        super().end()
        self._streams.clear()
        self._own.clear()
        self._current = self._phase = None

    # ------------------------------------------------------------------ internal

    def _is_last(self, stream: _Stream) -> bool:
        assert self._phase is not None
        current = self._phase.worker
        if self._epoch_batches == math.inf:
            # Of data without a length the epochs are the first worker's, as a live run's are rank 0's.
            return current.number == min(self._phase.turns.live) and stream.epoch_over()
        if stream.out:
            # The others are asked only when nothing is left that they could take from each other.
            live = self._phase.turns.live.values()
            return not any(self.has_data(other) for other in list(live) if other is not current)
        return not self._in_last_epoch and self._batches >= self._epoch_batches

    @property
    def _in_last_epoch(self) -> bool:
        return self._end is not None and self._trainer.current_epoch + 1 >= self._end

    def _stream_of(self, worker: VirtualWorker) -> _Stream:
        session, stream = self._streams.get(worker.number, ("", None))
        if stream is None or session != worker.session:
            stream = self._new_stream(worker)
            self._streams[worker.number] = worker.session, stream
        return stream

    def _new_stream(self, worker: VirtualWorker) -> _Stream:
        epoch = self._trainer.fit_loop.epoch_progress.current.processed
        if self._worker_data is not None:
            # Its epoch is as long as its data; what the trainer has counted are the batches of the first worker.
            limit = self._trainer.limit_train_batches
            all_of_it = isinstance(limit, float) and limit == 1.0
            length = math.inf if all_of_it else self._trainer.num_training_batches
            owner = f"worker {worker.number}, worker_data({worker.number}),"
            return _Stream(self._own_loader(worker.number), {}, epoch, None, length, owner)
        shared = self._loader()
        loader = copy.copy(shared)
        loader._iterator = None
        loader.flattened = [leased_again(part) for part in shared.flattened]
        assert all(leased_sampler_of(part) is not None for part in loader.flattened)
        return _Stream(loader, self._connected(loader, worker.desk.stock), epoch, self._end)

    def _own_loader(self, number: int) -> CombinedLoader:
        if number not in self._own:
            assert self._worker_data is not None
            self._own[number] = combined(self._worker_data(number))
        return self._own[number]

    def _hold(self, fetcher: _DataFetcher) -> None:
        """Has Lightning's loop take batches, and the ends of optimizer steps and epochs, from here."""
        self._fetcher, self._own_class = fetcher, type(fetcher)
        attributes = {"__module__": __name__, "source": self}
        fetcher.__class__ = type(self._own_class.__name__, (_Played, self._own_class), attributes)
        fetcher.reset()
        loop = self._trainer.fit_loop.epoch_loop
        progress = loop.batch_progress
        loop._num_ready_batches_reached = lambda: progress.is_last_batch
        loop._should_accumulate = lambda: not self._window_ends
        optimization = loop.automatic_optimization
        zeroing = optimization._make_zero_grad_fn
        # Lightning begins a window with every so many batches of the epoch, whosever they are.
        optimization._make_zero_grad_fn = lambda index, optimizer: zeroing(0 if self._window_begins else 1, optimizer)


def combined(data: Any) -> CombinedLoader:
    """What a user gives as training data, as Lightning takes it."""
    return data if isinstance(data, CombinedLoader) else CombinedLoader(data, "max_size_cycle")


class _Played(_DataFetcher):
    """Put in front of the class of the trainer's data fetcher."""

    source: SimulatedData

    def __iter__(self) -> _DataFetcher:
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
        """An epoch begins; its length is not known before it is over."""
        super().reset()
        self.length = None
        self.done = False
        self.source.begin_epoch()
