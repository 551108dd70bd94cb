"""Packs a worker's pushes, and keeps what rounding leaves over for the next push.

The residual belongs to the worker. If a push is refused, its residual is dropped with it: the values that made the
server refuse the push must not come back with the next one. A push whose first copy counts is not refused in this
sense. Without an answer, the same bytes are sent again.

If the module is on a CUDA device, its pushes are computed and packed there, and only the packed bytes are copied to the
host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_async_localsgd.protocol.codecs import Codec

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_async_localsgd.protocol.codecs import Encoding
    from lightning_async_localsgd.protocol.layout import Layout


class Uplink:
    """Packs the pushes of one worker.

    Args:
        layout: layout of the pushes.
        encoding: encoding of their parameters; not ``"fp32"``.
        packed: memory for packed pushes on the host, if several workers share it.
        device: where pushes are computed and packed.
        own_vector: whether pushes are computed in :attr:`vector`. By default, they are unless ``device`` is the CPU.

    Attributes:
        packed: the bytes of the last push, uint8, on the host. They stay until the next push.
        residual: what all pushes so far fall short of what was to be sent, for each parameter, flat fp32, on the
            device.
        vector: memory for pushes on the device, flat fp32; None if they are computed in the worker's memory.

    """

    def __init__(
        self,
        layout: Layout,
        encoding: Encoding,
        packed: Tensor | None = None,
        device: torch.device | str = "cpu",
        own_vector: bool | None = None,
    ) -> None:
        self._codec = codec = Codec(layout, encoding, device)
        on_device = codec.device.type != "cpu" if own_vector is None else own_vector
        pinned = codec.device.type == "cuda"
        self.packed = torch.empty(codec.nbytes, dtype=torch.uint8, pin_memory=pinned) if packed is None else packed
        self.residual = torch.zeros(layout.parameter_numel, dtype=torch.float32, device=device)
        self.vector = torch.empty(layout.numel, dtype=torch.float32, device=device) if on_device else None
        self._packed_here = codec.new_packed() if on_device else self.packed

    def pack(self, push: Tensor, sequence: int) -> None:
        """Pack a push and the residual. The push becomes what the server will unpack, and the residual the rest.

        Args:
            push: flat fp32 vector on the device, see :meth:`.Binding.subtract_from`.
            sequence: number of the push.

        """
        self._codec.pack_push(push, self._packed_here, self.residual, sequence)
        if self._packed_here is not self.packed:
            self.packed.copy_(self._packed_here)

    def drop(self) -> None:
        """Drop the residual, because the push that it is left over from does not count."""
        self.residual.zero_()

    def copy_residual(self) -> Tensor:
        """Return a copy of the residual on the host."""
        return self.residual.detach().to("cpu", copy=True)

    def restore(self, residual: Tensor | None) -> bool:
        """Continue from a saved residual. Return False, and begin without one, if it is of another model."""
        fits = residual is not None and residual.shape == self.residual.shape
        if residual is not None and fits:
            self.residual.copy_(residual)
        else:
            self.drop()
        return fits
