"""The run's values of frozen parameters that modules move themselves, such as the teacher of a student."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_async_localsgd.protocol.buffers import BufferPool
from lightning_async_localsgd.protocol.frozen import pack_numbers, split, unpack_numbers
from lightning_async_localsgd.protocol.messages import MessageError, Reply

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_async_localsgd.protocol.messages import Share


class SharedValues:
    """The average of the workers' values of frozen parameters that have changed in training. Not thread-safe.

    The values are statistics, and move like buffers: each worker moves them by 1/k of the way towards its own, where k
    is the number of live workers. The first value of a parameter sets it.

    Args:
        sizes: number of elements of each frozen parameter.

    """

    def __init__(self, sizes: Sequence[int] = ()) -> None:
        self._sizes = list(sizes)
        self._values: dict[int, Tensor] = {}
        self._pools: dict[int, BufferPool] = {}

    @property
    def listed(self) -> str:
        """Numbers of the parameters that have changed on any worker, see :func:`.pack_numbers`."""
        return pack_numbers(sorted(self._values))

    def buffers(self, share: Share) -> BufferPool:
        """Return the pool of the buffers for the values that follow a header. May be called in another thread.

        Raises:
            MessageError: the header names parameters that the model does not have, or none.

        """
        numel = sum(self._sizes[number] for number in self._numbers(share))
        return self._pools.setdefault(numel, BufferPool(numel))

    def answer(self, share: Share, flat: Tensor, workers: int) -> Reply:
        """Move the run's values towards those in ``flat``, write the result to ``flat``, and return the answer.

        Values that are not finite do not move the run's values. Values that the run does not have stay in ``flat``.

        Args:
            share: the header.
            flat: the worker's values.
            workers: number of live workers; 0 if the run's values must not change.

        """
        counts = workers > 0 and bool(torch.isfinite(flat).all())
        for number, part in split(self._sizes, self._numbers(share), flat):
            own = self._values.get(number)
            if own is not None:
                if counts:
                    own.lerp_(part, 1.0 / workers)
                part.copy_(own)
            elif counts:
                self._values[number] = part.clone()
        return Reply(
            incarnation=share.incarnation,
            sequence=share.sequence,
            version=0,
            staleness=0,
            local_steps=0,
            progress=0.0,
            progress_per_step=1.0,
            wait_seconds=0.0,
            stop=False,
            refused=None,
            shared=self.listed,
        )

    def _numbers(self, share: Share) -> list[int]:
        numbers = unpack_numbers(share.parameters, len(self._sizes))
        if not numbers:
            raise MessageError("a share names no parameter")
        return numbers

    def copies(self) -> dict[int, Tensor]:
        """Return copies of the values by the parameters' numbers."""
        return {number: value.clone() for number, value in self._values.items()}
