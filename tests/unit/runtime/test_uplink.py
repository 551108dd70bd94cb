"""Where a worker's pushes are computed and packed."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from lightning_async_localsgd import ExchangeOptions
from lightning_async_localsgd.protocol.codecs import codec_of
from lightning_async_localsgd.protocol.layout import Binding, Layout
from lightning_async_localsgd.protocol.messages import Reply
from lightning_async_localsgd.runtime.uplink import Uplink
from lightning_async_localsgd.runtime.worker import Worker
from lightning_async_localsgd.wire.received_models import ReceivedModels


def module_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 40), nn.BatchNorm1d(40), nn.Linear(40, 3, dtype=torch.bfloat16))


def worker_of(encoding: Any, own_vector: bool, sends_packed: bool) -> tuple[Worker, nn.Module]:
    """Return a worker that has joined; with ``own_vector``, it packs as on a device."""
    module = module_of()
    binding = Binding(Layout.of(module), module)
    exchange = Mock(recalled_version=-1, sends_packed=sends_packed)
    exchange.join.return_value = exchange.push.return_value = Reply("i", 0, 1, 0, 4, 0.0, 1.0, 0.0, False, None)
    worker = Worker(0, binding, exchange, exchange_options=ExchangeOptions(upload=encoding))
    worker.uplink = Uplink(binding.layout, encoding, own_vector=own_vector)
    binding.read(worker.model)
    worker.join()
    return worker, module


@pytest.mark.parametrize("encoding", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("sends_packed", [False, True])
def test_pushes_computed_in_memory_of_their_own_are_the_same(encoding: Any, sends_packed: bool) -> None:
    pairs = [worker_of(encoding, own_vector, sends_packed) for own_vector in (False, True)]
    for seed in range(3):
        for worker, module in pairs:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.01)
            worker.count_step()
            worker.end_round()
        (here, _), (there, _) = pairs
        assert here.uplink is not None
        assert there.uplink is not None
        assert torch.equal(here.uplink.packed, there.uplink.packed)
        assert torch.equal(here.uplink.residual, there.uplink.residual)
        assert here.uplink.residual.any()
        # An exchange that sends the packed bytes does not need the vector on the host.
        assert torch.equal(here.gradient, there.gradient) is not sends_packed


def test_modules_on_the_cpu_pack_in_the_memory_of_the_worker() -> None:
    module = module_of()
    binding = Binding(Layout.of(module), module)
    assert binding.device == torch.device("cpu")
    worker = Worker(0, binding, Mock(sends_packed=True), exchange_options=ExchangeOptions(upload="int8"))
    assert worker.uplink is not None
    assert worker.uplink.vector is None


@pytest.mark.parametrize(
    ("options", "dtype", "vectors", "residuals"),
    [
        ({}, torch.float32, 2, 0),
        ({"overlap": True}, torch.float32, 3, 0),
        ({"upload": "int8"}, torch.float32, 2, 1),
        ({"upload": "int4", "download": "bf16"}, torch.float32, 2, 1),
        ({"upload": "int4", "download": "int8", "overlap": True}, torch.float32, 3, 1),
        ({"upload": "int8", "download": "int8"}, torch.bfloat16, 3, 1),
    ],
)
def test_worker_memory(options: dict[str, Any], dtype: torch.dtype, vectors: int, residuals: int) -> None:
    """docs/slow-networks.md has these numbers. A vector is fp32 and as long as the layout."""
    module = nn.Linear(100, 10, bias=False, dtype=dtype)
    binding = Binding(Layout.of(module), module)
    exchange = Mock(recalled_version=-1, sends_packed=True)
    overlap_steps = 2 if options.get("overlap") else 0
    reply = Reply("i", 0, 1, 0, 1, 0.0, 1.0, 0.0, False, None, overlap_steps=overlap_steps)
    exchange.join.return_value = exchange.push.return_value = reply
    worker = Worker(0, binding, exchange, exchange_options=ExchangeOptions(**options))
    worker.join()
    worker.count_step()
    worker.end_round()
    worker.adopt_answer(wait=True)
    received = ReceivedModels(binding.layout, codec_of(binding.layout, options.get("download", "fp32")))
    parts = [vars(part) for part in (worker, worker.uplink, received) if part is not None]
    if worker._local_progress is not None:
        parts += [vars(worker._local_progress), worker._local_progress._pushed.tensors]
    found = {id(value): value.nbytes for part in parts for value in part.values() if isinstance(value, torch.Tensor)}

    codecs = [codec_of(binding.layout, options.get(name, "fp32")) for name in ("upload", "download")]
    packed = sum(0 if codec is None else codec.nbytes for codec in codecs)
    assert sum(found.values()) == (vectors + residuals) * 4 * binding.layout.numel + packed


def test_copied_residual_does_not_change_with_the_residual() -> None:
    uplink = Uplink(Layout([("weight", (300,), "torch.float32", "parameter")]), "int8")
    copied = uplink.copy_residual()
    uplink.residual.fill_(1.0)
    assert not copied.any()
