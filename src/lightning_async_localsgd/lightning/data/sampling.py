"""Which samples a rank trains on: a training data loader whose items are leased from the server.

In one epoch of all ranks together, items (usually batches) have one order, which depends only on the seed and the
epoch. Whenever a rank needs items, it leases the next few in this order. Fast ranks lease more items than slow ones,
and each item is still used once per epoch.
"""

from __future__ import annotations

import copy
import itertools
import random
import sys
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_async_localsgd.lightning.data.rng_state import random_state, set_random_state
from lightning_async_localsgd.lightning.mixed_in import mixed_in

if TYPE_CHECKING:
    from lightning_async_localsgd.runtime.leases import LeaseBuffer

_KEPT_ORDERS = 2
"""Number of epochs whose orders are kept: the current one, and an earlier one whose items may be given back."""


def can_be_leased(loader: object) -> bool:
    """Return whether the items of a data loader can be leased by number.

    Iterable datasets, samplers without a length, samplers that split the data among ranks themselves, and loaders with
    a state of their own (``state_dict``) cannot.
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


def why_samples_cannot_be_leased(loader: object) -> str | None:
    """Return why the single samples of a data loader cannot be leased, so that workers make batches of them.

    Returns:
        A phrase about the loader; None if they can.

    """
    if not isinstance(loader, DataLoader):
        return f"is a {type(loader).__name__}, not a DataLoader"
    if isinstance(loader.dataset, IterableDataset):
        return "has an IterableDataset, whose samples have no numbers"
    if loader.batch_sampler is None:
        return "has batch_size=None, so that its items are no batches of samples"
    if type(loader.batch_sampler) is not BatchSampler:
        return f"has batches made by a {type(loader.batch_sampler).__name__}, whose sizes cannot be changed"
    return None if can_be_leased(loader) else "has a sampler whose samples cannot be leased by number"


class EpochOrder:
    """The items of a data loader's epochs by their numbers.

    With several workers, a shuffled loader has a random permutation per epoch. The user's own samplers and batch
    samplers are iterated with generators that are seeded in the same way on all ranks.

    A single worker keeps the order of the user's sampler, as on a single device. The states of the generators before
    this order was drawn are remembered, so that a resumed run can draw the order again.

    A sampler may yield fewer items than its ``len()``, for example because it filters. The last items of an epoch then
    do not exist, see :meth:`has`. Items beyond the ``len()`` are not used, as in Lightning.

    Args:
        loader: the user's loader, see :func:`can_be_leased`.
        seed: seed of the permutations, the same on all ranks.
        single_worker: whether the run has one worker, and no other can join.
        by_samples: whether items are samples, of which workers make batches of their own sizes, see
            :func:`why_samples_cannot_be_leased`. With ``drop_last``, an epoch has those of whole batches.

    Attributes:
        items: number of items in an epoch: batches, or single samples if ``batch_size`` is None or ``by_samples``.
        batches: number of the loader's batches in an epoch.
        batch_size: size of the loader's batches; None if a batch sampler of the user makes them.
        drop_last: whether incomplete batches are dropped.
        by_samples: see above.
        shuffled: whether the order is a random permutation. Any other order may have a meaning.

    """

    def __init__(self, loader: DataLoader[Any], seed: int, single_worker: bool, by_samples: bool = False) -> None:
        self._seed = seed
        self._single_worker = single_worker
        self._drawn_from: dict[str, Any] = {}
        self._orders: dict[int, Any] = {}
        self.batch_size: int | None = None
        self.drop_last = False
        self.by_samples = by_samples
        batch_sampler = loader.batch_sampler
        if batch_sampler is None:
            self._source: Any = loader.sampler
            self.items = len(cast("Any", self._source))
        elif type(batch_sampler) is BatchSampler:
            self._source = loader.sampler
            self.batch_size = batch_sampler.batch_size
            self.drop_last = batch_sampler.drop_last
            samples, size = len(cast("Any", self._source)), batch_sampler.batch_size
            self.items = samples // size if batch_sampler.drop_last else -(-samples // size)
        else:
            self._source = batch_sampler
            self.items = len(cast("Any", batch_sampler))
        self.batches = self.items
        if by_samples:
            assert self.batch_size is not None
            self.items = min(samples, self.batches * self.batch_size)
        self.shuffled = type(self._source) is RandomSampler

    def has(self, epoch: int, number: int) -> bool:
        """Return whether an item exists, because the sampler has yielded that many."""
        length = len(self._order(epoch))
        if self.batch_size is None or self.by_samples:
            return number < length
        return length - number * self.batch_size >= (self.batch_size if self.drop_last else 1)

    def item(self, epoch: int, number: int) -> Any:
        """Return what a sampler would yield: the indices of a batch, or one index."""
        order = self._order(epoch)
        if self.batch_size is None or self.by_samples:
            item = order[number]
            return item.item() if isinstance(item, torch.Tensor) else item
        batch = order[number * self.batch_size : (number + 1) * self.batch_size]
        return batch.tolist() if isinstance(batch, torch.Tensor) else list(batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the states from which a single worker's latest order was drawn; empty with several workers."""
        return dict(self._drawn_from)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Draw the order of the same epoch from the same states again."""
        self._drawn_from = dict(state)

    def _order(self, epoch: int) -> Any:
        if epoch not in self._orders:
            while len(self._orders) >= _KEPT_ORDERS:
                del self._orders[min(self._orders)]
            self._orders[epoch] = self._make_order(epoch)
        return self._orders[epoch]

    def _make_order(self, epoch: int) -> Any:
        source = self._source
        if self._single_worker:
            return self._make_users_order(epoch)
        if type(source) is SequentialSampler:
            return range(len(source))
        if type(source) is RandomSampler and not source.replacement and source.num_samples == len(source.data_source):
            generator = torch.Generator().manual_seed(self._seed + epoch)
            return torch.randperm(len(source), generator=generator, device="cpu")
        if callable(getattr(source, "set_epoch", None)):
            source.set_epoch(epoch)
        with isolate_rng(include_cuda=False):
            _seed_generators(self._seed + epoch)
            return self._draw()

    def _make_users_order(self, epoch: int) -> list[Any]:
        """Draw the order that the user's sampler has on a single device."""
        if callable(getattr(self._source, "set_epoch", None)):
            self._source.set_epoch(epoch)
        generator = getattr(self._source, "generator", None)
        if self._drawn_from.get("epoch") != epoch:
            self._drawn_from = {"epoch": epoch, "random": random_state()}
            if generator is not None:
                self._drawn_from["generator"] = generator.get_state()
            return self._draw()
        with isolate_rng():
            set_random_state(self._drawn_from["random"])
            if generator is not None:
                generator.set_state(self._drawn_from["generator"].cpu())
            return self._draw()

    def _draw(self) -> list[Any]:
        """Return what the sampler yields, up to its length, because some samplers never end."""
        iterator = iter(self._source)
        drawn = list(itertools.islice(iterator, len(self._source)))
        # Let the sampler do what it does at its end, as if it were iterated completely.
        next(iterator, None)
        return drawn


def _seed_generators(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


class _Taken(NamedTuple):
    """Leased items that were taken for one item of the sampler, and are not used yet.

    Attributes:
        epoch: epoch of the first of them.
        position: position of the first of them in its epoch.
        items: number of leased items: 1, or those of a batch.
        samples: number of the samples among them that exist.
        yielded: whether the sampler has yielded them. Otherwise they count as used when all items before them are.

    """

    epoch: int
    position: int
    items: int
    samples: int
    yielded: bool


class LeasedSampler:
    """A sampler, or batch sampler, that yields the items that this rank has leased.

    If samples are leased, it makes batches of them. The last batch of an epoch may be incomplete. With ``drop_last`` it
    is dropped, and its samples count as used.

    Args:
        order: the items of the epochs.
        ranks: number of ranks that share the items.

    Attributes:
        ranks: number of ranks that share the items.
        leases: buffer of leased items; None before and after training, when nothing can be leased.
        bound_to_epoch: whether one iteration is one epoch of the run, which :meth:`set_epoch` sets. Otherwise an
            iteration takes items of the epoch that the server is leasing.
        endless: whether an iteration continues from one epoch to the next.
        batch_size: size of the batches, if samples are leased.

    """

    def __init__(self, order: EpochOrder, ranks: int) -> None:
        self.order = order
        self.leases: LeaseBuffer | None = None
        self.bound_to_epoch = True
        self.endless = False
        self.ranks = ranks
        self._epoch = 0
        self.batch_size = order.batch_size
        self._epoch_is_new = False
        self._taken: deque[_Taken] = deque()

    @property
    def sampler(self) -> LeasedSampler:
        """The sampler itself. Lightning calls ``batch_sampler.sampler.set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        if self.bound_to_epoch:
            self._epoch = epoch
        self._epoch_is_new = True

    @property
    def can_iterate(self) -> bool:
        """Whether training has begun and, if the sampler is bound to epochs, this epoch was not iterated yet."""
        return self.leases is not None and (self._epoch_is_new or not self.bound_to_epoch)

    def start(self, leases: LeaseBuffer) -> None:
        """Yield items from ``leases`` from now on."""
        self.leases = leases
        self._taken.clear()

    def position_in(self, epoch: int) -> int | None:
        """Return the position of the next item to train on in the order of its epoch; None if it is of another one."""
        return self._taken[0].position if self._taken and self._taken[0].epoch == epoch else None

    @property
    def items_of_next(self) -> int:
        """Number of leased items in the next item to train on."""
        return self._taken[0].items if self._taken else 0

    def mark_used(self) -> int:
        """Count the next yielded item as used. The rank is about to train on it.

        Returns:
            The number of its samples, if samples are leased.

        """
        # If several loaders are combined, one may be exhausted while others continue.
        if self.leases is None or not self._taken:
            return 0
        samples = self._taken[0].samples
        self._mark_used()
        self._skip_missing()
        return samples

    def __iter__(self) -> Iterator[Any]:
        if not self.can_iterate:
            return
        assert self.leases is not None
        self._epoch_is_new = False
        leases = self.leases
        # If a hook has skipped the rest of an earlier epoch, the remaining yielded items will not be trained on.
        leases.mark_used(sum(taken.items for taken in self._taken))
        self._taken.clear()
        if self.bound_to_epoch:
            leases.discard(before=self._epoch)
        is_empty = True
        while True:
            item = self._take(leases)
            if item is None:
                if self.bound_to_epoch:
                    return
                self._epoch += 1
                if self.endless or is_empty:  # Other ranks have used up the epoch.
                    continue
                return
            is_empty = False
            if self._taken[-1].yielded:
                yield item
            else:
                self._skip_missing()

    def _take(self, leases: LeaseBuffer) -> Any:
        """Take the leased items of the next item to yield. Return it, or None if the epoch is over."""
        by_samples = self.order.by_samples
        wanted = self.batch_size if by_samples and self.batch_size is not None else 1
        found: list[Any] = []
        first, count = None, 0
        while len(found) < wanted:
            leased = leases.next(self._epoch, allow_later_epoch=not self.bound_to_epoch)
            if leased is None:
                break
            first, count = first or leased, count + 1
            if not self.bound_to_epoch:
                self._epoch = max(self._epoch, leased[0])
            if self.order.has(*leased):
                found.append(self.order.item(*leased))
            if not by_samples:
                break
        if first is None:
            return None
        is_whole = len(found) == wanted or (bool(found) and not self.order.drop_last)
        self._taken.append(_Taken(*first, count, len(found), is_whole))
        return found if by_samples or not found else found[0]

    def _skip_missing(self) -> None:
        """Count items that are not yielded as used, if they are next."""
        while self._taken and not self._taken[0].yielded:
            self._mark_used()

    def _mark_used(self) -> None:
        assert self.leases is not None
        self.leases.mark_used(self._taken.popleft().items)

    def __len__(self) -> int:
        """Return the number of items in an epoch for each rank if all were equally fast, as under DDP.

        If samples are leased, this is the number of the loader's own batches.
        """
        return -(-self.order.batches // self.ranks)


class _LeasedLoader(DataLoader[Any]):
    """Mixin for a copy of the user's loader."""

    leased: LeasedSampler

    def __iter__(self) -> Any:
        # Lightning also iterates when it sets data up, before training. No worker process is started for that.
        return super().__iter__() if self.leased.can_iterate else iter(())


def leased_loader(
    loader: DataLoader[Any], ranks: int, seed: int, single_worker: bool = False, by_samples: bool = False
) -> DataLoader[Any]:
    """Return a copy of the user's loader that yields leased items, and is otherwise the same.

    Args:
        loader: the user's loader; not changed.
        ranks: number of ranks that share its items.
        seed: seed of the permutations, the same on all ranks.
        single_worker: whether the run has one worker, and no other can join. The order is then that of the user's
            sampler.
        by_samples: whether single samples are leased, see :class:`EpochOrder`.

    """
    leased = copy.copy(loader)
    _set_sampler(leased, LeasedSampler(EpochOrder(loader, seed, single_worker, by_samples), ranks))
    mixed_in(leased, _LeasedLoader)
    return leased


def copy_with_own_leases(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a copy of a leased loader that leases items independently, in the same order."""
    sampler = leased_sampler_of(loader)
    assert sampler is not None
    copied = copy.copy(loader)
    _set_sampler(copied, LeasedSampler(sampler.order, sampler.ranks))
    return copied


def leased_sampler_of(loader: object) -> LeasedSampler | None:
    """Return the sampler of a leased loader, or None for any other loader."""
    return loader.leased if isinstance(loader, _LeasedLoader) else None


def _set_sampler(loader: DataLoader[Any], sampler: LeasedSampler) -> None:
    attributes = loader.__dict__  # DataLoader's own __setattr__ refuses a new sampler.
    attributes["sampler" if loader.batch_sampler is None else "batch_sampler"] = sampler
    attributes["_iterator"] = None
    attributes["leased"] = sampler
