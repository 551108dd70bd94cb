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

import functools
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

_CHUNK_BLOCKS = 1024
"""Blocks that are packed together on a CPU. Their values and the scratch memory stay in its caches. Smaller chunks take
longer, because each operation has a cost of its own."""

_DEVICE_CHUNK_BLOCKS = 1 << 16
"""Blocks that are packed together on another device, which needs large operations."""

_LEAST_MAXIMUM = 1e-30
"""Smallest maximum of a block that its scale is derived from. Scales of smaller ones would lose bits, or be zero."""

_GOLDEN = 40503
"""2**16 divided by the golden ratio. The multiples of it, modulo 2**16, fill the range evenly."""


class _Chunk:
    """A part of the parameters that is packed or unpacked together.

    Args:
        scales: scales of the blocks, one a row.
        codes: packed values.
        flats: the values of flat vectors.
        tails: what ``flats`` was copied from, to be padded; None if they are views of the vectors.

    """

    def __init__(self, scales: Tensor, codes: Tensor, flats: list[Tensor], tails: list[Tensor] | None = None) -> None:
        self.scales = scales
        self.codes = codes
        self.flats = flats
        self._tails = tails

    def store(self, count: int | None = None) -> None:
        """Copy padded values back to the first ``count`` vectors, or to all."""
        if self._tails is not None:
            for tail, row in list(zip(self._tails, self.flats, strict=True))[:count]:
                tail.copy_(row[0, : len(tail)])


class Codec:
    """Packs the flat fp32 vector of a layout, and unpacks it.

    The packed bytes are, in this order: the fp32 scales of the blocks (``int8``, ``int4``), the buffers (fp32), the
    second moments (bf16) and the parameters. The last block is padded with zeros. A byte with two ``int4`` values is
    the signed number ``a + 16 * b``, where ``a`` is of the first half of the block and ``b`` of the second.

    Packing works in chunks, without temporary tensors of the size of the model. Unpacking gives the same bits on every
    machine.

    Args:
        layout: layout of the vector.
        encoding: encoding of the parameters; not ``"fp32"``, which needs no packing.
        device: device of the vectors and of the packed bytes.

    Attributes:
        encoding: encoding of the parameters.
        device: device of the vectors and of the packed bytes.
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

    def __init__(self, layout: Layout, encoding: Encoding, device: torch.device | str = "cpu") -> None:
        self.encoding = encoding
        self.device = torch.device(device)
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
        self._rows = min(_CHUNK_BLOCKS if self.device.type == "cpu" else _DEVICE_CHUNK_BLOCKS, blocks)
        # The scratch memory of a chunk. bf16 needs none.
        halves = self._rows if encoding == "int4" else 0
        self._halves, self._upper = (torch.empty(halves, BLOCK // 2, device=self.device) for _ in range(2))
        self._maxima = torch.empty(0 if self._top is None else self._rows, 1, device=self.device)
        self._numerator = torch.tensor(self._top or 1.0, device=self.device)

    def new_packed(self) -> Tensor:
        """Return memory for a packed vector, uint8."""
        return torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)

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
        sums: list[Tensor] = []
        for chunk in self._chunks(packed, residual, push):
            (rest, part), codes = chunk.flats, chunk.codes
            rest.add_(part)
            if self._top is None:
                codes.copy_(rest)
                rest.sub_(part.copy_(codes))  # An operation with two dtypes would take several times as long.
                sums.append(rest.sum())
            else:
                self._round(rest, chunk.scales, codes, part)
                rest.sub_(part)
            chunk.store()
        marks = torch.stack(sums) if self._top is None else packed[: self._buffers_at].view(torch.float32)
        if not bool(torch.isfinite(marks).all()):
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
        for chunk in self._chunks(packed, model):
            chunk.codes.copy_(chunk.flats[0])
        self._pack_rest(model, packed, number)

    def pack_difference(self, model: Tensor, packed: Tensor, held: Tensor, number: int = 0) -> None:
        """Pack the difference of a model's parameters to those that the receiver holds, and everything else of it.

        Args:
            model: flat fp32 vector.
            packed: receives the packed bytes.
            held: flat fp32 vector that the receiver holds. Becomes what the receiver holds after it has unpacked.
            number: version of the model, see :meth:`_pack_moments`.

        """
        for chunk in self._chunks(packed, held, model):
            holds, wanted = chunk.flats
            values, rounded = (scratch[: len(holds)] for scratch in self._differences)
            torch.sub(wanted, holds, out=values)
            self._round(values, chunk.scales, chunk.codes, rounded)
            holds.add_(rounded)
            chunk.store(1)
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
        for chunk in self._chunks(packed, out):
            (part,), codes = chunk.flats, chunk.codes
            if self._top is None:
                part.copy_(codes)
                continue
            values = self._differences[0][: len(part)] if difference else part
            if self.encoding == "int8":
                values.copy_(codes)
                values.mul_(chunk.scales)
            else:
                self._unpack_halves(codes, chunk.scales, values)
            if difference:
                part.add_(values)
            chunk.store()
        self._unpack_rest(packed, out)

    # ------------------------------------------------------------------ internal

    @functools.cached_property
    def _differences(self) -> tuple[Tensor, Tensor]:
        """Scratch memory of a chunk of a difference."""
        values, rounded = (torch.empty(self._rows, BLOCK, device=self.device) for _ in range(2))
        return values, rounded

    def _chunks(self, packed: Tensor, *flats: Tensor) -> Iterator[_Chunk]:
        """Yield the chunks of the parameters, in rows of a block; with bf16, in one dimension.

        The last block is a chunk of its own if it is padded.
        """
        if packed.dtype != torch.uint8 or packed.numel() != self.nbytes:
            raise ValueError(f"packed memory has {packed.numel()} bytes of {packed.dtype}, {self.nbytes} are needed")
        count, codes = self._parameters, packed[self._codes_at :]
        if self._top is None:
            step = self._rows * BLOCK
            halves = torch.split(codes.view(torch.bfloat16), step)
            for part, *parts in zip(halves, *(torch.split(flat[:count], step) for flat in flats), strict=True):
                yield _Chunk(packed, part, parts)
            return
        scales = packed[: self._buffers_at].view(torch.float32).view(-1, 1)
        rows = codes.view(torch.int8).view(len(scales), -1)
        blocks, left = divmod(count, BLOCK)
        if blocks:
            whole = [flat[: blocks * BLOCK].view(-1, BLOCK) for flat in flats]
            tensors = (scales[:blocks], rows[:blocks], *whole)
            # One call for all views is much faster than slicing.
            for scale, row, *parts in zip(*(torch.split(tensor, self._rows) for tensor in tensors), strict=True):
                yield _Chunk(scale, row, parts)
        if left:
            tails = [flat[blocks * BLOCK : count] for flat in flats]
            padded = [torch.zeros(1, BLOCK, device=self.device) for _ in tails]
            for row, tail in zip(padded, tails, strict=True):
                row[0, :left].copy_(tail)
            yield _Chunk(scales[blocks:], rows[blocks:], padded, tails)

    def _round(self, values: Tensor, scales: Tensor, codes: Tensor, rounded: Tensor) -> None:
        """Round rows of blocks to integers, and write scales, codes, and what they are unpacked to."""
        factors = self._maxima[: len(values)]
        torch.abs(values, out=rounded)
        torch.amax(rounded, 1, keepdim=True, out=factors)
        factors.clamp_(min=_LEAST_MAXIMUM)
        torch.div(factors, self._numerator, out=scales)
        torch.div(self._numerator, factors, out=factors)
        torch.mul(values, factors, out=rounded).round_()
        if self.encoding == "int8":
            codes.copy_(rounded)
        else:
            halves = self._halves[: len(values)]
            codes.copy_(torch.add(rounded[:, : BLOCK // 2], rounded[:, BLOCK // 2 :], alpha=16.0, out=halves))
        rounded.mul_(scales)

    def _unpack_halves(self, codes: Tensor, scales: Tensor, out: Tensor) -> None:
        """Unpack rows of bytes with two values each."""
        both, upper = self._halves[: len(codes)], self._upper[: len(codes)]
        both.copy_(codes)
        torch.mul(both, 1.0 / 16.0, out=upper).round_()  # The lower value is less than half of 16.
        torch.mul(upper, scales, out=out[:, BLOCK // 2 :])
        both.sub_(upper, alpha=16.0)
        torch.mul(both, scales, out=out[:, : BLOCK // 2])

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
        step = self._rows * BLOCK
        for begin in range(0, moments.numel(), step):
            part, out = moments[begin : begin + step], codes[begin : begin + step]
            out.copy_(part.view(torch.int32).add(fraction).bitwise_right_shift_(16))
            # The bits of a NaN may overflow.
            out.masked_fill_(torch.isnan(part), 0x7FC0)


def codec_of(layout: Layout, encoding: Encoding, device: torch.device | str = "cpu") -> Codec | None:
    """Return the codec of an encoding; None for ``"fp32"``, which travels as it is."""
    return None if encoding == "fp32" else Codec(layout, encoding, device)
