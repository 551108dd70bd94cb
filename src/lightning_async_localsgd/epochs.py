"""A trainer's training data while ranks run asynchronously: leased items, and epochs that are the run's.

Lightning ends a rank's epoch after as many batches as its data loader says it has. Of leased data a fast rank takes
more batches than that and a slow one fewer: its epoch ends when nothing of the epoch is left to lease.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loops.fetchers import _DataFetcher, _PrefetchDataFetcher
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lightning_async_localsgd.randomness import random_state, set_random_state
from lightning_async_localsgd.same_samples import SameSamples
from lightning_async_localsgd.sampling import LeasedSampler, can_be_leased, leased_loader, leased_sampler_of
from lightning_async_localsgd.trainer_parts import accumulated_batches, callbacks_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.leases import LeaseStock
    from lightning_async_localsgd.rendezvous import Rendezvous

    OpenStock = Callable[[str, int, int, bool], LeaseStock]


class _Unmeasured(_DataFetcher):
    """Put in front of the class of a trainer's data fetcher: the length of an epoch is not known beforehand."""

    def reset(self) -> None:
        super().reset()
        self.length = None
        self.done = False


class TrainingData:
    """The training data of one ``fit``, from the moment Lightning sets it up.

    Args:
        trainer: the trainer.
        ranks: that share the data.
        seed: the same on all ranks.
        leased: whether data is to be shared out at all (``use_distributed_sampler``).
        rendezvous: of the ranks; None if there is one.
        alone: there is one rank, and none can join.

    """

    def __init__(
        self,
        trainer: pl.Trainer,
        ranks: int,
        seed: int,
        leased: bool,
        rendezvous: Rendezvous | None,
        alone: bool = False,
    ) -> None:
        self._trainer = cast("Any", trainer)  # Much of what is read of it is set by its connectors.
        self._ranks = ranks
        self._alone = alone
        self._seed = seed
        self._leased = leased
        self._open: OpenStock | None = None
        self._samplers: dict[str, LeasedSampler] = {}
        self._rendezvous = rendezvous
        self._same_samples: SameSamples | None = None
        self._fetcher: _DataFetcher | None = None
        self._own_class: type[_DataFetcher] | None = None
        self._prepared: CombinedLoader | None = None
        self.global_epochs = False

    def take(self, loader: object) -> object:
        """A training data loader is being set up: the one to use in its place."""
        if not self._leased:
            return loader
        if can_be_leased(loader):
            return leased_loader(loader, self._ranks, self._seed, self._alone)  # type: ignore[arg-type]
        # As under DDP: fixed shares for all ranks, where Lightning can make them.
        connector = self._trainer._accelerator_connector
        connector.use_distributed_sampler = self._ranks > 1
        try:
            return self._trainer._data_connector._prepare_dataloader(loader, shuffle=True, mode=RunningStage.TRAINING)
        finally:
            connector.use_distributed_sampler = False

    @property
    def items_of_epoch(self) -> int | None:
        """Batches of an epoch for all ranks together; None where epochs are each rank's own."""
        bound = self._bound_sampler(self._loader())
        return None if bound is None else self._items(self._loader(), bound)

    def begin(self, open_stock: OpenStock, restored: dict[str, Any] | None = None) -> None:
        """Training begins.

        Args:
            open_stock: gives the stock of leases for a loader's name, its items in an epoch of all ranks together, the
                unit in which they are leased, and whether in their order.
            restored: what a single rank's run left behind, see :meth:`state_dict`.

        """
        self._open = open_stock
        self.prepare()
        loop = self._trainer.fit_loop
        if restored is not None:
            for name, state in restored["orders"].items():
                if name in self._samplers:
                    self._samplers[name].order.load_state_dict(state)
        if self._samplers and loop.restarting:
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
        # Lightning has iterated while it set the data up, in vain, and does not do so again for the first epoch.
        again = self._trainer.current_epoch > 0 and not loop.is_resuming and not loop.restarting
        if restored is not None and not loop.restarted_mid_epoch:
            set_random_state(restored["random"])
        if self._samplers and not again:
            for sampler in self._samplers.values():
                sampler.set_epoch(loop.epoch_progress.current.processed)
            assert loop._data_fetcher is not None
            iter(loop._data_fetcher)
        if restored is not None and loop.restarted_mid_epoch:
            # The uninterrupted run was past the draws of making an iterator.
            set_random_state(restored["random"])

    def state_dict(self) -> dict[str, Any]:
        """What a single rank needs to go on as if it had never stopped: random numbers, and how its order was made."""
        return {
            "random": random_state(),
            "orders": {name: sampler.order.state_dict() for name, sampler in self._samplers.items()},
        }

    def prepare(self) -> bool:
        """An epoch is about to begin: data loaders that are new (they may be reloaded) are connected.

        Returns:
            Whether there are.

        """
        loader = self._loader()
        if loader is self._prepared or self._open is None:
            return False
        self._prepared = loader
        self.global_epochs = self._bound_sampler(loader) is not None
        self._samplers = self._connected(loader, self._open)
        if not self._samplers and self._rendezvous is not None and self._same_samples is None:
            self._same_samples = SameSamples(self._rendezvous)
        self._watch_epochs(loader)
        return True

    def _connected(self, loader: CombinedLoader, open_stock: OpenStock) -> dict[str, LeasedSampler]:
        """Connects the leased loaders in ``loader`` with their stocks; their samplers by the names of these.

        Raises:
            ValueError: an epoch is too short to be shared.

        """
        bound = self._bound_sampler(loader)
        reloads = bool(self._trainer.reload_dataloaders_every_n_epochs)
        samplers: dict[str, LeasedSampler] = {}
        for index, part in enumerate(loader.flattened):
            sampler = leased_sampler_of(part)
            if sampler is None:
                continue
            sampler.bound = sampler is bound or (loader._mode == "max_size" and bound is not None)
            sampler.endless = bound is None or (loader._mode == "min_size" and sampler is not bound)
            name = f"{index}@{self._trainer.current_epoch}" if reloads else str(index)
            # Whole windows of accumulated batches, so that steps are whole; not where their length is to change.
            changing = any(isinstance(one, GradientAccumulationScheduler) for one in callbacks_of(self._trainer))
            unit = 1 if changing or not sampler.bound else accumulated_batches(self._trainer, 0)
            items = self._items(loader, sampler)
            if sampler is bound and self._ranks > 1 and 0 < items <= unit:
                raise ValueError(_too_short(items, unit, self._ranks))
            ordered = self._alone or not sampler.order.shuffled
            sampler.start(open_stock(name, items, unit, ordered))
            samplers[name] = sampler
        return samplers

    def see_batch(self, batch: Any) -> None:
        """A batch is about to be trained on."""
        for sampler in self._samplers.values():
            sampler.use_one()
        if self._same_samples is not None:
            self._same_samples.see_batch(batch)

    def agree(self) -> None:
        """All ranks have come to the end: the last look at whether they were trained on the same samples."""
        if self._same_samples is not None:
            self._same_samples.look()

    def end(self) -> None:
        """Training is over: Lightning ends epochs again as it is used to."""
        self._same_samples = None
        loop = self._trainer.fit_loop.epoch_loop
        loop.__dict__.pop("_num_ready_batches_reached", None)
        if self._fetcher is not None and self._own_class is not None:
            self._fetcher.__class__ = self._own_class
        for sampler in self._samplers.values():
            sampler.stock = None
        self._fetcher = self._own_class = self._prepared = self._open = None
        self._samplers = {}

    # ------------------------------------------------------------------ internal

    def _loader(self) -> CombinedLoader:
        loader: CombinedLoader = self._trainer.fit_loop._combined_loader
        return loader

    def _bound_sampler(self, loader: CombinedLoader) -> LeasedSampler | None:
        """The sampler whose epochs are the run's: where all loaders are leased, that of the one which ends an epoch."""
        samplers = [leased_sampler_of(part) for part in loader.flattened]
        if not samplers or any(sampler is None for sampler in samplers):
            return None
        shortest_ends = loader._mode == "min_size"
        found = [sampler for sampler in samplers if sampler is not None]
        choose = min if shortest_ends else max
        return choose(found, key=lambda sampler: self._items(loader, sampler))

    def _items(self, loader: CombinedLoader, sampler: LeasedSampler) -> int:
        """Items of an epoch for all ranks together, ``limit_train_batches`` considered."""
        items = sampler.order.items
        at = next(at for at, part in enumerate(loader.flattened) if leased_sampler_of(part) is sampler)
        limit = math.inf if loader.limits is None else loader.limits[at]
        return items if limit >= len(sampler) else min(items, int(limit) * self._ranks)

    def _watch_epochs(self, loader: CombinedLoader) -> None:
        """Has an epoch end where its data does."""
        loop = self._trainer.fit_loop
        # A single rank has as many batches as its loader says, unless it goes on in the middle of an epoch.
        if not self.global_epochs or (self._alone and not loop.restarting):
            return
        fetcher = loop._data_fetcher
        assert fetcher is not None
        self._fetcher, self._own_class = fetcher, type(fetcher)
        fetcher.__class__ = type(self._own_class.__name__, (_Unmeasured, self._own_class), {})
        if isinstance(fetcher, _PrefetchDataFetcher):
            fetcher.prefetch_batches = max(1, fetcher.prefetch_batches)
        progress = loop.epoch_loop.batch_progress
        loop.epoch_loop._num_ready_batches_reached = lambda: progress.is_last_batch


def _too_short(batches: int, unit: int, ranks: int) -> str:
    """An epoch that is one local step: rank 0, which validates, would have to take it, and the others none ever."""
    has, and_windows, smaller = f"{batches} batches", "", "a smaller batch_size"
    if batches == 1:
        has = "one batch"
    if unit > 1:
        and_windows = f", which is one local step with accumulate_grad_batches={unit}"
        smaller += " or accumulate_grad_batches"
    return (
        f"{ranks} ranks cannot share the training data: an epoch of it has only {has} for all of them together"
        f"{and_windows}; take {smaller}, more data, or devices=1"
    )
