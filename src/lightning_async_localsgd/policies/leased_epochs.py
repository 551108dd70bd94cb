"""The epochs of one data stream: which of their items are free, reserved for the lead, or leased."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_async_localsgd.policies.ranges import Ranges
from lightning_async_localsgd.protocol.messages import Lease

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

LARGEST_LEASE = 64
"""Largest lease, in units."""

_LEASES_PER_WORKER = 4
"""Number of leases per worker that the free items are divided into. The last leases are small, so that a slow worker
does not hold many items that others could train on."""


def shards(items: int, unit: int, count: int) -> list[tuple[int, int]]:
    """Return ``count`` contiguous parts ``(start, stop)`` of an order, as equal as whole units allow."""
    units = -(-items // unit)
    cuts = [min(items, unit * (part * units // count)) for part in range(count + 1)]
    return list(itertools.pairwise(cuts))


def shard_weights(sizes: Sequence[int], leased: Sequence[int]) -> list[int]:
    """Return weights for the draw of the next lease's shard: equation 2 of arXiv 2401.09135, in whole numbers.

    Weights are proportional to ``max(|D_i| / sum |D| - n_i / sum n, 0)``, or to ``|D_i|`` if all of these are 0. A
    shard without free items is never under-represented, so its weight is 0 as long as another shard has items.

    Args:
        sizes: number of items of each shard.
        leased: number of leased items of each shard.

    """
    total, total_leased = sum(sizes), sum(leased)
    weights = [max(size * total_leased - count * total, 0) for size, count in zip(sizes, leased, strict=True)]
    return weights if any(weights) else list(sizes)


@dataclass
class Account:
    """Items of one stream that one session of a worker was granted.

    Items are counted in the order in which they were granted. The worker uses them in that order.
    """

    granted: int = 0
    pushed: int = 0
    """Number of items that were consumed, or became free again because their push was refused."""
    void: int = 0
    """Number of items that were pushed, or went to other workers while the session was away."""
    open: deque[tuple[int, int, int]] = field(default_factory=deque)
    """Open parts ``(epoch, start, stop)``, neither pushed nor void."""
    answered: Lease | None = None
    """The last answer, for a request that is sent again."""

    def grant(self, epoch: int, start: int, stop: int) -> None:
        """Add a lease."""
        self.granted += stop - start
        if self.open and self.open[-1][0] == epoch and self.open[-1][2] == start:
            start = self.open.pop()[1]
        self.open.append((epoch, start, stop))

    def consume(self, count: int) -> list[tuple[int, int, int]]:
        """Remove and return the open items among the first ``count`` granted ones."""
        left = count - max(self.pushed, self.void)
        self.pushed = count
        parts = []
        while left > 0:
            epoch, start, stop = self.open.popleft()
            cut = min(stop, start + left)
            parts.append((epoch, start, cut))
            if cut < stop:
                self.open.appendleft((epoch, cut, stop))
            left -= cut - start
        return parts

    def give_up(self) -> list[tuple[int, int, int]]:
        """Remove and return all open items."""
        parts = list(self.open)
        self.open.clear()
        self.void = self.granted
        return parts


class LeasedEpochs:
    """Free and open items of one stream, by epoch.

    Args:
        items: number of items of an epoch.
        unit: leases are multiples of this many items.
        epoch: the epoch that is leased.
        shard_count: number of shards of that epoch.
        draws: number of draws of a shard in that epoch so far.
        free: free parts ``(epoch, start, stop)``.

    """

    def __init__(
        self, items: int, unit: int, epoch: int, shard_count: int, draws: int, free: Iterable[Sequence[int]]
    ) -> None:
        self.items = items
        self.unit = unit
        self.epoch = epoch
        self.shard_count = shard_count
        self.draws = draws
        self.accounts: dict[int, Account] = {}
        # By epoch: items of the leased epoch, and items of earlier ones that became free again. No entry is empty.
        self._free: dict[int, Ranges] = {}
        # By epoch: the last items, which are reserved for the lead.
        self._reserved: dict[int, tuple[int, int]] = {}
        self.give_back(free)

    @classmethod
    def begin(cls, items: int, unit: int, epoch: int, shard_count: int) -> LeasedEpochs:
        """Return a stream of which nothing is leased."""
        return cls(items, unit, epoch, shard_count, 0, [(epoch, 0, items)])

    def earliest(self, latest: int) -> int | None:
        """Return the first epoch with free items, if it is not after ``latest``."""
        epoch = min(self._free, default=None)
        return None if epoch is None or epoch > latest else epoch

    def open_next(self, shard_count: int) -> None:
        """Start to lease the next epoch, in ``shard_count`` shards."""
        self.epoch += 1
        self.shard_count = shard_count
        self.draws = 0
        self.give_back([(self.epoch, 0, self.items)])

    def reserve(self, units: int) -> None:
        """Reserve the last units of the epoch that was just opened: at most half of them, but at least one of two."""
        all_units = -(-self.items // self.unit)
        if all_units > 1:
            self._reserve_last(self.epoch, min(units, all_units // 2))

    def reserve_restored(self, units: int) -> None:
        """Reserve the last units of all restored epochs, even if no others are left."""
        for epoch in list(self._free):
            self._reserve_last(epoch, units)

    def _reserve_last(self, epoch: int, units: int) -> None:
        free = self._free[epoch]
        first, stop = free.spans[-1]
        start = max(first, ((stop - 1) // self.unit + 1 - units) * self.unit)
        self._reserved[epoch] = free.pop(stop - start, start, stop)
        if free.size == 0:
            del self._free[epoch]

    def take_reserved(self, epoch: int) -> tuple[int, int] | None:
        """Remove and return the reserved items of an epoch; None if there are none."""
        return self._reserved.pop(epoch, None)

    def free_reserved(self, first: int, last: int) -> None:
        """Free the reserved items of the epochs ``first`` to ``last``."""
        for epoch in [epoch for epoch in self._reserved if first <= epoch <= last]:
            self.give_back([(epoch, *self._reserved.pop(epoch))])

    def allocate(self, epoch: int, workers: int, draw: Callable[[int], int], unit: int = 1) -> tuple[int, int]:
        """Remove the items of a lease from the free items of ``epoch``, and return them.

        Args:
            epoch: the epoch; some of its items are free.
            workers: number of workers that share the free items.
            draw: returns a random number below its argument.
            unit: the lease is a multiple of this many items, unless fewer adjacent ones are free.

        """
        free = self._free[epoch]
        window = (0, self.items)
        if epoch == self.epoch:
            parts = shards(self.items, self.unit, self.shard_count)
            sizes = [stop - start for start, stop in parts]
            leased = [stop - start - free.within(start, stop) for start, stop in parts]
            cumulated = list(itertools.accumulate(shard_weights(sizes, leased)))
            window = parts[bisect_right(cumulated, draw(cumulated[-1]))]
            self.draws += 1
        share = -(-free.size // (_LEASES_PER_WORKER * workers * unit))
        items = free.pop(unit * min(max(share, 1), LARGEST_LEASE), *window)
        if free.size == 0:
            del self._free[epoch]
        return items

    def give_back(self, parts: Iterable[Sequence[int]]) -> None:
        """Make items free."""
        for epoch, start, stop in parts:
            if start < stop:
                self._free.setdefault(epoch, Ranges()).add(start, stop)

    @property
    def unconsumed(self) -> list[list[int]]:
        """All items that are free, reserved or open, as ``[epoch, start, stop]``."""
        epochs = {epoch: Ranges(free.spans) for epoch, free in self._free.items()}
        for epoch, span in self._reserved.items():
            epochs.setdefault(epoch, Ranges()).add(*span)
        for account in self.accounts.values():
            for epoch, start, stop in account.open:
                epochs.setdefault(epoch, Ranges()).add(start, stop)
        return [[epoch, *span] for epoch, ranges in sorted(epochs.items()) for span in ranges.spans]
