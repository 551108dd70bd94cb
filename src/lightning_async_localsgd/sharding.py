"""Who trains on which part of an epoch: leases of a common order, whose shards are drawn by the paper's equation 2.

An epoch of a training data loader is a sequence of items (batches, usually) in an order that all workers know. Workers
take small leases of it, so that each item is used once however unequal the workers are. The order is cut into shards,
one for each worker of the first cohort, and each lease comes from the shard that equation 2 draws.

An item is *free*, then *open* (leased, its training not handed in yet), then *consumed*: the push that holds what was
learnt from it has been applied. What a worker had open when it went is *parked*: its session may come back over a new
connection and go on with it. Parked items are handed out when nothing else is left, or when a newer session of the
worker shows that the old one won't come back; from then on a push that was trained on them is refused. So an item is in
one applied push at most, and in one exactly where workers go on until nothing is left.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.messages import Lease
from lightning_async_localsgd.objections import items_elsewhere, malformed
from lightning_async_localsgd.ranges import Ranges

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from lightning_async_localsgd.messages import LeaseRequest
    from lightning_async_localsgd.objections import Objection

_log = logging.getLogger(__name__)

MAX_STREAMS = 64
"""A server keeps no more streams than this. For a new one, that which was asked for least recently is retired, unless
items of it are open: data loaders that are made anew every few epochs come under a new name each time."""

_MAX_RETIRED = 4096
"""So many names of retired streams are remembered."""

MAX_NAME = 160
"""No stream's name is longer, in characters of JSON; the counts of all streams then fit in one message's text."""

MAX_OPEN = 1 << 16
"""No worker has more open parts of a stream than this (a part being adjacent items of one epoch)."""

LARGEST_LEASE = 64
"""No lease is larger, in units."""

_LEASES_LEFT = 4
"""A lease is what is left, divided by so many leases for each worker: the last ones are small, and nobody who is slow
holds much of what the others could take."""


def shards(items: int, unit: int, count: int) -> list[tuple[int, int]]:
    """Cuts an order into ``count`` contiguous parts, as equal as whole units allow."""
    units = -(-items // unit)
    cuts = [min(items, unit * (part * units // count)) for part in range(count + 1)]
    return list(itertools.pairwise(cuts))


def shard_weights(sizes: Sequence[int], taken: Sequence[int]) -> list[int]:
    """Equation 2, in whole numbers: how probable each shard is for the next lease.

    Proportional to ``max(|D_i| / sum |D| - n_i / sum n, 0)``; where all of them are 0, to ``|D_i|``. A shard that is
    used up is never the one that is under-represented, so it has no weight as long as another has items.

    Args:
        sizes: items of each shard.
        taken: items taken from each.

    """
    total, gone = sum(sizes), sum(taken)
    weights = [max(size * gone - count * total, 0) for size, count in zip(sizes, taken, strict=True)]
    return weights if any(weights) else list(sizes)


@dataclass
class _Account:
    """What one worker's present session has been granted of one stream.

    Items are counted in the order in which they were granted; the worker uses them in that order.
    """

    granted: int = 0
    settled: int = 0
    """So many are consumed, or were given back because the push that held them was refused."""
    void: int = 0
    """The items before this one went to others while the session was away."""
    open: deque[tuple[int, int, int]] = field(default_factory=deque)
    """Parts ``(epoch, start, stop)`` neither settled nor void."""
    answered: Lease | None = None
    """The last answer, for a request that comes again because it was lost."""

    def grant(self, epoch: int, start: int, stop: int) -> None:
        self.granted += stop - start
        if self.open and self.open[-1][0] == epoch and self.open[-1][2] == start:
            start = self.open.pop()[1]
        self.open.append((epoch, start, stop))

    def settle(self, count: int) -> list[tuple[int, int, int]]:
        """Removes the open ones among the first ``count`` items, and returns them."""
        left = count - max(self.settled, self.void)
        self.settled = count
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
        """Removes all open items, for others to take, and returns them."""
        parts = list(self.open)
        self.open.clear()
        self.void = self.granted
        return parts


class _Stream:
    """One data loader's items.

    Args:
        items: of one epoch.
        unit: leases are multiples of this.
        epoch: the one that is handed out.
        shard_count: parts that its order is cut into.
        draws: shards drawn in it so far.
        free: what is free, ``(epoch, start, stop)``.

    """

    def __init__(
        self, items: int, unit: int, epoch: int, shard_count: int, draws: int, free: Iterable[Sequence[int]]
    ) -> None:
        self.items = items
        self.unit = unit
        self.epoch = epoch
        self.shard_count = shard_count
        self.draws = draws
        self.accounts: dict[int, _Account] = {}
        # By epoch: the present one's, and what has come back of those before. No entry is empty.
        self._free: dict[int, Ranges] = {}
        # By epoch: the last items, which are the lead's.
        self._held: dict[int, tuple[int, int]] = {}
        self.give_back(free)

    @classmethod
    def begin(cls, items: int, unit: int, epoch: int, shard_count: int) -> _Stream:
        """With nothing handed out."""
        return cls(items, unit, epoch, shard_count, 0, [(epoch, 0, items)])

    def earliest(self, latest: int) -> int | None:
        """The first epoch that has free items, if it is not after ``latest``."""
        found = min(self._free, default=None)
        return None if found is None or found > latest else found

    def open_next(self, shard_count: int) -> None:
        """The next epoch is handed out, in ``shard_count`` shards."""
        self.epoch += 1
        self.shard_count = shard_count
        self.draws = 0
        self.give_back([(self.epoch, 0, self.items)])

    def hold(self) -> None:
        """Of the epoch that has just been opened, the last unit is not for everybody, unless it is the only one."""
        if self.items > self.unit:
            self._hold_last(self.epoch)

    def hold_what_is_left(self) -> None:
        """The same of all epochs that have been restored, of which a single unit may be left."""
        for epoch in list(self._free):
            self._hold_last(epoch)

    def _hold_last(self, epoch: int) -> None:
        free = self._free[epoch]
        first, stop = free.spans[-1]
        start = max(first, (stop - 1) // self.unit * self.unit)
        self._held[epoch] = free.take(stop - start, start, stop)
        if free.size == 0:
            del self._free[epoch]

    def let_go(self, least: int, most: int) -> None:
        """What is held of the epochs from ``least`` to ``most`` is free."""
        for epoch in [epoch for epoch in self._held if least <= epoch <= most]:
            self.give_back([(epoch, *self._held.pop(epoch))])

    def take(self, epoch: int, workers: int, draw: Callable[[int], int]) -> tuple[int, int]:
        """Takes a lease's items out of those that are free in ``epoch``."""
        free = self._free[epoch]
        window = (0, self.items)
        if epoch == self.epoch:
            parts = shards(self.items, self.unit, self.shard_count)
            sizes = [stop - start for start, stop in parts]
            taken = [stop - start - free.within(start, stop) for start, stop in parts]
            cumulated = list(itertools.accumulate(shard_weights(sizes, taken)))
            window = parts[bisect_right(cumulated, draw(cumulated[-1]))]
            self.draws += 1
        share = -(-free.size // (_LEASES_LEFT * workers * self.unit))
        found = free.take(self.unit * min(max(share, 1), LARGEST_LEASE), *window)
        if free.size == 0:
            del self._free[epoch]
        return found

    def give_back(self, parts: Iterable[Sequence[int]]) -> None:
        """The items are free again."""
        for epoch, start, stop in parts:
            if start < stop:
                self._free.setdefault(epoch, Ranges()).add(start, stop)

    @property
    def unconsumed(self) -> list[list[int]]:
        """What is free or open, as ``[epoch, start, stop]``."""
        epochs = {epoch: Ranges(free.spans) for epoch, free in self._free.items()}
        for epoch, span in self._held.items():
            epochs.setdefault(epoch, Ranges()).add(*span)
        for account in self.accounts.values():
            for epoch, start, stop in account.open:
                epochs.setdefault(epoch, Ranges()).add(start, stop)
        return [[epoch, *span] for epoch, ranges in sorted(epochs.items()) for span in ranges.spans]


class DataLeases:
    """The leases of all streams. Whoever calls has made sure that a request or push is of a session that may go on.

    Args:
        shard_count: k, shards that an epoch's order is cut into.
        seed: of the draws of shards.

    """

    def __init__(self, shard_count: int, seed: int = 0) -> None:
        self._shard_count = shard_count
        self._seed = seed
        # Least recently asked for first.
        self._streams: dict[str, _Stream] = {}
        # Those that nobody has asked for since they were restored.
        self._restored: set[str] = set()
        self._retired: deque[str] = deque(maxlen=_MAX_RETIRED)
        self._parked: set[int] = set()
        self._lead: int | None = None

    # ------------------------------------------------------------------ workers

    def lead(self, worker: int) -> None:
        """From now on every epoch keeps its last unit for ``worker``, until that worker has had a part of the epoch.

        Who validates and logs at the end of each epoch must train on something of it, however slow it is and however
        short the epoch. One that is a single unit is for everybody all the same: nobody else would ever train.
        """
        self._lead = worker

    def park(self, worker: int) -> None:
        """The worker is gone. Its session may come back; until then its items may go to others."""
        self._parked.add(worker)
        self._no_lead(worker)

    def unpark(self, worker: int) -> None:
        """The worker's session is back."""
        self._parked.discard(worker)

    def forget(self, worker: int) -> None:
        """The worker's session won't come back: what it had open is free."""
        self._parked.discard(worker)
        self._no_lead(worker)
        for stream in self._streams.values():
            account = stream.accounts.pop(worker, None)
            if account is not None:
                stream.give_back(account.open)

    # ------------------------------------------------------------------- leases

    def grant(self, request: LeaseRequest, workers: int) -> Lease:
        """Answers a request: with the next items, with none if the epoch is over, or with why it is refused.

        Items that came back from earlier epochs are granted first. Once nothing is left up to the worker's epoch, that
        epoch is over for it; a worker that is past the epoch which is handed out opens the next one.

        Args:
            request: of a session that may go on.
            workers: live workers, who share what is left.

        """
        stream, refused = self._stream_of(request)
        if stream is None:
            return Lease(request.number, request.epoch, 0, 0, refused)
        account = stream.accounts.setdefault(request.worker, _Account())
        if account.answered is not None and request.number <= account.answered.number:
            if request.number == account.answered.number:
                return account.answered
            return Lease(request.number, request.epoch, 0, 0, f"request {request.number} was answered long ago")
        if len(account.open) >= MAX_OPEN:
            return Lease(request.number, request.epoch, 0, 0, _hoards(request))
        epoch = self._epoch_for(stream, request)
        if epoch is None:
            account.answered = Lease(request.number, request.epoch, 0, 0, None)
        else:
            draw = partial(_draw, (self._seed, request.stream, stream.epoch, stream.draws))
            start, stop = stream.take(epoch, max(1, workers), draw)
            account.grant(epoch, start, stop)
            if request.worker == self._lead:
                stream.let_go(epoch, epoch)
            account.answered = Lease(request.number, epoch, start, stop, None)
        return account.answered

    def objection(self, worker: int, used: str) -> Objection | None:
        """Why a push that claims to be trained on ``used`` items must not be applied; None if it may be."""
        try:
            counts = _counts(used)
        except ValueError as error:
            return malformed(f"says {str(error)[:200]} about the items that it was trained on")
        for name, count in counts.items():
            account = self._account(worker, name)
            if account is None or not account.settled <= count <= account.granted:
                granted = 0 if account is None else account.granted
                return malformed(
                    f"claims {count} items of data stream {name[:MAX_NAME]!r}, of which it was leased {granted}"
                )
            if account.settled < min(count, account.void):
                return items_elsewhere("was trained on items that went to others while its worker was given up")
        return None

    def settle(self, worker: int, used: str, consumed: bool) -> None:
        """A push has been dealt with.

        Args:
            worker: whose it was.
            used: as in the push.
            consumed: whether its items count as trained on. If the push was refused they are free again, since what was
                learnt from them is lost.

        """
        try:
            counts = _counts(used)
        except ValueError:
            return  # The push was refused for that.
        for name, count in counts.items():
            account = self._account(worker, name)
            if account is not None and account.settled < count <= account.granted:
                parts = account.settle(count)
                if not consumed:
                    self._streams[name].give_back(parts)

    # -------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Where each stream is, in plain lists and numbers. What is not consumed counts as not handed out."""
        return {
            name: {
                "items": stream.items,
                "unit": stream.unit,
                "epoch": stream.epoch,
                "shards": stream.shard_count,
                "draws": stream.draws,
                "free": stream.unconsumed,
            }
            for name, stream in self._streams.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken; an epoch that was begun keeps its shards."""
        self._streams = {
            name: _Stream(s["items"], s["unit"], s["epoch"], s["shards"], s["draws"], s["free"])
            for name, s in state.items()
        }
        self._restored = set(self._streams)
        self._retired.clear()
        self._parked.clear()

    # ----------------------------------------------------------------- internal

    def _account(self, worker: int, name: str) -> _Account | None:
        stream = self._streams.get(name)
        return None if stream is None else stream.accounts.get(worker)

    def _stream_of(self, request: LeaseRequest) -> tuple[_Stream | None, str]:
        """The stream that is asked for, which the first request for it begins; or why it is refused."""
        name, shown = request.stream, repr(request.stream[:MAX_NAME])
        if request.items < 0 or request.unit < 1 or request.epoch < 0:
            return None, (
                f"data stream {shown} cannot have {request.items} items in units of {request.unit} in epoch "
                f"{request.epoch}"
            )
        stream = self._streams.pop(name, None)
        if stream is not None and (stream.items, stream.unit) != (request.items, request.unit):
            if name not in self._restored:
                self._streams[name] = stream
                return None, (
                    f"the data of worker {request.worker} has {request.items} items in units of {request.unit} (data "
                    f"stream {shown}), that of the others {stream.items} in units of {stream.unit}; every rank must "
                    "have the same data, batch size and sampler"
                )
            _log.warning(
                "data stream %s has %d items in units of %d, in the checkpoint it had %d in units of %d: the position "
                "in its epoch is of no use, epoch %d begins anew",
                shown, request.items, request.unit, stream.items, stream.unit, request.epoch,
            )  # fmt: skip
            stream = None
        if stream is None:
            refused = self._make_room_for(name)
            if refused is not None:
                return None, refused
            stream = _Stream.begin(request.items, request.unit, request.epoch, self._shards_of(request))
            self._hold_some(stream, request)
        elif name in self._restored and self._holds_for(request):
            stream.hold_what_is_left()
        self._streams[name] = stream
        self._restored.discard(name)
        return stream, ""

    def _make_room_for(self, name: str) -> str | None:
        """Retires a stream if there are too many; returns why ``name`` cannot be begun."""
        if len(json.dumps(name)) > MAX_NAME:
            return f"a data stream's name may have {MAX_NAME - 2} characters in JSON, not as many as {name[:20]!r}..."
        if name in self._retired:
            return f"data stream {name!r} was retired: more than {MAX_STREAMS} others have been asked for since"
        if len(self._streams) < MAX_STREAMS:
            return None
        for other, stream in self._streams.items():
            if not any(account.open for account in stream.accounts.values()):
                del self._streams[other]
                self._restored.discard(other)
                self._retired.append(other)
                return None
        return f"there is no room for data stream {name!r}: {MAX_STREAMS} data loaders at once are the most"

    def _epoch_for(self, stream: _Stream, request: LeaseRequest) -> int | None:
        """Of which epoch items are granted; None if there are none."""
        latest = max(request.epoch, stream.epoch) if request.any_later else request.epoch
        if stream.earliest(latest) is None:
            for worker in sorted(self._parked - {request.worker}):
                account = stream.accounts.get(worker)
                if account is not None and any(epoch <= latest for epoch, _, _ in account.open):
                    stream.give_back(account.give_up())
        if stream.earliest(latest) is None and request.epoch > stream.epoch:
            stream.open_next(self._shards_of(request))
            self._hold_some(stream, request)
        if request.worker == self._lead:
            # Of an epoch that it is past, or has nothing else of.
            stream.let_go(0, latest if stream.earliest(latest) is None else request.epoch - 1)
        return stream.earliest(latest)

    def _shards_of(self, request: LeaseRequest) -> int:
        return 1 if request.ordered else self._shard_count

    def _hold_some(self, stream: _Stream, request: LeaseRequest) -> None:
        if self._holds_for(request):
            stream.hold()

    def _holds_for(self, request: LeaseRequest) -> bool:
        # A stream whose epochs are not the run's owes nobody a part of each.
        return self._lead is not None and not request.any_later

    def _no_lead(self, worker: int) -> None:
        if worker == self._lead:
            self._lead = None
            for stream in self._streams.values():
                stream.let_go(0, stream.epoch)


def _draw(place: tuple[int | str, ...], bound: int) -> int:
    """A random number below ``bound``, which depends on the place in the run only: no generator has to be saved."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "big") % bound


def _counts(used: str) -> dict[str, int]:
    """The items per stream in a push's ``used``.

    Raises:
        ValueError: it is something else.

    """
    if not used:
        return {}
    try:
        counts = json.loads(used)
    except RecursionError:
        counts = None
    if not isinstance(counts, dict) or not all(type(count) is int for count in counts.values()):
        raise ValueError(f"{used[:40]!r}")
    return counts


def _hoards(request: LeaseRequest) -> str:
    return (
        f"worker {request.worker} has {MAX_OPEN} parts of data stream {request.stream!r} and has not handed in what it "
        "learnt from them; take fewer local_steps"
    )
