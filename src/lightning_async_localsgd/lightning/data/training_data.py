"""A trainer's training data in asynchronous training: leased items, and epochs of the whole run.

Lightning ends a rank's epoch after as many batches as the length of its data loader. If data is leased, a fast rank
gets more batches and a slow rank fewer, so the epoch ends when the server has no more items of the epoch.
"""

from __future__ import annotations

import math
import socket
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_async_localsgd.lightning.data.batch_sizes import OwnAccumulation, accumulated_batches
from lightning_async_localsgd.lightning.data.duplicate_check import DuplicateCheck
from lightning_async_localsgd.lightning.data.rank_aware import make_rank_aware
from lightning_async_localsgd.lightning.data.rng_state import random_state, set_random_state
from lightning_async_localsgd.lightning.data.sampling import (
    LeasedSampler,
    can_be_leased,
    leased_loader,
    leased_sampler_of,
    why_samples_cannot_be_leased,
)
from lightning_async_localsgd.lightning.mixed_in import mixed_in
from lightning_async_localsgd.lightning.trainer_access.callbacks import callbacks_of
from lightning_async_localsgd.lightning.trainer_access.data import (
    DataFetcher,
    PrefetchDataFetcher,
    combined_loader,
    data_fetcher,
    loader_mode,
    split_among_ranks,
)
from lightning_async_localsgd.lightning.trainer_access.loop import end_epochs_with_data
from lightning_async_localsgd.policies.worker_batches import StepBatch

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.utilities.combined_loader import CombinedLoader

    from lightning_async_localsgd.launch.rendezvous import Rendezvous
    from lightning_async_localsgd.runtime.leases import LeaseBuffer

    OpenLeases = Callable[[str, int, int, bool, bool], LeaseBuffer]


class _UnknownLength(DataFetcher):
    """Mixin for a trainer's data fetcher that does not know the number of batches in advance."""

    def reset(self) -> None:
        super().reset()
        self.length = None
        self.done = False


class TrainingData:
    """The training data of one ``fit``, from the moment Lightning sets it up.

    Args:
        trainer: the trainer.
        ranks: number of ranks that share the data.
        seed: seed of the order, the same on all ranks.
        leased: whether the strategy divides the data among ranks (the trainer's ``use_distributed_sampler``).
        rendezvous: where ranks meet; None for a single rank.
        single_worker: whether the run has one worker, and no other can join.
        by_samples: whether workers have batch sizes of their own, so that samples are leased.

    Attributes:
        global_epochs: whether all ranks have the same epochs, those of the run.
        batch_of: returns the batches of a worker's step, if workers have batch sizes of their own. Those of the script,
            until it is set.

    """

    def __init__(
        self,
        trainer: pl.Trainer,
        ranks: int,
        seed: int,
        leased: bool,
        rendezvous: Rendezvous | None,
        single_worker: bool = False,
        by_samples: bool = False,
    ) -> None:
        self._by_samples = by_samples
        self._begun_with: StepBatch | None = None
        self.batch_of: Callable[[int], StepBatch] = lambda worker: self.reference
        self._trainer = cast("Any", trainer)  # Many of its attributes are set by its connectors.
        self._ranks = ranks
        self._single_worker = single_worker
        self._seed = seed
        self._leased = leased
        self._open_leases: OpenLeases | None = None
        self._samplers: dict[str, LeasedSampler] = {}
        self._rendezvous = rendezvous
        self._duplicate_check: DuplicateCheck | None = None
        self._restores = ExitStack()
        self._rank_aware = ExitStack()
        self._prepared_loader: CombinedLoader | None = None
        self.global_epochs = False

    def wrap(self, loader: object) -> object:
        """Return the loader that Lightning uses in place of the user's training data loader.

        Raises:
            ValueError: Workers have batch sizes of their own, and those of the loader cannot be changed.

        """
        if self._by_samples:
            reason = (
                why_samples_cannot_be_leased(loader) if self._leased else "is split among ranks by the script itself"
            )
            if reason is not None:
                raise ValueError(_no_own_sizes(f"the training data {reason}"))
            return leased_loader(loader, self._ranks, self._seed, by_samples=True)  # type: ignore[arg-type]
        if self._leased and can_be_leased(loader):
            return leased_loader(loader, self._ranks, self._seed, self._single_worker)  # type: ignore[arg-type]
        if self._ranks > 1:
            if self._leased:
                loader = split_among_ranks(self._trainer, loader)
            # A late joiner has no share of its own.
            self._rank_aware.callback(make_rank_aware(loader, self._trainer.global_rank % self._ranks, self._ranks))
        return loader

    @property
    def reference(self) -> StepBatch:
        """The batches of a step of the script: those of the data loader, as the trainer accumulates them.

        Raises:
            ValueError: There is more than one loader. Only with batch sizes of the workers' own.

        """
        loaders = self._loader().flattened
        if len(loaders) != 1:
            raise ValueError(_no_own_sizes(f"the training data has {len(loaders)} data loaders"))
        sampler = leased_sampler_of(loaders[0])
        assert sampler is not None
        assert sampler.order.batch_size is not None
        return StepBatch(sampler.order.batch_size, accumulated_batches(self._trainer, 0))

    @property
    def drops_last(self) -> bool:
        """Whether the data loader drops incomplete batches. Only with batch sizes of the workers' own."""
        sampler = leased_sampler_of(self._loader().flattened[0])
        return sampler is not None and sampler.order.drop_last

    @property
    def step_samples(self) -> int:
        """Samples in a step of the script's batch size, if workers have sizes of their own; otherwise 0."""
        return self.reference.samples if self._by_samples else 0

    @property
    def items_per_batch(self) -> int:
        """Items in a batch of the data loader: 1, or its samples if these are leased."""
        return self.reference.size if self._by_samples else 1

    def items_per_step(self, epoch: int) -> int:
        """Return the items in a step of the script: accumulated batches, or samples if these are leased."""
        return self.step_samples or accumulated_batches(self._trainer, epoch)

    @property
    def own_items_per_step(self) -> int:
        """Items in a step of this rank, in the first epoch."""
        if self._by_samples:
            return self.batch_of(self._trainer.global_rank).samples
        return accumulated_batches(self._trainer, 0)

    @property
    def items_of_batch(self) -> int:
        """Items in the next batch to train on."""
        sampler = self._epoch_sampler(self._loader())
        return 1 if sampler is None else sampler.items_of_next

    def accumulate_own(self) -> Callable[[], None]:
        """Let the trainer accumulate as many batches as this worker does, until the returned function is called."""
        trainer = self._trainer
        if not self._by_samples:
            return lambda: None
        before = trainer.accumulate_grad_batches
        trainer.accumulate_grad_batches = OwnAccumulation(self.batch_of(trainer.global_rank).accumulate, before)
        return lambda: setattr(trainer, "accumulate_grad_batches", before)

    @property
    def items_per_epoch(self) -> int | None:
        """Batches, or leased samples, of an epoch for all ranks together; None if each rank has epochs of its own."""
        sampler = self._epoch_sampler(self._loader())
        return None if sampler is None else self._items(self._loader(), sampler)

    def position_of_batch(self, epoch: int) -> int | None:
        """Return the position of the next batch to train on in the order of ``epoch``; None if it has none there."""
        return self._position_in(self._loader(), epoch)

    def begin(self, open_leases: OpenLeases, restored: dict[str, Any] | None = None) -> None:
        """Begin training with leased items.

        Args:
            open_leases: returns the buffer of leases for a loader. Its arguments are the loader's name, the number of
                items in an epoch of all ranks together, the number of items that are leased together, whether items are
                leased in order, and whether other workers lease other numbers of them together.
            restored: state of a single worker's data, see :meth:`state_dict`.

        """
        self._open_leases = open_leases
        self.prepare()
        loop = self._trainer.fit_loop
        if restored is not None:
            for name, state in restored["orders"].items():
                if name in self._samplers:
                    self._samplers[name].order.load_state_dict(state)
        if self._samplers and loop.restarting:
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
        # Lightning has made an iterator when it set the data up, which has yielded nothing. For the first epoch it does
        # not make another one.
        makes_iterator = self._trainer.current_epoch > 0 and not loop.is_resuming and not loop.restarting
        if restored is not None and not loop.restarted_mid_epoch:
            set_random_state(restored["random"])
        if self._samplers and not makes_iterator:
            for sampler in self._samplers.values():
                sampler.set_epoch(loop.epoch_progress.current.processed)
            iter(data_fetcher(self._trainer))
        if restored is not None and loop.restarted_mid_epoch:
            # In the uninterrupted run, making the iterator had drawn its random numbers before the checkpoint.
            set_random_state(restored["random"])

    def state_dict(self) -> dict[str, Any]:
        """Return what a single worker needs to continue exactly: random states, and the origins of its orders."""
        return {
            "random": random_state(),
            "orders": {name: sampler.order.state_dict() for name, sampler in self._samplers.items()},
        }

    def prepare(self) -> bool:
        """Prepare an epoch. If data loaders are new, because they are reloaded, give them leases.

        Returns:
            Whether data loaders are new.

        Raises:
            ValueError: Workers have batch sizes of their own, and the script's has changed.

        """
        loader = self._loader()
        if loader is self._prepared_loader or self._open_leases is None:
            return False
        if self._by_samples:
            self._begun_with = self._begun_with or self.reference
            if self.reference != self._begun_with:
                raise ValueError(
                    f"host {socket.gethostname()}: with the option batch_size, samples are counted in steps of one "
                    f"size, but the data loader of epoch {self._trainer.current_epoch} has batches of "
                    f"{self.reference.size} samples, and those before had {self._begun_with.size}; use one batch size, "
                    "or leave batch_size out"
                )
        self._prepared_loader = loader
        self.global_epochs = self._epoch_sampler(loader) is not None
        self._samplers = self._start_samplers(loader, self._open_leases, self._trainer.global_rank)
        if not self._samplers and self._rendezvous is not None and self._duplicate_check is None:
            self._duplicate_check = DuplicateCheck(self._rendezvous)
        self._end_epochs_with_data(loader)
        return True

    def _start_samplers(self, loader: CombinedLoader, open_leases: OpenLeases, worker: int) -> dict[str, LeasedSampler]:
        """Give a worker's leased loaders their leases, and return their samplers by the names of the leases.

        Raises:
            ValueError: An epoch is too short to be shared.

        """
        epoch_sampler = self._epoch_sampler(loader)
        mode = loader_mode(loader)
        reloads = bool(self._trainer.reload_dataloaders_every_n_epochs)
        samplers: dict[str, LeasedSampler] = {}
        for index, part in enumerate(loader.flattened):
            sampler = leased_sampler_of(part)
            if sampler is None:
                continue
            sampler.bound_to_epoch = sampler is epoch_sampler or (mode == "max_size" and epoch_sampler is not None)
            sampler.endless = epoch_sampler is None or (mode == "min_size" and sampler is not epoch_sampler)
            name = f"{index}@{self._trainer.current_epoch}" if reloads else str(index)
            # Lease all accumulated batches of an optimizer step together, so that steps are whole, unless their number
            # will change.
            changes = any(isinstance(c, GradientAccumulationScheduler) for c in callbacks_of(self._trainer))
            unit = 1 if changes or not sampler.bound_to_epoch else accumulated_batches(self._trainer, 0)
            items = self._items(loader, sampler)
            if sampler is epoch_sampler and self._ranks > 1 and 0 < items <= self.items_per_step(0):
                raise ValueError(_too_short(-(-items // self.items_per_batch), unit, self._ranks))
            if self._by_samples:
                sampler.batch_size, unit = self.batch_of(worker).size, self.batch_of(worker).samples
            ordered = self._single_worker or not sampler.order.shuffled
            sampler.start(open_leases(name, items, unit, ordered, self._by_samples))
            samplers[name] = sampler
        return samplers

    def count_batch(self, batch: Any) -> int | None:
        """Count a batch's items as used. Training on the batch is next.

        Returns:
            The number of its samples, if samples are leased; otherwise None.

        """
        samples = self._mark_used(self._samplers)
        if self._duplicate_check is not None:
            self._duplicate_check.add_batch(batch)
        return samples

    def _mark_used(self, samplers: dict[str, LeasedSampler]) -> int | None:
        samples = [sampler.mark_used() for sampler in samplers.values()]
        return sum(samples) if self._by_samples else None

    def check_duplicates(self) -> None:
        """Compare the ranks' first batches for the last time, after training."""
        if self._duplicate_check is not None:
            self._duplicate_check.compare()

    def end(self) -> None:
        """End training. Lightning then ends epochs as usual."""
        self._duplicate_check = None
        self._restores.close()
        for sampler in self._samplers.values():
            sampler.leases = None
        self._prepared_loader = self._open_leases = self._begun_with = None
        self._samplers = {}

    def close(self) -> None:
        """Give the user's loaders back as they were, after the fit."""
        self._rank_aware.close()

    # ------------------------------------------------------------------ internal

    def _loader(self) -> CombinedLoader:
        loader = combined_loader(self._trainer)
        assert loader is not None
        return loader

    def _epoch_sampler(self, loader: CombinedLoader) -> LeasedSampler | None:
        """Return the sampler that ends an epoch, if all combined loaders are leased, so that epochs are the run's."""
        samplers = [leased_sampler_of(part) for part in loader.flattened]
        if not samplers or any(sampler is None for sampler in samplers):
            return None
        choose = min if loader_mode(loader) == "min_size" else max
        leased = [sampler for sampler in samplers if sampler is not None]
        return choose(leased, key=lambda sampler: self._items(loader, sampler))

    def _position_in(self, loader: CombinedLoader, epoch: int) -> int | None:
        sampler = self._epoch_sampler(loader)
        return None if sampler is None else sampler.position_in(epoch)

    def _items(self, loader: CombinedLoader, sampler: LeasedSampler) -> int:
        """Return the number of items in an epoch of all ranks together, including ``limit_train_batches``."""
        items = sampler.order.items
        at = next(at for at, part in enumerate(loader.flattened) if leased_sampler_of(part) is sampler)
        limit = math.inf if loader.limits is None else loader.limits[at]
        return items if limit >= len(sampler) else min(items, int(limit) * self._ranks * self.items_per_batch)

    def _end_epochs_with_data(self, loader: CombinedLoader) -> None:
        """End an epoch when the server has no more items of it."""
        loop = self._trainer.fit_loop
        # A single worker has as many batches as its loader's length, unless it resumes in the middle of an epoch.
        if not self.global_epochs or (self._single_worker and not loop.restarting):
            return
        fetcher = data_fetcher(self._trainer)
        self._restores.close()  # From an earlier loader, which was replaced.
        self._restores.callback(mixed_in(fetcher, _UnknownLength))
        if isinstance(fetcher, PrefetchDataFetcher):
            fetcher.prefetch_batches = max(1, fetcher.prefetch_batches)
        self._restores.callback(end_epochs_with_data(self._trainer))


def _no_own_sizes(reason: str) -> str:
    """Return the error text for training data of which workers cannot make batches of their own sizes."""
    return (
        f"host {socket.gethostname()}: the option batch_size lets workers make batches of samples, but {reason}; use "
        "one DataLoader(dataset, batch_size=...) with a map-style dataset, or leave batch_size out"
    )


def _too_short(batches: int, unit: int, ranks: int) -> str:
    """Return the error text for an epoch of one local step: rank 0, which validates, would have to take every step."""
    has, and_windows, smaller = f"{batches} batches", "", "a smaller batch_size"
    if batches == 1:
        has = "one batch"
    if unit > 1:
        and_windows = f", which is one local step with accumulate_grad_batches={unit}"
        smaller += " or accumulate_grad_batches"
    return (
        f"{ranks} ranks cannot share the training data, because an epoch has only {has} for all of them together"
        f"{and_windows}; use {smaller}, more data, or devices=1"
    )
