"""Packs a worker's pushes, and keeps what rounding leaves over for the next push.

The residual belongs to the worker. If a push is refused, its residual is dropped with it: the values that made the
server refuse the push must not come back with the next one. A push whose first copy counts is not refused in this
sense. Without an answer, the same bytes are sent again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_async_localsgd.protocol.codecs import Codec
    from lightning_async_localsgd.protocol.layout import Layout


class Uplink:
    """Packs the pushes of one worker.

    Args:
        codec: packs pushes.
        layout: layout of the pushes.
        packed: memory for packed pushes, if several workers share it.

    Attributes:
        packed: the bytes of the last push, uint8. They stay until the next push.
        residual: what all pushes so far fall short of what was to be sent, for each parameter, flat fp32.

    """

    def __init__(self, codec: Codec, layout: Layout, packed: Tensor | None = None) -> None:
        self.packed = codec.new_packed() if packed is None else packed
        self.residual = torch.zeros(layout.parameter_numel, dtype=torch.float32)
        self._codec = codec

    def pack(self, push: Tensor, sequence: int) -> None:
        """Pack a push and the residual. The push becomes what the server will unpack, and the residual the rest.

        Args:
            push: flat fp32 vector, see :meth:`.Binding.subtract_from`.
            sequence: number of the push.

        """
        self._codec.pack_push(push, self.packed, self.residual, sequence)

    def drop(self) -> None:
        """Drop the residual, because the push that it is left over from does not count."""
        self.residual.zero_()

    def restore(self, residual: Tensor | None) -> bool:
        """Continue from a saved residual. Return False, and begin without one, if it is of another model."""
        fits = residual is not None and residual.shape == self.residual.shape
        if residual is not None and fits:
            self.residual.copy_(residual)
        else:
            self.drop()
        return fits
