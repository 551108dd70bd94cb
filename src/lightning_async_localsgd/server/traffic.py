"""How pushes and models travel: unpacks pushes, and packs the models that workers are sent.

A packed model is one of two things. With ``bf16``, it is the rounded model, the same for all workers that are
dispatched together. With ``int8``, it is the difference of the model to the one that a worker holds, and the server
keeps a copy of what each worker holds, so that rounding errors do not add up.

These models are sent exactly (fp32): the final one, so that all ranks end with the same bits; with ``int8`` the first
one of a session or after a loss; and with ``int8`` the model that answers a push again, because the server does not
know what the worker has received of the answer before.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_async_localsgd.protocol.buffers import BufferPool
from lightning_async_localsgd.protocol.codecs import Codec, codec_of
from lightning_async_localsgd.protocol.ports import LocalReplyChannel

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lightning_async_localsgd.protocol.buffers import PooledBuffer
    from lightning_async_localsgd.protocol.layout import Layout
    from lightning_async_localsgd.protocol.messages import Hello, Push, Reply
    from lightning_async_localsgd.protocol.options import Download, Upload
    from lightning_async_localsgd.protocol.ports import ReplyChannel
    from lightning_async_localsgd.server.global_model import GlobalModel

MAX_HELD_BYTES = 16 << 30
"""Memory for the models that workers hold, with ``download="int8"``."""

_ANY = 1 << 30
"""Number of buffers of a pool without a limit. There is one for each worker that is being sent a difference."""


@dataclass
class _Held:
    """What a worker holds.

    Args:
        session: the worker's session.
        model: the model that it was last sent, flat fp32.
        sequence: number of the push that this model answered.
        version: version of the model.

    """

    session: str
    model: Tensor
    sequence: int
    version: int


class Traffic:
    """Unpacks pushes, and packs models. Belongs to the server's owner thread, except :attr:`uploads`.

    Args:
        layout: layout of the model.
        buffers: pool of whole-model fp32 buffers.
        upload: how the parameters of pushes travel.
        download: how the parameters of models travel.
        workers: number of workers that the run is started with.

    Raises:
        ValueError: The models that the workers hold need more than :data:`MAX_HELD_BYTES`.

    Attributes:
        uploads: pool of the buffers that pushes are received into.

    """

    def __init__(
        self,
        layout: Layout,
        buffers: BufferPool,
        upload: Upload = "fp32",
        download: Download = "fp32",
        workers: int = 1,
    ) -> None:
        self._layout = layout
        self._options = {"upload": str(upload), "download": str(download)}
        self._up, self._down = codec_of(layout, upload), codec_of(layout, download)
        self._exact = buffers
        # Uploads and exact models share a pool if both are fp32.
        self.uploads = buffers if self._up is None else BufferPool(self._up.nbytes, dtype=torch.uint8)
        self._gradient: Tensor | None = None
        self._packed: Tensor | None = None
        self._rounded: BufferPool | None = None
        self._differences: BufferPool | None = None
        if self._down is not None:
            self._rounded = BufferPool(self._down.nbytes, dtype=torch.uint8)
            self._differences = BufferPool(self._down.nbytes, _ANY, _ANY, dtype=torch.uint8)
        self._keeps_held = download == "int8"
        self._held: dict[int, _Held] = {}
        self._spare: PooledBuffer | None = None
        self._rounded_spare: PooledBuffer | None = None
        reason = self._check_memory(workers)
        if reason is not None:
            raise ValueError(reason)

    @property
    def push_bytes(self) -> int:
        """Bytes of a push of a round, without its header."""
        return 4 * self._layout.numel if self._up is None else self._up.nbytes

    @property
    def model_bytes(self) -> int:
        """Bytes of a model that a worker is usually sent, without its header."""
        return 4 * self._layout.numel if self._down is None else self._down.nbytes

    # ---------------------------------------------------------------------- pushes

    def check(self, hello: Hello, others: int) -> str | None:
        """Return why a worker cannot take part, given the number of other live workers; None if it can."""
        for option, value in self._options.items():
            theirs = getattr(hello, option)
            if theirs != value:
                return (
                    f"worker {hello.worker} has exchange.{option}={theirs!r} and rank 0 has {value!r}; give all ranks "
                    "the same options"
                )
        return self._check_memory(others + 1) if hello.worker not in self._held else None

    def pool_of(self, push: Push) -> BufferPool:
        """Return the pool of the buffers that a push is received into. Only pseudo-gradients travel packed.

        May be called in another thread.
        """
        return self.uploads if push.contents == "round" else self._exact

    def unpack(self, push: Push, buffer: PooledBuffer) -> Tensor:
        """Return the vector of a push in its buffer, flat fp32. It is valid until the next call."""
        if push.contents != "round":
            # Moments do not travel then. Those of gradients mean nothing, and those of weights are not known.
            buffer.tensor[self._layout.model_numel :].fill_(0.0 if push.contents == "gradient" else math.nan)
            return buffer.tensor
        if self._up is None:
            return buffer.tensor
        if self._gradient is None:
            self._gradient = torch.empty(self._layout.numel, dtype=torch.float32)
        self._up.unpack(buffer.tensor, self._gradient)
        return self._gradient

    def confirm(self, push: Push) -> None:
        """Note what a worker's push says about the model that the worker holds."""
        held = self._held.get(push.worker)
        if held is not None and push.sequence > held.sequence and push.base_version != held.version:
            self.forget(push.worker)

    def forget(self, worker: int) -> None:
        """Forget what a worker holds. It is sent an exact model next."""
        self._held.pop(worker, None)

    # ---------------------------------------------------------------------- models

    def raise_max_total(self, buffers: int) -> None:
        """Raise the number of buffers that may exist."""
        for pool in (self._exact, self.uploads, self._rounded):
            if pool is not None:
                pool.raise_max_total(buffers)

    def reserve(self) -> bool:
        """Get the buffers that a dispatch may need. Return False if one is not available yet."""
        if self._spare is None:
            self._spare = self._exact.try_acquire()
        if self._rounded is not None and not self._keeps_held and self._rounded_spare is None:
            self._rounded_spare = self._rounded.try_acquire()
            return self._spare is not None and self._rounded_spare is not None
        return self._spare is not None

    def keep(self, buffer: PooledBuffer) -> bool:
        """Keep the buffer of a merged push for a dispatch that is due, if it can be used for one.

        Then the dispatch never has to wait for a buffer that an upload holds.
        """
        if self._spare is not None or self._up is not None:
            return False
        self._spare = buffer
        return True

    def release_spares(self) -> None:
        """Release the buffers that were reserved and not used."""
        for spare in (self._spare, self._rounded_spare):
            if spare is not None:
                spare.release()
        self._spare = self._rounded_spare = None

    def batch(self, model: GlobalModel, mean: Tensor | None = None) -> Batch:
        """Begin to send the model, as it is now, to some workers.

        Args:
            model: the global model.
            mean: the vector that is sent with replies that are :attr:`.Reply.averaged`.

        """
        return Batch(self, model, mean)

    def encoding(self, worker: int, session: str | None, reply: Reply) -> str:
        """Return how the model that comes with a reply travels."""
        if reply.averaged:
            return "mean"
        if self._down is None or reply.stop:
            return "fp32"
        if not self._keeps_held:
            return self._down.encoding
        held = self._held.get(worker)
        known = held is not None and held.session == session and held.sequence < reply.sequence
        return self._down.encoding if known else "fp32"

    def _check_memory(self, workers: int) -> str | None:
        needed = 4 * self._layout.numel * workers
        if not self._keeps_held or needed <= MAX_HELD_BYTES:
            return None
        return (
            f"exchange.download='int8' keeps a copy of the model for each worker: {workers} workers x "
            f"{4 * self._layout.numel / 2**30:.2f} GiB = {needed / 2**30:.2f} GiB, and the limit is "
            f"{MAX_HELD_BYTES / 2**30:g} GiB; use download='bf16'"
        )


class Batch:
    """Sends one state of the global model to several workers. Made by :meth:`Traffic.batch`.

    Args:
        traffic: how models travel.
        model: the global model, which must not change until :meth:`close`.
        mean: the vector of replies that are :attr:`.Reply.averaged`. The replies of a batch are all averaged, or none.

    """

    def __init__(self, traffic: Traffic, model: GlobalModel, mean: Tensor | None = None) -> None:
        self._traffic = traffic
        self._model = model
        self._mean = mean
        self._exact: PooledBuffer | None = None
        self._rounded: PooledBuffer | None = None
        self._rounded_here: Tensor | None = None

    def send(self, worker: int, session: str | None, reply: Reply, channel: ReplyChannel | LocalReplyChannel) -> None:
        """Send the model with a reply through a channel."""
        traffic = self._traffic
        encoding = traffic.encoding(worker, session, reply)
        reply = dataclasses.replace(reply, encoding=encoding)
        here = isinstance(channel, LocalReplyChannel)
        if encoding in ("fp32", "mean"):
            self._note_exact(worker, session, reply)
            copy = self._copy_mean if reply.averaged else self._model.copy_to
            if isinstance(channel, LocalReplyChannel):
                channel.answer(reply, copy)
            else:
                channel.dispatch(reply, self._shared(self._exact_buffer(copy)))
        elif traffic._keeps_held:
            held = traffic._held[worker]
            buffer = None if here else self._differences_buffer()
            packed = self._scratch() if buffer is None else buffer.tensor
            self._codec.pack_difference(self._model.theta, packed, held.model, reply.version)
            held.sequence, held.version = reply.sequence, reply.version
            if isinstance(channel, LocalReplyChannel):
                channel.answer(reply, lambda out: _copy(held.model, out))
            else:
                assert buffer is not None
                channel.dispatch(reply, buffer)
        elif isinstance(channel, LocalReplyChannel):
            rounded = self._rounded_model(here=True)
            channel.answer(reply, lambda out: self._codec.unpack(rounded, out))
        else:
            self._rounded_model(here=False)
            assert self._rounded is not None
            channel.dispatch(reply, self._shared(self._rounded))

    def close(self) -> None:
        """Release what the channels do not hold."""
        for buffer in (self._exact, self._rounded):
            if buffer is not None:
                buffer.release()
        self._exact = self._rounded = None

    # -------------------------------------------------------------------- internal

    @property
    def _codec(self) -> Codec:
        codec = self._traffic._down
        assert codec is not None
        return codec

    def _note_exact(self, worker: int, session: str | None, reply: Reply) -> None:
        traffic = self._traffic
        if reply.stop or reply.averaged or session is None:
            traffic.forget(worker)
        elif traffic._keeps_held:
            held = traffic._held.get(worker)
            if held is None:
                held = traffic._held[worker] = _Held(session, torch.empty_like(self._model.theta), 0, 0)
            self._model.copy_to(held.model)
            held.session, held.sequence, held.version = session, reply.sequence, reply.version

    def _copy_mean(self, out: Tensor) -> None:
        assert self._mean is not None
        out.copy_(self._mean)

    def _exact_buffer(self, copy: Callable[[Tensor], None]) -> PooledBuffer:
        if self._exact is None:
            self._exact, self._traffic._spare = self._traffic._spare, None
            assert self._exact is not None
            copy(self._exact.tensor)
            self._exact.restart()
        return self._exact

    def _differences_buffer(self) -> PooledBuffer:
        pool = self._traffic._differences
        buffer = None if pool is None else pool.try_acquire()
        assert buffer is not None
        return buffer

    def _rounded_model(self, here: bool) -> Tensor:
        """Return the packed model, which is packed once. If it is sent to other processes, it is in a pooled buffer."""
        if not here and self._rounded is None:
            self._rounded, self._traffic._rounded_spare = self._traffic._rounded_spare, None
            assert self._rounded is not None
            self._codec.pack_model(self._model.theta, self._rounded.tensor, self._model.version)
            self._rounded.restart()
        if self._rounded is not None:
            return self._rounded.tensor
        if self._rounded_here is None:
            self._rounded_here = self._scratch()
            self._codec.pack_model(self._model.theta, self._rounded_here, self._model.version)
        return self._rounded_here

    def _scratch(self) -> Tensor:
        traffic = self._traffic
        if traffic._packed is None:
            traffic._packed = self._codec.new_packed()
        return traffic._packed

    def _shared(self, buffer: PooledBuffer) -> PooledBuffer:
        """Return the buffer with one more holder, the channel that it is given to."""
        buffer.add_holders()
        return buffer


def _copy(source: Tensor, out: Tensor) -> None:
    out.copy_(source)
