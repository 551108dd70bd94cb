"""A rank's buffer of leased items. Leases are requested ahead of need, so that training rarely waits for the server."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING

from lightning_async_localsgd.protocol.exchange import ExchangeError
from lightning_async_localsgd.protocol.lease_source import wait_for_lease
from lightning_async_localsgd.protocol.messages import LeaseRequest

if TYPE_CHECKING:
    from concurrent.futures import Future

    from lightning_async_localsgd.protocol.lease_source import LeaseSource
    from lightning_async_localsgd.protocol.messages import Lease


class LeaseClient:
    """The lease buffers of one worker session.

    Args:
        source: answers the lease requests.
        worker: the worker's number.
        session: the worker's session.

    """

    def __init__(self, source: LeaseSource, worker: int, session: str) -> None:
        self._source = source
        self._worker = worker
        self._session = session
        self._numbers = itertools.count(1)
        self._buffers: dict[str, LeaseBuffer] = {}
        self._reported: dict[str, int] = {}

    def buffer(self, stream: str, items: int, unit: int, ordered: bool = False, own_unit: bool = False) -> LeaseBuffer:
        """Return the buffer of a data loader. Every call for a stream returns the same buffer.

        Args:
            stream: name of the data loader, the same on all ranks.
            items: items of one epoch, all ranks together.
            unit: leases are multiples of this many items, except at the end of an epoch.
            ordered: lease items in order, from the first to the last.
            own_unit: other workers may request the items in units of other sizes.

        Raises:
            ValueError: an earlier call for the stream had another ``items`` or ``unit``.

        """
        buffer = self._buffers.get(stream)
        if buffer is None:
            buffer = self._buffers[stream] = LeaseBuffer(self, stream, items, unit, ordered, own_unit)
        if (buffer.items, buffer.unit) != (items, unit):
            raise ValueError(
                f"data stream {stream!r} had {buffer.items} items in units of {buffer.unit}, now {items} in units of "
                f"{unit}; give other data another stream name"
            )
        return buffer

    def items_used(self) -> str:
        """Return :attr:`.Push.items_used`: the counts of the streams that have changed since the last call."""
        counts = {
            name: buffer.used for name, buffer in self._buffers.items() if buffer.used != self._reported.get(name, 0)
        }
        self._reported.update(counts)
        return json.dumps(counts, separators=(",", ":")) if counts else ""

    def request(self, buffer: LeaseBuffer, epoch: int, allow_later_epoch: bool) -> Future[Lease]:
        """Request a lease without waiting for the answer."""
        return self._source.request_lease(
            LeaseRequest(
                self._worker,
                self._session,
                next(self._numbers),
                buffer.stream,
                buffer.items,
                buffer.unit,
                epoch,
                allow_later_epoch,
                buffer.ordered,
                buffer.own_unit,
            )
        )

    def wait(self, answer: Future[Lease]) -> Lease:
        """Wait for the answer to a request.

        Raises:
            ExchangeError: the server refused the request, or is gone.

        """
        lease = wait_for_lease(self._source, answer)
        if lease.refused is not None:
            raise ExchangeError(lease.refused)
        return lease


class LeaseBuffer:
    """The leased items of one data loader on one rank, in the order in which they were granted.

    When the first item of a lease is taken, the next lease is requested, long before it is needed.

    Args:
        client: sends the requests.
        stream: name of the data loader.
        items: items of one epoch, all ranks together.
        unit: leases are multiples of this many items.
        ordered: lease items in order.
        own_unit: other workers may request the items in units of other sizes.

    Attributes:
        used: items that this rank has trained on or dropped so far.

    """

    def __init__(
        self, client: LeaseClient, stream: str, items: int, unit: int, ordered: bool = False, own_unit: bool = False
    ) -> None:
        self.stream = stream
        self.items = items
        self.unit = unit
        self.ordered = ordered
        self.own_unit = own_unit
        self.used = 0
        self._client = client
        self._taken = 0
        self._epoch = 0
        self._next = 0
        self._stop = 0
        self._pending: Future[Lease] | None = None
        self._pending_epoch = 0
        self._pending_allows_later = False
        self._dropped_before = 0

    def next(self, epoch: int, allow_later_epoch: bool = False) -> tuple[int, int] | None:
        """Return the next item to train on, as its epoch and its position in the order of that epoch.

        Args:
            epoch: the epoch that this rank is in. Items of an earlier epoch come when another worker had to return
                them.
            allow_later_epoch: accept items of the epoch that is being leased now, even if it is later.

        Returns:
            The epoch and position, or None if ``epoch`` is over. The next call asks the server again, which may have
            got items back.

        Raises:
            ExchangeError: the server refused the request, or is gone.

        """
        if self._next >= self._stop and not self._next_lease(epoch, allow_later_epoch):
            return None
        if self._epoch > epoch and not allow_later_epoch:
            return None
        item = self._next
        self._next += 1
        self._taken += 1
        return self._epoch, item

    def mark_used(self, items: int) -> None:
        """Record that the rank has trained on this many more of the items it took, in their order.

        Raises:
            ValueError: fewer items were taken and are still unused.

        """
        if not 0 <= items <= self._taken - self.used:
            raise ValueError(
                f"cannot mark {items} items as used: {self._taken} were taken and {self.used} of them are used already"
            )
        self.used += items

    def discard(self, before: int) -> None:
        """Drop the leased items of epochs before ``before``, and count them as used.

        Raises:
            ValueError: items that were taken are not marked as used. They come before the dropped ones.

        """
        if self.used != self._taken:
            raise ValueError(
                f"{self._taken - self.used} taken items must be marked as used before later items can be dropped"
            )
        if self._epoch < before:
            self._drop(self._stop - self._next)
            self._next = self._stop
        if self._pending is not None:
            # Leases requested later may hold items of earlier epochs that another worker returned. Those are kept.
            self._dropped_before = before

    def _next_lease(self, epoch: int, allow_later_epoch: bool) -> bool:
        """Begin the next lease. Return False if the epoch is over."""
        while True:
            if self._pending is None:
                self._request(epoch, allow_later_epoch)
            assert self._pending is not None
            answer, self._pending = self._pending, None
            lease = self._client.wait(answer)
            dropped_before, self._dropped_before = self._dropped_before, 0
            if lease.start < lease.stop:
                if lease.epoch < dropped_before:
                    self._drop(lease.stop - lease.start)
                    continue
                self._epoch, self._next, self._stop = lease.epoch, lease.start, lease.stop
                self._request(epoch, allow_later_epoch)
                return True
            if self._pending_epoch >= epoch and self._pending_allows_later >= allow_later_epoch:
                return False
            # The request was made ahead, in an earlier epoch. Ask again for this one.

    def _request(self, epoch: int, allow_later_epoch: bool) -> None:
        self._pending = self._client.request(self, epoch, allow_later_epoch)
        self._pending_epoch, self._pending_allows_later = epoch, allow_later_epoch

    def _drop(self, items: int) -> None:
        self._taken += items
        self.used += items
