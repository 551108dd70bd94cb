"""A worker that leases data, for the tests of data leases."""

from __future__ import annotations

import json

from lightning_async_localsgd.policies.data_leases import DataLeases
from lightning_async_localsgd.protocol.messages import Lease, LeaseRequest


def ask(worker: int = 0, number: int = 1, epoch: int = 0, items: int = 100, **changes: object) -> LeaseRequest:
    values = {"stream": "0", "unit": 1, "allow_later_epoch": False, **changes}
    return LeaseRequest(worker=worker, session="s", number=number, items=items, epoch=epoch, **values)  # type: ignore[arg-type]


def used(count: int, stream: str = "0") -> str:
    return json.dumps({stream: count})


class LeasingWorker:
    """A worker of one stream that keeps what it is given, as a rank does."""

    def __init__(self, leases: DataLeases, worker: int, items: int, unit: int = 1, own_unit: bool = False) -> None:
        self.leases = leases
        self.worker = worker
        self.items = items
        self.unit = unit
        self.own_unit = own_unit
        self.epoch = 0
        self.restart()

    def restart(self) -> None:
        self.number = 0
        self.held: list[tuple[int, int]] = []
        """Items of this session, in order."""
        self.trained = 0
        self.handed_in = 0

    def request(self, again: bool = False, allow_later_epoch: bool = False, workers: int = 2) -> Lease:
        self.number += not again
        request = ask(
            self.worker,
            self.number,
            self.epoch,
            self.items,
            unit=self.unit,
            allow_later_epoch=allow_later_epoch,
            own_unit=self.own_unit,
        )
        lease = self.leases.grant(request, workers)
        assert lease.refused is None
        if not again:
            self.held += [(lease.epoch, item) for item in range(lease.start, lease.stop)]
        return lease

    def train(self, most: int) -> None:
        self.trained = min(len(self.held), self.trained + most)

    def push(self, wanted: bool = True) -> list[tuple[int, int]]:
        """What a server does with a push; ``wanted`` False is one refused for another reason. Returns what counted."""
        claim = used(self.trained)
        applied = wanted and self.leases.rejection(self.worker, claim) is None
        self.leases.complete_round(self.worker, claim, consumed=applied)
        items = self.held[self.handed_in : self.trained]
        self.handed_in = self.trained
        return items if applied else []
