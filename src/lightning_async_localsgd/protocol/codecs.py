"""Packs the flat vector of a layout into fewer bytes for the wire, and unpacks it.

Parameters travel as bf16, or as integers of 8 or 4 bits with one scale for each block of :data:`BLOCK` values
(symmetric, rounded to nearest). Buffers travel as they are: they hold statistics, which no later push corrects. Second
moments travel as bf16, because they are positive and range over many powers of ten.

Rounding errors are not lost. What a worker sends falls short of what it has learned by a residual, which is added to
its next push (error feedback, arXiv 1809.07599). What the server sends is measured against the model that the worker
really holds.

A block with NaN, infinite or overflowing values has a scale that is not finite. All values that are unpacked from the
block are then NaN or infinite, so the receiver refuses them as it refuses unpacked ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_async_localsgd.protocol.layout import Layout

Encoding = Literal["fp32", "bf16", "int8", "int4"]
"""How the parameters of a push or a model travel."""

BLOCK = 256
"""Values that share a scale."""

_CHUNK_BLOCKS = 512
"""Blocks that are packed together. Their fp32 values and the scratch memory fit into the cache of a core."""

_LEAST_MAXIMUM = 1e-30
"""Smallest maximum of a block that its scale is derived from. Scales of smaller ones would lose bits, or be zero."""

_GOLDEN = 40503
"""2**16 divided by the golden ratio. The multiples of it, modulo 2**16, fill the range evenly."""


class Codec:
    """Packs the flat fp32 vector of a layout, and unpacks it.

    The packed bytes are, in this order: the fp32 scales of the blocks (``int8``, ``int4``), the buffers (fp32), the
    second moments (bf16) and the parameters. The last block is padded with zeros. Of a block's ``int4`` values, the
    first half is in the low half of each byte.

    Packing works in chunks, without temporary tensors of the size of the model. Unpacking gives the same bits on every
    machine.

    Args:
        layout: layout of the vector.
        encoding: encoding of the parameters; not ``"fp32"``, which needs no packing.

    Attributes:
        encoding: encoding of the parameters.
        nbytes: size of the packed vector, in bytes.
        parameter_nbytes: size of its parameters with their scales, in bytes.

    Example::

        >>> from lightning_async_localsgd.protocol.layout import Layout
        >>> codec = Codec(Layout.of(torch.nn.Linear(256, 1, bias=False)), "int8")
        >>> codec.nbytes  # instead of 1024
        260
        >>> packed, residual = codec.new_packed(), torch.zeros(256)
        >>> push = torch.linspace(-1.0, 1.0, 256)
        >>> wanted = push.clone()
        >>> codec.pack_push(push, packed, residual)
        >>> torch.equal(push + residual, wanted)  # push is now what the receiver unpacks
        True

    """

    def __init__(self, layout: Layout, encoding: Encoding) -> None:
        self.encoding = encoding
        self._parameters = layout.parameter_numel
        self._model = layout.model_numel
        self._numel = layout.numel
        self._top = {"int8": 127.0, "int4": 7.0}.get(encoding)
        blocks = -(-self._parameters // BLOCK)
        if self._top is None:
            scales, codes = 0, 2 * self._parameters
        else:
            scales, codes = 4 * blocks, blocks * (BLOCK if encoding == "int8" else BLOCK // 2)
        self._buffers_at = scales
        self._moments_at = self._buffers_at + 4 * (self._model - self._parameters)
        self._codes_at = self._moments_at + 2 * (self._numel - self._model)
        self.nbytes = self._codes_at + codes
        self.parameter_nbytes = scales + codes
        rows = min(_CHUNK_BLOCKS, blocks)
        self._values = torch.empty(rows, BLOCK)
        self._scratch = torch.empty(rows, BLOCK)
        self._halves = torch.empty(rows if encoding == "int4" else 0, BLOCK // 2)
        self._maxima = torch.empty(rows, 1)
        self._numerator = torch.tensor(self._top or 1.0)

    def new_packed(self) -> Tensor:
        """Return memory for a packed vector, uint8."""
        return torch.empty(self.nbytes, dtype=torch.uint8)

    # ------------------------------------------------------------------- packing

    def pack_push(self, push: Tensor, packed: Tensor, residual: Tensor, number: int = 0) -> None:
        """Pack a push and what was left over from the pushes before it, and keep what rounding leaves over now.

        With residual e and push g: e is increased by g, Q(e) is packed, and e is decreased by what Q(e) is unpacked to.
        So what was sent in all plus the residual is what was to be sent.

        Args:
            push: flat fp32 vector. Becomes what the receiver will unpack.
            packed: receives the packed bytes.
            residual: the residual of the parameters, flat fp32. If a value of the push is not finite, it becomes zero.
            number: number of the push, see :meth:`_pack_moments`.

        """
        finite = True
        for begin, end, scales, codes in self._chunks(packed):
            rest, part = residual[begin:end], push[begin:end]
            rest.add_(part)
            if self._top is None:
                codes.copy_(rest)
                part.copy_(codes)
                rest.sub_(part)
                finite = finite and bool(torch.isfinite(rest.sum()))
                continue
            whole = end - begin == codes.shape[0] * BLOCK
            values = rest.view(-1, BLOCK) if whole else self._padded(rest)
            rounded = part.view(-1, BLOCK) if whole else self._scratch[:1]
            self._round(values, scales, codes, rounded)
            if not whole:
                part.copy_(rounded.view(-1)[: end - begin])
            rest.sub_(part)
            finite = finite and bool(torch.isfinite(scales.sum()))
        if not finite:
            # The server refuses the push. The next one must not be refused for the same values.
            residual.zero_()
        self._pack_rest(push, packed, number)
        self._unpack_moments(packed, push)

    def pack_model(self, model: Tensor, packed: Tensor, number: int = 0) -> None:
        """Pack a model as bf16.

        Args:
            model: flat fp32 vector.
            packed: receives the packed bytes.
            number: version of the model, see :meth:`_pack_moments`.

        """
        assert self._top is None
        for begin, end, _, codes in self._chunks(packed):
            codes.copy_(model[begin:end])
        self._pack_rest(model, packed, number)

    def pack_difference(self, model: Tensor, packed: Tensor, held: Tensor, number: int = 0) -> None:
        """Pack the difference of a model's parameters to those that the receiver holds, and everything else of it.

        Args:
            model: flat fp32 vector.
            packed: receives the packed bytes.
            held: flat fp32 vector that the receiver holds. Becomes what the receiver holds after it has unpacked.
            number: version of the model, see :meth:`_pack_moments`.

        """
        for begin, end, scales, codes in self._chunks(packed):
            rows, count = codes.shape[0], end - begin
            values, rounded = self._values[:rows], self._scratch[:rows]
            flat = values.view(-1)
            flat[count:].zero_()
            torch.sub(model[begin:end], held[begin:end], out=flat[:count])
            self._round(values, scales, codes, rounded)
            held[begin:end].add_(rounded.view(-1)[:count])
        self._pack_rest(model, packed, number)
        self._unpack_rest(packed, held)

    # ----------------------------------------------------------------- unpacking

    def unpack(self, packed: Tensor, out: Tensor, difference: bool = False) -> None:
        """Unpack a vector.

        Args:
            packed: the packed bytes.
            out: receives the vector, flat fp32.
            difference: add the parameters to those in ``out``, see :meth:`pack_difference`.

        """
        for begin, end, scales, codes in self._chunks(packed):
            part = out[begin:end]
            if self._top is None:
                part.copy_(codes)
                continue
            whole = end - begin == codes.shape[0] * BLOCK
            values = part.view(-1, BLOCK) if whole and not difference else self._scratch[: codes.shape[0]]
            if self.encoding == "int8":
                values.copy_(codes)
            else:
                values[:, : BLOCK // 2].copy_(codes & 15)
                values[:, BLOCK // 2 :].copy_(codes >> 4)
                values.sub_(8.0)
            values.mul_(scales)
            if difference:
                part.add_(values.view(-1)[: end - begin])
            elif not whole:
                part.copy_(values.view(-1)[: end - begin])
        self._unpack_rest(packed, out)

    # ------------------------------------------------------------------ internal

    def _chunks(self, packed: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Yield begin and end of each chunk of the parameters, its scales, and its codes, in rows of a block.

        The last block is a chunk of its own if it is padded.
        """
        if packed.dtype != torch.uint8 or packed.numel() != self.nbytes:
            raise ValueError(f"packed memory has {packed.numel()} bytes of {packed.dtype}, {self.nbytes} are needed")
        scales = packed[: self._buffers_at].view(torch.float32).view(-1, 1)
        codes = packed[self._codes_at :]
        step = _CHUNK_BLOCKS * BLOCK
        if self._top is None:
            halves = codes.view(torch.bfloat16)
            for begin in range(0, self._parameters, step):
                end = min(begin + step, self._parameters)
                yield begin, end, scales, halves[begin:end]
            return
        rows = codes.view(torch.int8).view(-1, BLOCK) if self.encoding == "int8" else codes.view(-1, BLOCK // 2)
        whole = self._parameters // BLOCK * BLOCK
        for begin in range(0, whole, step):
            end = min(begin + step, whole)
            yield begin, end, scales[begin // BLOCK : end // BLOCK], rows[begin // BLOCK : end // BLOCK]
        if whole < self._parameters:
            yield whole, self._parameters, scales[whole // BLOCK :], rows[whole // BLOCK :]

    def _padded(self, values: Tensor) -> Tensor:
        """Return less than a block of values as a row of a whole block."""
        row = self._values[:1]
        row.zero_()
        row.view(-1)[: values.numel()].copy_(values)
        return row

    def _round(self, values: Tensor, scales: Tensor, codes: Tensor, rounded: Tensor) -> None:
        """Round rows of blocks to integers, and write scales, codes, and what they are unpacked to."""
        factors = self._maxima[: values.shape[0]]
        torch.abs(values, out=rounded)
        torch.amax(rounded, 1, keepdim=True, out=factors)
        factors.clamp_(min=_LEAST_MAXIMUM)
        torch.div(factors, self._numerator, out=scales)
        torch.div(self._numerator, factors, out=factors)
        torch.mul(values, factors, out=rounded).round_()
        if self.encoding == "int8":
            codes.copy_(rounded)
        else:
            halves = self._halves[: values.shape[0]]
            torch.add(rounded[:, : BLOCK // 2], rounded[:, BLOCK // 2 :], alpha=16.0, out=halves)
            codes.copy_(halves.add_(8.0 * 17.0))
        rounded.mul_(scales)

    def _pack_rest(self, values: Tensor, packed: Tensor, number: int) -> None:
        packed[self._buffers_at : self._moments_at].view(torch.float32).copy_(values[self._parameters : self._model])
        self._pack_moments(values[self._model :], packed[self._moments_at : self._codes_at].view(torch.int16), number)

    def _unpack_rest(self, packed: Tensor, out: Tensor) -> None:
        out[self._parameters : self._model].copy_(packed[self._buffers_at : self._moments_at].view(torch.float32))
        self._unpack_moments(packed, out)

    def _unpack_moments(self, packed: Tensor, out: Tensor) -> None:
        out[self._model :].copy_(packed[self._moments_at : self._codes_at].view(torch.bfloat16))

    def _pack_moments(self, moments: Tensor, codes: Tensor, number: int) -> None:
        """Round moments to bf16, up or down so that they are right on average over many numbers.

        A moment changes little in a round. If it were rounded to nearest each time, small changes would be lost for
        good, and it would stay where it is. So a fraction that is different for each ``number`` is added to the bits
        that are cut off.
        """
        fraction = number * _GOLDEN % 2**16
        step = _CHUNK_BLOCKS * BLOCK
        for begin in range(0, moments.numel(), step):
            part, out = moments[begin : begin + step], codes[begin : begin + step]
            out.copy_(part.view(torch.int32).add(fraction).bitwise_right_shift_(16))
            # The bits of a NaN may overflow.
            out.masked_fill_(torch.isnan(part), 0x7FC0)


def codec_of(layout: Layout, encoding: Encoding) -> Codec | None:
    """Return the codec of an encoding; None for ``"fp32"``, which travels as it is."""
    return None if encoding == "fp32" else Codec(layout, encoding)
