"""A rank's stock of leased items, asked for ahead of need, so that training hardly ever waits for the server."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING

from lightning_async_localsgd.exchange import ExchangeError
from lightning_async_localsgd.messages import LeaseRequest

if TYPE_CHECKING:
    from lightning_async_localsgd.exchange import Exchange
    from lightning_async_localsgd.messages import Lease


class LeaseDesk:
    """The stocks of one session of a worker.

    Args:
        exchange: the way to the server.
        worker: the worker's number.
        session: the worker's session.

    """

    def __init__(self, exchange: Exchange, worker: int, session: str) -> None:
        self._exchange = exchange
        self._worker = worker
        self._session = session
        self._numbers = itertools.count(1)
        self._stocks: dict[str, LeaseStock] = {}
        self._reported: dict[str, int] = {}

    def stock(self, stream: str, items: int, unit: int, ordered: bool = False) -> LeaseStock:
        """The stock of a data loader; the same one whenever it is asked for.

        Args:
            stream: name of the data loader, the same on all ranks.
            items: items of one epoch of all ranks together.
            unit: items are leased in multiples of this, but for the last ones of an epoch.
            ordered: items are leased in their order, from the first to the last.

        Raises:
            ValueError: the stream has been asked for with other numbers.

        """
        stock = self._stocks.get(stream)
        if stock is None:
            stock = self._stocks[stream] = LeaseStock(self, stream, items, unit, ordered)
        if (stock.items, stock.unit) != (items, unit):
            raise ValueError(
                f"data stream {stream!r} had {stock.items} items in units of {stock.unit}, now {items} in units of "
                f"{unit}; other data needs another name"
            )
        return stock

    def used(self) -> str:
        """What a push has as :attr:`.Push.used`: the streams whose count has changed since this was last called."""
        counts = {name: stock.used for name, stock in self._stocks.items() if stock.used != self._reported.get(name, 0)}
        self._reported.update(counts)
        return json.dumps(counts, separators=(",", ":")) if counts else ""

    def request(self, stock: LeaseStock, epoch: int, any_later: bool) -> int:
        """Asks for a lease, and returns the request's number."""
        number = next(self._numbers)
        self._exchange.request_lease(
            LeaseRequest(
                self._worker,
                self._session,
                number,
                stock.stream,
                stock.items,
                stock.unit,
                epoch,
                any_later,
                stock.ordered,
            )
        )
        return number

    def take(self, number: int) -> Lease:
        """Waits for the answer to a request.

        Raises:
            ExchangeError: it is a refusal, or the server is gone.

        """
        lease = self._exchange.take_lease(number)
        if lease.refused is not None:
            raise ExchangeError(lease.refused)
        return lease


class LeaseStock:
    """The leased items of one data loader on one rank, in the order in which they were granted.

    When the first item of a lease is taken, the following lease is asked for; it is there long before it is needed.

    Args:
        desk: asks the server.
        stream: name of the data loader.
        items: items of one epoch of all ranks together.
        unit: items are leased in multiples of this.
        ordered: items are leased in their order.

    Attributes:
        used: items that this rank has trained on, or dropped, so far.

    """

    def __init__(self, desk: LeaseDesk, stream: str, items: int, unit: int, ordered: bool = False) -> None:
        self.stream = stream
        self.items = items
        self.unit = unit
        self.ordered = ordered
        self.used = 0
        self._desk = desk
        self._taken = 0
        self._epoch = 0
        self._next = 0
        self._stop = 0
        self._pending: int | None = None
        self._asked_epoch = 0
        self._asked_later = False
        self._dropped_before = 0

    def next(self, epoch: int, any_later: bool = False) -> tuple[int, int] | None:
        """The next item to train on, with the epoch whose order it is a number of.

        Args:
            epoch: the one that this rank is in. An item of an earlier one comes where another worker had to give it
                back.
            any_later: items of a later epoch, the one that is being handed out, will do as well.

        Returns:
            None if ``epoch`` is over. Asked again, the server is asked again: it may have got items back.

        Raises:
            ExchangeError: the server has refused, or is gone.

        """
        if self._next >= self._stop and not self._begin_lease(epoch, any_later):
            return None
        if self._epoch > epoch and not any_later:
            return None
        item = self._next
        self._next += 1
        self._taken += 1
        return self._epoch, item

    def mark_used(self, items: int) -> None:
        """The rank has trained on so many more items of those that it took, in their order.

        Raises:
            ValueError: it has not taken as many.

        """
        if not 0 <= items <= self._taken - self.used:
            raise ValueError(f"{items} items cannot be used: {self._taken} were taken and {self.used} of them used")
        self.used += items

    def discard(self, before: int) -> None:
        """Items of epochs before ``before`` that are in stock are dropped, as if they had been used.

        Raises:
            ValueError: an item that was taken has not been used yet; it comes before these.

        """
        if self.used != self._taken:
            raise ValueError(f"{self._taken - self.used} items that were taken must be used before others are dropped")
        if self._epoch < before:
            self._drop(self._stop - self._next)
            self._next = self._stop
        if self._pending is not None:
            # Items that are asked for later may be of earlier epochs because another worker gave them back.
            self._dropped_before = before

    def _begin_lease(self, epoch: int, any_later: bool) -> bool:
        """Goes on to the next lease; returns whether there is one."""
        while True:
            if self._pending is None:
                self._ask(epoch, any_later)
            assert self._pending is not None
            number, self._pending = self._pending, None
            lease = self._desk.take(number)
            dropped_before, self._dropped_before = self._dropped_before, 0
            if lease.start < lease.stop:
                if lease.epoch < dropped_before:
                    self._drop(lease.stop - lease.start)
                    continue
                self._epoch, self._next, self._stop = lease.epoch, lease.start, lease.stop
                self._ask(epoch, any_later)
                return True
            if self._asked_epoch >= epoch and self._asked_later >= any_later:
                return False
            # That was asked ahead, in an epoch before this one.

    def _ask(self, epoch: int, any_later: bool) -> None:
        self._pending = self._desk.request(self, epoch, any_later)
        self._asked_epoch, self._asked_later = epoch, any_later

    def _drop(self, items: int) -> None:
        self._taken += items
        self.used += items
