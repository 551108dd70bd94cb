"""Leases of training data: which worker trains on which part of an epoch (arXiv 2401.09135, equation 2).

An epoch of a training data loader is a sequence of items (usually batches) in an order that all workers know. Workers
get small leases of it, so that each item is used once, however unequal the workers are. The order is cut into shards,
one for each initial worker, and each lease comes from the shard that equation 2 draws.

An item is *free*, then *open* (leased, and not part of a push yet), then *consumed*: the push that was trained on it
has been merged. When a worker leaves, its open items are *parked*, because its session may come back and continue with
them. Parked items become free when no other items are left, or when a newer session of the worker joins. From then on,
a push that was trained on them is refused. So an item is part of at most one merged push, and of exactly one if workers
continue until no items are left.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.policies.leased_epochs import Account, LeasedEpochs
from lightning_async_localsgd.protocol.messages import Lease
from lightning_async_localsgd.protocol.rejections import items_not_held, malformed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning_async_localsgd.protocol.messages import LeaseRequest
    from lightning_async_localsgd.protocol.rejections import Rejection

_log = logging.getLogger(__name__)

MAX_STREAMS = 64
"""Largest number of streams. A new stream replaces the least recently requested one without open items: a data loader
that is created again every few epochs has a new name each time."""

_MAX_REPLACED = 4096
"""Number of names of replaced streams that are remembered."""

MAX_NAME = 160
"""Longest name of a stream, in characters of JSON. So the counts of all streams fit in one message's text."""

MAX_OPEN = 1 << 16
"""Largest number of open parts of a stream for one worker. A part is a range of adjacent items of one epoch."""


class DataLeases:
    """The leases of all streams. The caller must have checked the sessions of requests and pushes.

    Args:
        shard_count: number of shards of an epoch (k in equation 2).
        seed: seed of the draws of shards.
        reserved: number of units of each epoch that are reserved for the lead, see :meth:`lead`.
        lead_unit: items in a unit of the lead, if workers have units of their own, see :attr:`.LeaseRequest.own_unit`.

    """

    def __init__(self, shard_count: int, seed: int = 0, reserved: int = 1, lead_unit: int = 1) -> None:
        self._shard_count = shard_count
        self._seed = seed
        self._reserved_units = reserved
        self._lead_unit = lead_unit
        # The least recently requested stream comes first.
        self._streams: dict[str, LeasedEpochs] = {}
        # Streams that were not requested since they were restored.
        self._restored: set[str] = set()
        self._replaced: deque[str] = deque(maxlen=_MAX_REPLACED)
        self._parked: set[int] = set()
        self._lead: int | None = None

    # ------------------------------------------------------------------ workers

    def lead(self, worker: int) -> None:
        """Reserve the last units of every epoch for ``worker``.

        The worker that validates and logs at the end of each epoch must train on a part of each epoch, however slow the
        worker and however short the epoch. A single unit is reserved until the worker has a part of the epoch. Several
        units are reserved until no others of the epoch are left: the worker validates within the epoch as well, after
        one of its own steps each time. At most half of an epoch is reserved, and nothing of an epoch of a single unit,
        because no other worker would ever train.
        """
        self._lead = worker

    def park(self, worker: int) -> None:
        """Note that a worker left. Its session may come back, but its items may go to other workers before."""
        self._parked.add(worker)
        self._end_lead(worker)

    def unpark(self, worker: int) -> None:
        """Note that a worker's session came back."""
        self._parked.discard(worker)

    def forget(self, worker: int) -> None:
        """Make the open items of a worker free, because its session cannot come back."""
        self._parked.discard(worker)
        self._end_lead(worker)
        for stream in self._streams.values():
            account = stream.accounts.pop(worker, None)
            if account is not None:
                stream.give_back(account.open)

    # ------------------------------------------------------------------- leases

    def grant(self, request: LeaseRequest, workers: int) -> Lease:
        """Answer a request: with the next items, with no items if the epoch is over, or with why it is refused.

        Free items of earlier epochs are granted first. If no items are left up to the worker's epoch, that epoch is
        over for the worker. A worker that is past the leased epoch opens the next one.

        Args:
            request: the request.
            workers: number of live workers, which share the free items.

        """
        stream, refused = self._stream_of(request)
        if stream is None:
            return Lease(request.number, request.epoch, 0, 0, refused)
        account = stream.accounts.setdefault(request.worker, Account())
        if account.answered is not None and request.number <= account.answered.number:
            if request.number == account.answered.number:
                return account.answered
            return Lease(request.number, request.epoch, 0, 0, f"request {request.number} is older than the last one")
        if len(account.open) >= MAX_OPEN:
            return Lease(request.number, request.epoch, 0, 0, _too_many_open(request))
        items = self._allocate(stream, request, workers)
        if items is None:
            account.answered = Lease(request.number, request.epoch, 0, 0, None)
        else:
            account.grant(*items)
            account.answered = Lease(request.number, *items, None)
        return account.answered

    def rejection(self, worker: int, used: str) -> Rejection | None:
        """Return why a push that was trained on ``used`` items must not be merged; None if it may be."""
        try:
            counts = _counts(used)
        except ValueError as error:
            return malformed(f"names the items that it was trained on as {str(error)[:200]}")
        for name, count in counts.items():
            account = self._account(worker, name)
            if account is None or not account.pushed <= count <= account.granted:
                granted = 0 if account is None else account.granted
                return malformed(f"claims {count} items of data stream {name[:MAX_NAME]!r}, but was leased {granted}")
            if account.pushed < min(count, account.void):
                return items_not_held(
                    "was trained on items that were leased to other workers after its worker was lost"
                )
        return None

    def complete_round(self, worker: int, used: str, consumed: bool) -> None:
        """Record the items of a push that was merged or refused.

        Args:
            worker: the worker's number.
            used: :attr:`.Push.items_used`.
            consumed: whether the items count as trained on. If not, they become free.

        """
        try:
            counts = _counts(used)
        except ValueError:
            return  # The push was refused for this reason.
        for name, count in counts.items():
            account = self._account(worker, name)
            if account is not None and account.pushed < count <= account.granted:
                parts = account.consume(count)
                if not consumed:
                    self._streams[name].give_back(parts)

    # -------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Return the position of each stream, as plain lists and numbers. Open items count as free."""
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
        """Restore ``state``. An epoch that was partly leased keeps its shards."""
        self._streams = {
            name: LeasedEpochs(s["items"], s["unit"], s["epoch"], s["shards"], s["draws"], s["free"])
            for name, s in state.items()
        }
        self._restored = set(self._streams)
        self._replaced.clear()
        self._parked.clear()

    # ----------------------------------------------------------------- internal

    def _account(self, worker: int, name: str) -> Account | None:
        stream = self._streams.get(name)
        return None if stream is None else stream.accounts.get(worker)

    def _stream_of(self, request: LeaseRequest) -> tuple[LeasedEpochs | None, str]:
        """Return the requested stream, which its first request creates, or why the request is refused."""
        name, shown = request.stream, repr(request.stream[:MAX_NAME])
        if request.items < 0 or request.unit < 1 or request.epoch < 0:
            return None, (
                f"data stream {shown} cannot have {request.items} items in units of {request.unit} in epoch "
                f"{request.epoch}"
            )
        stream = self._streams.pop(name, None)
        unit = 1 if request.own_unit else request.unit
        if stream is not None and (stream.items, stream.unit) != (request.items, unit):
            if name not in self._restored:
                self._streams[name] = stream
                return None, (
                    f"the data of worker {request.worker} has {request.items} items in units of {unit} (data "
                    f"stream {shown}), but the data of the others has {stream.items} in units of {stream.unit}; every "
                    "rank must have the same data, batch size and sampler"
                )
            _log.warning(
                "data stream %s has %d items in units of %d, but in the checkpoint it had %d in units of %d: its "
                "position in the epoch cannot be restored, so epoch %d starts from its beginning",
                shown, request.items, unit, stream.items, stream.unit, request.epoch,
            )  # fmt: skip
            stream = None
        if stream is None:
            refused = self._make_room_for(name)
            if refused is not None:
                return None, refused
            stream = LeasedEpochs.begin(request.items, unit, request.epoch, self._shards_of(request))
            self._reserve_for_lead(stream, request)
        elif name in self._restored and self._reserves_for(request):
            stream.reserve_restored(self._reserved_units * self._lead_unit)
        self._streams[name] = stream
        self._restored.discard(name)
        return stream, ""

    def _make_room_for(self, name: str) -> str | None:
        """Replace a stream if there are too many, or return why the stream ``name`` cannot be created."""
        if len(json.dumps(name)) > MAX_NAME:
            return f"the name of data stream {name[:20]!r}... is longer than {MAX_NAME - 2} characters in JSON"
        if name in self._replaced:
            return f"data stream {name!r} was replaced: more than {MAX_STREAMS} others have been requested since"
        if len(self._streams) < MAX_STREAMS:
            return None
        for other, stream in self._streams.items():
            if not any(account.open for account in stream.accounts.values()):
                del self._streams[other]
                self._restored.discard(other)
                self._replaced.append(other)
                return None
        return f"there is no room for data stream {name!r}: at most {MAX_STREAMS} data loaders can be used at once"

    def _allocate(self, stream: LeasedEpochs, request: LeaseRequest, workers: int) -> tuple[int, int, int] | None:
        """Return the items ``(epoch, start, stop)`` that are granted; None if there are none."""
        is_lead = request.worker == self._lead
        if is_lead:
            stream.free_reserved(0, request.epoch - 1)
        epoch = self._epoch_for(stream, request)
        if epoch is None:
            # The lead gets the reserved items of its epoch if no others are left.
            reserved = stream.take_reserved(request.epoch) if is_lead else None
            return None if reserved is None else (request.epoch, *reserved)
        draw = partial(_draw, (self._seed, request.stream, stream.epoch, stream.draws))
        items = stream.allocate(epoch, max(1, workers), draw, request.unit)
        if is_lead and self._reserved_units == 1:
            stream.free_reserved(epoch, epoch)
        return (epoch, *items)

    def _epoch_for(self, stream: LeasedEpochs, request: LeaseRequest) -> int | None:
        """Return the epoch whose items are granted; None if no items are free."""
        latest = max(request.epoch, stream.epoch) if request.allow_later_epoch else request.epoch
        if stream.earliest(latest) is None:
            for worker in sorted(self._parked - {request.worker}):
                account = stream.accounts.get(worker)
                if account is not None and any(epoch <= latest for epoch, _, _ in account.open):
                    stream.give_back(account.give_up())
        if stream.earliest(latest) is None and request.epoch > stream.epoch:
            stream.open_next(self._shards_of(request))
            self._reserve_for_lead(stream, request)
        return stream.earliest(latest)

    def _shards_of(self, request: LeaseRequest) -> int:
        return 1 if request.ordered else self._shard_count

    def _reserve_for_lead(self, stream: LeasedEpochs, request: LeaseRequest) -> None:
        if self._reserves_for(request):
            stream.reserve(self._reserved_units * self._lead_unit)

    def _reserves_for(self, request: LeaseRequest) -> bool:
        # If the stream's epochs are not the run's, the lead needs no part of each.
        return self._lead is not None and not request.allow_later_epoch

    def _end_lead(self, worker: int) -> None:
        if worker == self._lead:
            self._lead = None
            for stream in self._streams.values():
                stream.free_reserved(0, stream.epoch)


def _draw(place: tuple[int | str, ...], bound: int) -> int:
    """Return a random number below ``bound`` that depends only on ``place``, so that no generator must be saved."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "big") % bound


def _counts(used: str) -> dict[str, int]:
    """Return the number of used items by stream.

    Raises:
        ValueError: ``used`` is not valid.

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


def _too_many_open(request: LeaseRequest) -> str:
    return (
        f"worker {request.worker} has {MAX_OPEN} parts of data stream {request.stream!r} that it has not pushed yet; "
        "use fewer local_steps"
    )
