"""A bounded pool of whole-model buffers, shared by uploads and by snapshots that are on their way out.

Fresh whole-model memory costs more time than the copy into it (page faults), and one buffer per peer would make the
server's memory grow with the number of workers. So quick holders take turns with ``limit`` buffers, which are kept and
reused. A slow one (a peer behind a slow link, or one that stalled in mid-transfer) stops counting after a moment, so
that it keeps nobody else waiting; the extra buffer that this may take is given up again when it comes back, and never
more than ``most`` exist.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor


class BufferLease:
    """One holder's right to a buffer; counted, so that one snapshot can go out to several peers.

    Attributes:
        tensor: flat fp32 tensor of the whole model's size; valid until the last share is released.

    """

    def __init__(self, pool: BufferPool, tensor: Tensor) -> None:
        self.tensor = tensor
        self._pool = pool
        self._shares = 1
        self._since = self._progress_at = pool.clock()

    def touch(self) -> None:
        """The holder's transfer has moved."""
        self._progress_at = self._pool.clock()

    def settle(self) -> None:
        """The transfer is complete and waits for the server: it does not stall, however long that takes."""
        self._progress_at = self._since = math.inf

    def renew(self) -> None:
        """A new use begins, such as the way out of a snapshot in the memory that an upload came in."""
        self._progress_at = self._since = self._pool.clock()

    def share(self, times: int = 1) -> None:
        """Adds ``times`` holders; each of them must :meth:`release`."""
        with self._pool.lock:
            self._shares += times

    def release(self) -> None:
        """Gives one share back; with the last one the buffer returns to the pool.

        Raises:
            RuntimeError: there was no share left to give back.

        """
        self._pool.give_back(self)


class BufferPool:
    """``limit`` whole-model buffers, and a few more while holders stall.

    Args:
        numel: elements of a buffer (fp32).
        limit: buffers in ordinary use, >= 1. They are allocated when first needed.
        most: buffers in any case, >= ``limit``.
        stall_seconds: a holder without progress for longer does not count.
        hold_seconds: nor does one that has held its buffer for longer, progress or not.
        clock: seconds, monotonic.

    """

    def __init__(
        self,
        numel: int,
        limit: int = 1,
        most: int = 8,
        stall_seconds: float = 0.2,
        hold_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 1 <= limit <= most:
            raise ValueError(f"a buffer pool needs 1 <= limit <= most, got limit={limit}, most={most}")
        self.clock = clock
        self.lock = threading.Lock()
        self._numel = numel
        self._limit = limit
        self._most = most
        self._stall_seconds = stall_seconds
        self._hold_seconds = hold_seconds
        self._free: list[Tensor] = []
        self._leases: set[BufferLease] = set()

    def allow(self, most: int) -> None:
        """From now on ``most`` buffers may exist, if that is more than before."""
        with self.lock:
            self._most = max(self._most, most)

    @property
    def in_use(self) -> int:
        """Buffers that somebody holds."""
        with self.lock:
            return len(self._leases)

    @property
    def allocated(self) -> int:
        """Buffers that exist, held or free."""
        with self.lock:
            return len(self._leases) + len(self._free)

    def try_acquire(self) -> BufferLease | None:
        """A buffer, or None if there is none to be had now (ask again when one was released, or a moment later)."""
        with self.lock:
            if self._quick() >= self._limit or len(self._leases) >= self._most:
                return None
            # Contents don't matter: every user fills the whole buffer.
            tensor = self._free.pop() if self._free else torch.empty(self._numel, dtype=torch.float32)
            lease = BufferLease(self, tensor)
            self._leases.add(lease)
            return lease

    def give_back(self, lease: BufferLease) -> None:
        """Takes one share of ``lease`` back. Called by :meth:`BufferLease.release`."""
        with self.lock:
            if lease._shares < 1:
                raise RuntimeError("a buffer was released more often than it was shared")
            lease._shares -= 1
            if lease._shares == 0:
                self._leases.discard(lease)
                # Those who are quick go on with a buffer that is there, however many slow ones hold others.
                if self._quick() + len(self._free) < self._limit:
                    self._free.append(lease.tensor)

    def _quick(self) -> int:
        """Holders that count."""
        now = self.clock()
        return sum(
            now - lease._progress_at < self._stall_seconds and now - lease._since < self._hold_seconds
            for lease in self._leases
        )
