"""A bounded pool of whole-model buffers, shared by uploads to the server and model snapshots sent to workers.

Fresh whole-model memory costs more time than the copy into it (page faults), and one buffer per peer would make the
server's memory grow with the number of workers. So transfers that move share ``max_active`` buffers, which are kept and
reused. A transfer that is slow or stalled (a peer behind a slow link, or a peer that hangs) stops counting after a
moment, so that no other transfer waits for it. The extra buffer that this may take is freed when the slow transfer
ends. Never more than ``max_total`` buffers exist.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor


class PooledBuffer:
    """A buffer on loan from a :class:`BufferPool`. Holders are counted, so that several peers can be sent one snapshot.

    Attributes:
        tensor: flat tensor of the size of a model or a packed one; valid until the last holder releases the buffer.

    """

    def __init__(self, pool: BufferPool, tensor: Tensor) -> None:
        self.tensor = tensor
        self._pool = pool
        self._holders = 1
        self._acquired_at = self._progress_at = pool.clock()

    def record_progress(self) -> None:
        """Record that the holder's transfer has moved."""
        self._progress_at = self._pool.clock()

    def mark_complete(self) -> None:
        """Record that the transfer is complete and waits for the server. From now on the buffer never stalls."""
        self._progress_at = self._acquired_at = math.inf

    def restart(self) -> None:
        """Begin another use of the buffer, such as sending a snapshot from the memory that an upload came in."""
        self._progress_at = self._acquired_at = self._pool.clock()

    def add_holders(self, count: int = 1) -> None:
        """Add ``count`` holders. Each holder must call :meth:`release`."""
        with self._pool.lock:
            self._holders += count

    def release(self) -> None:
        """Remove one holder. When the last holder is removed, the buffer returns to the pool.

        Raises:
            RuntimeError: the buffer has no holder left.

        """
        self._pool._remove_holder(self)


class BufferPool:
    """``max_active`` whole-model buffers, and a few more while transfers stall.

    Args:
        numel: elements of a buffer.
        max_active: buffers that moving transfers share, >= 1. They are allocated when first needed.
        max_total: buffers that may exist at any time, >= ``max_active``.
        stall_seconds: a transfer without progress for longer counts as stalled.
        hold_seconds: a transfer that has held its buffer for longer counts as stalled, even if it moves.
        clock: seconds, monotonic.
        dtype: dtype of the buffers; ``torch.uint8`` for packed ones, see :class:`.Codec`.

    Raises:
        ValueError: ``max_active`` is less than 1 or greater than ``max_total``.

    """

    def __init__(
        self,
        numel: int,
        max_active: int = 1,
        max_total: int = 8,
        stall_seconds: float = 0.2,
        hold_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not 1 <= max_active <= max_total:
            raise ValueError(
                f"a buffer pool needs 1 <= max_active <= max_total, got max_active={max_active}, max_total={max_total}"
            )
        self.clock = clock
        self.lock = threading.Lock()
        self._numel = numel
        self._dtype = dtype
        self._max_active = max_active
        self._max_total = max_total
        self._stall_seconds = stall_seconds
        self._hold_seconds = hold_seconds
        self._free: list[Tensor] = []
        self._held: set[PooledBuffer] = set()

    def raise_max_total(self, max_total: int) -> None:
        """Raise the number of buffers that may exist. A lower number than the present one changes nothing."""
        with self.lock:
            self._max_total = max(self._max_total, max_total)

    @property
    def in_use(self) -> int:
        """Number of buffers that are held."""
        with self.lock:
            return len(self._held)

    @property
    def allocated(self) -> int:
        """Number of buffers that exist, held or free."""
        with self.lock:
            return len(self._held) + len(self._free)

    def try_acquire(self) -> PooledBuffer | None:
        """Return a buffer, or None if none is available. Then try again after a release, or a moment later."""
        with self.lock:
            if self._active() >= self._max_active or len(self._held) >= self._max_total:
                return None
            # The contents don't matter: every user fills the whole buffer.
            tensor = self._free.pop() if self._free else torch.empty(self._numel, dtype=self._dtype)
            buffer = PooledBuffer(self, tensor)
            self._held.add(buffer)
            return buffer

    def _remove_holder(self, buffer: PooledBuffer) -> None:
        with self.lock:
            if buffer._holders < 1:
                raise RuntimeError("a buffer was released more often than it had holders")
            buffer._holders -= 1
            if buffer._holders == 0:
                self._held.discard(buffer)
                # Keep enough free buffers for moving transfers, however many buffers stalled transfers hold.
                if self._active() + len(self._free) < self._max_active:
                    self._free.append(buffer.tensor)

    def _active(self) -> int:
        """Return the number of held buffers whose transfers are not stalled."""
        now = self.clock()
        return sum(
            now - buffer._progress_at < self._stall_seconds and now - buffer._acquired_at < self._hold_seconds
            for buffer in self._held
        )
