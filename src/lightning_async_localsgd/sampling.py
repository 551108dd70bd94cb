"""Which samples a rank trains on: a training data loader whose items are leased from the run's server.

One epoch of all ranks together has one order of items (batches, usually), which depends on the seed and the epoch
only. A rank takes the next few items of it whenever it needs some, so that fast ranks take more of them than slow ones
and each is still used once an epoch.
"""

from __future__ import annotations

import copy
import itertools
import random
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_async_localsgd.randomness import random_state, set_random_state

if TYPE_CHECKING:
    from lightning_async_localsgd.leases import LeaseStock

_ORDERS_KEPT = 2
"""Orders of so many epochs are kept: the present one's, and that of an epoch from which items come back."""


def can_be_leased(loader: object) -> bool:
    """Whether the items of a data loader can be handed out by number.

    Not so for iterable datasets, samplers without a length, samplers that split the data among ranks themselves, and
    loaders that keep a state of their own (``state_dict``): these are left as they are.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    if hasattr(loader, "state_dict") or isinstance(loader.sampler, DistributedSampler):
        return False
    if isinstance(getattr(loader.batch_sampler, "sampler", None), DistributedSampler):
        return False
    try:
        len(cast("Any", loader.sampler if loader.batch_sampler is None else loader.batch_sampler))
    except (TypeError, NotImplementedError):
        return False
    return True


class EpochOrder:
    """The items of a data loader's epochs by their place in the epoch's order.

    A shuffled loader's order is a permutation of its own for each epoch; the user's own samplers and batch samplers
    are run through, with random number generators seeded alike on all ranks.

    A single rank takes the order that the user's sampler gives it, as on a single device; so that a resumed run can
    make it again, the generators' states before are remembered.

    Args:
        loader: the user's loader, see :func:`can_be_leased`.
        seed: the same on all ranks.
        alone: there is a single rank.

    A sampler's ``len()`` may be more than it yields, as that of one that filters; the epoch's last items are not there
    then, see :meth:`has`. What it yields beyond its length is not asked for, as Lightning does not.

    Attributes:
        items: number of items in an epoch: batches, or single samples where ``batch_size`` is None.
        shuffled: whether items are in an arbitrary order; if not, the order may mean something.

    """

    def __init__(self, loader: DataLoader[Any], seed: int, alone: bool) -> None:
        self._seed = seed
        self._alone = alone
        self._begun: dict[str, Any] = {}
        self._orders: dict[int, Any] = {}
        self._batch_size: int | None = None
        self._drop_last = False
        batch_sampler = loader.batch_sampler
        if batch_sampler is None:
            self._source: Any = loader.sampler
            self.items = len(cast("Any", self._source))
        elif type(batch_sampler) is BatchSampler:
            self._source = loader.sampler
            self._batch_size = batch_sampler.batch_size
            self._drop_last = batch_sampler.drop_last
            samples, size = len(cast("Any", self._source)), batch_sampler.batch_size
            self.items = samples // size if batch_sampler.drop_last else -(-samples // size)
        else:
            self._source = batch_sampler
            self.items = len(cast("Any", batch_sampler))
        self.shuffled = type(self._source) is RandomSampler

    def has(self, epoch: int, number: int) -> bool:
        """Whether the sampler has yielded as much."""
        there = len(self._order(epoch))
        if self._batch_size is None:
            return number < there
        return there - number * self._batch_size >= (self._batch_size if self._drop_last else 1)

    def item(self, epoch: int, number: int) -> Any:
        """What a sampler yields: the indices of a batch, or one index."""
        order = self._order(epoch)
        if self._batch_size is None:
            item = order[number]
            return item.item() if isinstance(item, torch.Tensor) else item
        batch = order[number * self._batch_size : (number + 1) * self._batch_size]
        return batch.tolist() if isinstance(batch, torch.Tensor) else list(batch)

    def state_dict(self) -> dict[str, Any]:
        """What makes the latest order again, where that came from the user's sampler; empty if there is none."""
        return dict(self._begun)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The order of that epoch will be made again."""
        self._begun = dict(state)

    def _order(self, epoch: int) -> Any:
        if epoch not in self._orders:
            while len(self._orders) >= _ORDERS_KEPT:
                del self._orders[min(self._orders)]
            self._orders[epoch] = self._make(epoch)
        return self._orders[epoch]

    def _make(self, epoch: int) -> Any:
        source = self._source
        if self._alone:
            return self._make_alone(epoch)
        if type(source) is SequentialSampler:
            return range(len(source))
        if type(source) is RandomSampler and not source.replacement and source.num_samples == len(source.data_source):
            generator = torch.Generator().manual_seed(self._seed + epoch)
            return torch.randperm(len(source), generator=generator)
        if callable(getattr(source, "set_epoch", None)):
            source.set_epoch(epoch)
        with isolate_rng(include_cuda=False):
            _seed_generators(self._seed + epoch)
            return self._drawn()

    def _make_alone(self, epoch: int) -> list[Any]:
        if callable(getattr(self._source, "set_epoch", None)):
            self._source.set_epoch(epoch)
        generator = getattr(self._source, "generator", None)
        if self._begun.get("epoch") != epoch:
            self._begun = {"epoch": epoch, "random": random_state()}
            if generator is not None:
                self._begun["generator"] = generator.get_state()
            return self._drawn()
        with isolate_rng():
            set_random_state(self._begun["random"])
            if generator is not None:
                generator.set_state(self._begun["generator"].cpu())
            return self._drawn()

    def _drawn(self) -> list[Any]:
        """What the sampler yields, as far as its length goes: some go on for ever."""
        drawing = iter(self._source)
        drawn = list(itertools.islice(drawing, len(self._source)))
        # As when all of it is used up: what it does at its end it does now.
        next(drawing, None)
        return drawn


def _seed_generators(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


class LeasedSampler:
    """A sampler, or batch sampler, that yields the items which this rank is leased.

    Args:
        order: of the epochs' items.
        ranks: ranks that share them.

    Attributes:
        ranks: as given.
        stock: where leases come from; None before training has begun, when nothing can be leased.
        bound: whether one iteration is one epoch of the run, the one set by :meth:`set_epoch`. If not, an iteration
            takes what is being handed out.
        endless: an iteration goes on from one epoch to the next.

    """

    def __init__(self, order: EpochOrder, ranks: int) -> None:
        self.order = order
        self.stock: LeaseStock | None = None
        self.bound = True
        self.endless = False
        self.ranks = ranks
        self._epoch = 0
        self._epoch_is_new = False
        self._yielded = 0
        self._used = 0
        self._gaps: set[int] = set()

    @property
    def sampler(self) -> LeasedSampler:
        """Itself: Lightning looks for ``batch_sampler.sampler`` to tell it the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is in epoch ``epoch``."""
        if self.bound:
            self._epoch = epoch
        self._epoch_is_new = True

    @property
    def ready(self) -> bool:
        """Whether an iteration may begin: training has, and a bound sampler has not had this epoch yet."""
        return self.stock is not None and (self._epoch_is_new or not self.bound)

    def start(self, stock: LeaseStock) -> None:
        """Items are leased from ``stock`` from now on."""
        self.stock = stock
        self._yielded = self._used = 0
        self._gaps.clear()

    def use_one(self) -> None:
        """The loader's next item is being trained on."""
        # A loader that has run dry while others of its kind go on has none.
        if self.stock is not None and self._used < self._yielded:
            self._used += 1
            self.stock.mark_used(1)
            self._pass_gaps()

    def __iter__(self) -> Iterator[Any]:
        if not self.ready:
            return
        assert self.stock is not None
        self._epoch_is_new = False
        stock = self.stock
        # What an earlier iteration left untrained (a hook has skipped the rest of its epoch) is not trained any more.
        stock.mark_used(self._yielded - self._used)
        self._used = self._yielded
        self._gaps.clear()
        if self.bound:
            stock.discard(before=self._epoch)
        empty = True
        while True:
            found = stock.next(self._epoch, any_later=not self.bound)
            if found is None:
                if self.bound:
                    return
                self._epoch += 1
                if self.endless or empty:  # The others have used that epoch up.
                    continue
                return
            epoch, number = found
            empty = False
            if not self.bound:
                self._epoch = max(self._epoch, epoch)
            self._yielded += 1
            if self.order.has(epoch, number):
                yield self.order.item(epoch, number)
            else:
                # Nobody is trained on it, and it is used up when everything before it is.
                self._gaps.add(self._yielded - 1)
                self._pass_gaps()

    def _pass_gaps(self) -> None:
        assert self.stock is not None
        while self._used in self._gaps:
            self._gaps.remove(self._used)
            self._used += 1
            self.stock.mark_used(1)

    def __len__(self) -> int:
        """Items of an epoch for each rank if all were equally fast, as under DDP."""
        return -(-self.order.items // self.ranks)


class _LeasedLoader(DataLoader[Any]):
    """Put in front of the class of a copy of the user's loader."""

    leased: LeasedSampler

    def __iter__(self) -> Any:
        # Lightning iterates when it sets data up, before training has begun; no loading process is started for that.
        return super().__iter__() if self.leased.ready else iter(())


def leased_loader(loader: DataLoader[Any], ranks: int, seed: int, alone: bool = False) -> DataLoader[Any]:
    """A copy of the user's loader that yields what this rank is leased; everything else about it is the same.

    Args:
        loader: the user's; it is not changed.
        ranks: that share its items.
        seed: the same on all ranks.
        alone: there is one rank, and none can join: the order is the user's own.

    """
    leased = copy.copy(loader)
    sampler = LeasedSampler(EpochOrder(loader, seed, alone), ranks)
    own = type(loader)
    attributes = leased.__dict__  # DataLoader's own __setattr__ refuses a new sampler.
    attributes["sampler" if loader.batch_sampler is None else "batch_sampler"] = sampler
    attributes["_iterator"] = None
    attributes["leased"] = sampler
    leased.__class__ = type(own.__name__, (_LeasedLoader, own), {"__module__": own.__module__})
    return leased


def leased_again(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A copy of a loader made by :func:`leased_loader`, with leases of its own in the same order."""
    first = leased_sampler_of(loader)
    assert first is not None
    again = copy.copy(loader)
    sampler = LeasedSampler(first.order, first.ranks)
    attributes = again.__dict__  # As above.
    attributes["sampler" if loader.batch_sampler is None else "batch_sampler"] = sampler
    attributes["_iterator"] = None
    attributes["leased"] = sampler
    return again


def leased_sampler_of(loader: object) -> LeasedSampler | None:
    """The sampler of a loader made by :func:`leased_loader`; None for any other."""
    return loader.leased if isinstance(loader, _LeasedLoader) else None
