"""Packed pushes and models between workers and a server, with lost replies, repeated and refused pushes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async_localsgd.outer import TorchOptimizer
from lightning_async_localsgd.protocol.buffers import BufferPool
from lightning_async_localsgd.protocol.codecs import codec_of
from lightning_async_localsgd.protocol.layout import Binding, Layout
from lightning_async_localsgd.protocol.messages import Push
from lightning_async_localsgd.protocol.options import ExchangeOptions
from lightning_async_localsgd.runtime.worker_base import WorkerBase
from lightning_async_localsgd.server import traffic
from lightning_async_localsgd.server.server import Server
from lightning_async_localsgd.server.traffic import Traffic
from lightning_async_localsgd.wire import frames
from lightning_async_localsgd.wire.received_models import ReceivedModels
from tests.harness import hello, make_coordinator
from tests.unit.server.serving import RecordingChannel

WORKERS = 2


def module_of(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.BatchNorm1d(20)).to(dtype)


def serve(layout: Layout, options: ExchangeOptions, dtype: torch.dtype = torch.float32) -> Server:
    optimizer = TorchOptimizer(torch.optim.SGD, lr=1.0)
    coordinator = make_coordinator(WORKERS, optimizer, grace=0.0, local_steps=5, layout=layout)
    Binding(layout, module_of(dtype)).read(coordinator.model.theta)
    buffers = BufferPool(layout.numel)
    way = Traffic(layout, buffers, options.upload, options.download, WORKERS)
    return Server(coordinator, buffers, threaded=False, traffic=way)


class PackedWorker:
    """A worker whose bytes travel as they do on the wire. Checks what must always hold."""

    def __init__(self, number: int, server: Server, layout: Layout, options: ExchangeOptions, dtype: Any) -> None:
        self.server, self.layout = server, layout
        self.module = module_of(dtype)
        self.binding = Binding(layout, self.module)
        self.worker = WorkerBase(number, self.binding, exchange_options=options)
        self.received = ReceivedModels(layout, codec_of(layout, options.download))
        self.channel = RecordingChannel()
        self.applied = torch.zeros(layout.numel)
        self.encodings: list[str] = []

    def receive(self, lost: bool) -> bool:
        """Receive the latest answer, or lose it."""
        reply, lease = self.channel.replies[-1], self.channel.leases.pop()
        if not lost:
            memory = self.received.memory(reply, self.worker.model)
            memory[:] = frames.memory_of(lease.tensor)
            self.received.complete(reply, self.worker.model)
            self.encodings.append(reply.encoding)
            self.worker.adopt(reply)
        lease.release()
        return not lost

    def join(self) -> None:
        self.server.join(self.worker.hello, self.channel)

    def train(self, seed: int, size: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in self.binding.tensors():
                tensor.sub_(size * torch.rand(tensor.shape, generator=generator))
        self.worker.count_step()

    def push(self, losses: int = 0, **changes: Any) -> Push:
        """Push the round, whose answer is lost ``losses`` times."""
        uplink, numel = self.worker.uplink, self.layout.parameter_numel
        local = self.binding.new_flat()
        self.binding.subtract_from(self.worker.model, local)
        before = torch.zeros(numel) if uplink is None else uplink.residual.clone()
        wanted = before + local[:numel]
        push = dataclasses.replace(self.worker.make_push(), **changes)
        if uplink is not None and push.steps > 0 and bool(torch.isfinite(wanted).all()):
            sent = self.worker.gradient[:numel]
            assert torch.equal(sent.double() + uplink.residual.double(), wanted.double())
            assert torch.equal(self.worker.gradient[numel : self.layout.model_numel], local[numel:])
        content = self.worker.gradient if uplink is None else uplink.packed
        first = content.clone()
        for attempt in range(losses + 1):
            lease = self.server._traffic.uploads.try_acquire()
            assert lease is not None
            frames.memory_of(lease.tensor)[:] = frames.memory_of(content)
            assert torch.equal(content.view(torch.uint8), first.view(torch.uint8)), "repeated with the same bytes"
            self.server.push(push, lease, self.channel)
            self.receive(lost=attempt < losses)
        return push


def start(
    options: ExchangeOptions, dtype: torch.dtype = torch.float32
) -> tuple[Server, list[PackedWorker], torch.Tensor]:
    layout = Layout.of(module_of(dtype))
    server = serve(layout, options, dtype)
    workers = [PackedWorker(number, server, layout, options, dtype) for number in range(WORKERS)]
    for worker in workers:
        worker.join()
    for worker in workers:
        worker.receive(lost=False)
    return server, workers, theta_of(server)


def theta_of(server: Server) -> torch.Tensor:
    out = torch.empty(server.layout.numel)
    server.copy_model(out)
    return out


options = st.builds(
    ExchangeOptions,
    upload=st.sampled_from(["fp32", "bf16", "int8", "int4"]),
    download=st.sampled_from(["fp32", "bf16", "int8"]),
)
rounds = st.lists(
    st.tuples(
        st.integers(0, WORKERS - 1),
        st.sampled_from([1e-6, 1e-3, 1e-1]),
        st.sampled_from(["good", "good", "good", "nan", "base", "empty", "away"]),
        st.sampled_from([0, 0, 0, 1, 2]),
    ),
    max_size=15,
)


@given(options=options, rounds=rounds, dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
@settings(max_examples=30, deadline=None)
def test_each_push_counts_once_and_each_worker_holds_what_the_server_believes(
    options: ExchangeOptions, rounds: list[tuple[int, float, str, int]], dtype: torch.dtype
) -> None:
    server, workers, expected = start(options, dtype)
    numel = server.layout.parameter_numel
    diverged = 0
    for seed, (number, size, kind, losses) in enumerate(rounds):
        worker = workers[number]
        diverged += kind == "nan"
        if kind == "nan" and diverged > 2:
            continue  # The worker would be quarantined.
        if kind == "away":
            server.lost(number, worker.worker.session, "test")
        if kind != "empty":
            worker.train(seed, size)
        if kind == "nan":
            worker.binding.tensors()[0].data[3, 3] = math.nan
        changes = {"base_version": 10_000} if kind == "base" else {}

        worker.push(losses, **changes)

        reply, uplink = worker.channel.replies[-1], worker.worker.uplink
        if kind in ("good", "away"):
            assert reply.refused in (None, "already applied")
            expected[:numel] -= worker.worker.gradient[:numel]
        elif kind == "empty":
            assert reply.refused in (None, "already applied")
        else:
            assert reply.refused is not None
            assert ("NaN" in reply.refused) == (kind == "nan")
            assert uplink is None or not uplink.residual.any(), "the residual of a refused push is dropped"
        theta = theta_of(server)
        assert torch.equal(theta[:numel], expected[:numel])
        held = server._traffic._held.get(number)
        model = worker.received._held if worker.received._held is not None else worker.worker.model
        assert (held is not None) == (options.download == "int8")
        if held is not None:
            assert torch.equal(held.model, model)
        if dtype == torch.float32:
            bound = {"fp32": 0.0, "bf16": 2**-8, "int8": 1e-2}[options.download]
            assert float((worker.worker.model - theta)[:numel].abs().max()) <= bound
            assert torch.equal(worker.worker.model[numel:], theta[numel:])
        assert server._traffic._exact.in_use == server._traffic.uploads.in_use == 0

    server.stop()
    for worker in workers:
        worker.worker.make_push(final=True)
    assert all(pool is None or pool.in_use == 0 for pool in (server._traffic._rounded, server._traffic._differences))
    server.close()


def test_first_and_repeated_models_are_exact_and_the_others_differences() -> None:
    server, (worker, _), _ = start(ExchangeOptions(download="int8"))
    worker.train(0, 1e-3)
    worker.push()
    worker.train(1, 1e-3)
    worker.push(losses=1)
    worker.train(2, 1e-3)
    worker.push()

    assert worker.encodings == ["fp32", "int8", "fp32", "int8"]
    server.close()


@pytest.mark.parametrize("download", ["bf16", "int8"])
def test_final_model_is_exact(download: Any) -> None:
    server, workers, _ = start(ExchangeOptions(upload="int8", download=download))
    for worker in workers:
        worker.train(1, 1e-2)
        worker.push()
    server.stop()
    for worker in workers:
        worker.train(2, 1e-2)
        push = worker.worker.make_push(final=True)
        lease = server._traffic.uploads.try_acquire()
        assert lease is not None
        lease.tensor.copy_(worker.worker.uplink.packed)  # type: ignore[union-attr]
        server.push(push, lease, worker.channel)
    for worker in workers:
        worker.receive(lost=False)
        assert worker.encodings[-1] == "fp32"
        assert torch.equal(worker.worker.model, theta_of(server))
    server.close()


def test_workers_that_are_dispatched_together_get_one_rounded_model() -> None:
    layout = Layout.of(module_of())
    server = serve(layout, ExchangeOptions(download="bf16"))
    channels = [RecordingChannel() for _ in range(WORKERS)]
    for number, channel in enumerate(channels):
        server.join(hello(number, None, layout, download="bf16"), channel)

    leases = [channel.leases.pop() for channel in channels]
    assert leases[0] is leases[1]
    assert leases[0].tensor.dtype == torch.uint8
    for lease in leases:
        lease.release()
    assert server._traffic._rounded is not None
    assert server._traffic._rounded.in_use == 0
    server.close()


@pytest.mark.parametrize(("option", "value"), [("upload", "int8"), ("download", "bf16")])
def test_worker_with_other_options_is_told_which_differ(option: str, value: str) -> None:
    layout = Layout.of(module_of())
    server, channel = serve(layout, ExchangeOptions()), RecordingChannel()

    server.join(hello(1, None, layout, **{option: value}), channel)

    assert channel.refusals == [
        f"worker 1 has exchange.{option}={value!r} and rank 0 has 'fp32'; give all ranks the same options"
    ]
    server.close()


def test_memory_for_what_workers_hold_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.of(module_of())
    monkeypatch.setattr(traffic, "MAX_HELD_BYTES", 4 * layout.numel * 2)
    Traffic(layout, BufferPool(layout.numel), download="bf16", workers=3)
    way = Traffic(layout, BufferPool(layout.numel), download="int8", workers=2)
    with pytest.raises(ValueError, match=r"download='int8' keeps a copy.* 3 workers x .*GiB.*use download='bf16'"):
        Traffic(layout, BufferPool(layout.numel), download="int8", workers=3)
    assert "3 workers" in (way.check(hello(2, None, layout, download="int8"), others=2) or "")


def test_reconnecting_worker_needs_no_further_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.of(module_of())
    monkeypatch.setattr(traffic, "MAX_HELD_BYTES", 4 * layout.numel * WORKERS)
    server, workers, _ = start(ExchangeOptions(download="int8"))
    server._traffic.forget(1)  # As after a push that contradicts what the worker was sent.
    again, late = RecordingChannel(), RecordingChannel()
    server.join(dataclasses.replace(workers[1].worker.hello, reconnecting=True), again)
    server.join(hello(WORKERS, None, layout, download="int8"), late)
    assert not again.refusals
    assert "download='int8' keeps a copy" in late.refusals[0]
    server.close()


def test_memory_of_a_quarantined_worker_is_freed() -> None:
    server, workers, _ = start(ExchangeOptions(download="int8"))
    for seed in range(20):
        if 1 in server.quarantined:
            break
        workers[1].train(seed, 1e-2)
        workers[1].binding.tensors()[0].data.fill_(math.nan)
        lease = server._traffic.uploads.try_acquire()
        assert lease is not None
        push = workers[1].worker.make_push()
        lease.tensor.copy_(workers[1].worker.gradient)
        server.push(push, lease, workers[1].channel)
        if workers[1].channel.leases:
            workers[1].receive(lost=False)

    assert server.quarantined == {1}
    assert set(server._traffic._held) == {0}
    server.close()


@pytest.mark.parametrize(
    ("upload", "download", "vectors", "packed_pushes", "packed_models"),
    [
        ("fp32", "fp32", 1, 0, 0),
        ("int8", "fp32", 2, 1, 0),
        ("fp32", "bf16", 1, 0, 1),
        ("int4", "bf16", 2, 1, 1),
        ("int8", "int8", 2 + WORKERS, 1, 1),
    ],
)
def test_server_memory_of_pushes_and_models(
    upload: Any, download: Any, vectors: int, packed_pushes: int, packed_models: int
) -> None:
    """docs/slow-networks.md has these numbers. A vector is fp32 and as long as the layout."""
    server, workers, _ = start(ExchangeOptions(upload=upload, download=download))
    for seed in range(3):
        for worker in workers:
            worker.train(seed, 1e-3)
            worker.push()

    traffic = server._traffic
    found = (traffic._exact, traffic.uploads, traffic._rounded, traffic._differences)
    pools = {id(pool): pool for pool in found if pool is not None}.values()
    tensors = [traffic._gradient, traffic._packed, *(held.model for held in traffic._held.values())]
    nbytes = sum(pool.allocated * pool._numel * pool._dtype.itemsize for pool in pools)
    nbytes += sum(tensor.nbytes for tensor in tensors if tensor is not None)
    codecs = [codec_of(server.layout, encoding) for encoding in (upload, download)]
    push, model = (0 if codec is None else codec.nbytes for codec in codecs)
    assert nbytes == vectors * 4 * server.layout.numel + packed_pushes * push + packed_models * model
    server.close()
