"""Receives models into a worker's tensor: straight, or into packed memory that is unpacked once all of it is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_async_localsgd.protocol.messages import MessageError
from lightning_async_localsgd.wire import frames

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_async_localsgd.protocol.codecs import Codec
    from lightning_async_localsgd.protocol.layout import Layout
    from lightning_async_localsgd.protocol.messages import Reply


class ReceivedModels:
    """Where the bytes of a model are received, and what becomes of them.

    A difference is added to what was received before. If the worker's tensors are not fp32, the worker rounds the
    models that it receives, so a copy is kept of what was received.

    Args:
        layout: layout of the models.
        codec: unpacks models; None if they never travel packed.

    """

    def __init__(self, layout: Layout, codec: Codec | None) -> None:
        self._codec = codec
        self._mean_bytes = layout.model_bytes
        self._packed = None if codec is None else codec.new_packed()
        differences = codec is not None and codec.encoding == "int8"
        is_rounded = any(entry.dtype != "torch.float32" for entry in layout.entries)
        self._held = torch.zeros(layout.numel) if differences and is_rounded else None

    def memory(self, reply: Reply, model: Tensor) -> memoryview:
        """Return the memory for the bytes that follow a reply.

        Raises:
            MessageError: The model travels in another way than this worker expects.

        """
        if reply.encoding == "fp32":
            return frames.memory_of(model)
        if reply.encoding == "mean":
            return frames.memory_of(model)[: self._mean_bytes]
        if self._codec is None or self._packed is None or reply.encoding != self._codec.encoding:
            raise MessageError(f"the model comes as {reply.encoding!r}, which was not agreed on")
        return frames.memory_of(self._packed)

    def complete(self, reply: Reply, model: Tensor) -> None:
        """Unpack a model that has been received as a whole. A mean is not unpacked, and no difference follows it."""
        if reply.encoding == "mean":
            return
        if reply.encoding == "fp32":
            if self._held is not None:
                self._held.copy_(model)
            return
        assert self._codec is not None
        assert self._packed is not None
        if self._held is None:
            self._codec.unpack(self._packed, model, difference=reply.encoding == "int8")
        else:
            self._codec.unpack(self._packed, self._held, difference=True)
            model.copy_(self._held)
