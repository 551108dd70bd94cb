"""Bandwidth of the links between workers and server: what a cell's messages need on them."""

from __future__ import annotations

import functools
import statistics

from benchmarks.study.cells import Cell
from lightning_async_localsgd.protocol.codecs import codec_of
from lightning_async_localsgd.protocol.layout import Layout
from lightning_async_localsgd.protocol.options import Download, Upload
from lightning_async_localsgd.simulation.devices import Link

_PARAMETERS = 1 << 20
"""Parameters of the model whose packed size is computed. Shares of larger models are the same."""


def link_of(cell: Cell, parameters: int) -> Link:
    """Return the link of each worker of a cell, whose model has a number of parameters."""
    fp32_bytes = 4 * parameters * (2 if cell.moments else 1)
    if cell.link_seconds == 0.0:
        return Link(cell.exchange_seconds)
    return Link(cell.exchange_seconds, 2 * fp32_bytes / cell.link_seconds)


def packed_share(cell: Cell) -> float:
    """Return the bytes of a push and a model of a cell, relative to those in fp32."""
    return statistics.fmean(_share(encoding, cell.moments) for encoding in (cell.upload, cell.download))


@functools.cache
def _share(encoding: Upload | Download, moments: bool) -> float:
    layout = Layout(
        [
            ("weight", (_PARAMETERS,), "torch.float32", "parameter"),
            *([("moment", (_PARAMETERS,), "torch.float32", "moment")] if moments else []),
        ]
    )
    codec = codec_of(layout, encoding)
    return 1.0 if codec is None else codec.nbytes / (4 * layout.numel)
