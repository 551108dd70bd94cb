"""CUDA devices: one process per device, copies through pinned memory, and NCCL for collectives.

If there is only one device, two ranks share it. They use gloo, because NCCL needs one device per rank.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_async_localsgd import AsyncLocalSGDStrategy, SimulatedAsyncLocalSGDStrategy
from lightning_async_localsgd.protocol.layout import Binding, Layout
from lightning_async_localsgd.protocol.messages import Reply
from lightning_async_localsgd.runtime.uplink import Uplink
from lightning_async_localsgd.runtime.worker import Worker
from tests.lightning_contract.launching import TORCHRUN, free_port
from tests.lightning_models import quiet_trainer
from tests.processes import Jobs

JOB = Path(__file__).with_name("cuda_job.py")


def needs_gpus(number: int) -> Callable[[Callable[..., None]], Any]:
    """Return a decorator that skips a test on machines with fewer CUDA devices."""
    found = torch.cuda.device_count()
    skip = pytest.mark.skipif(found < number, reason=f"needs {number} CUDA device(s), has {found}")
    return lambda test: pytest.mark.gpu(skip(test))


class Mixed(nn.Module):
    """Has parameters of two dtypes and statistics on a device, and a buffer on the CPU."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.wide = nn.Linear(512, 512, device=device)
        self.half = nn.Linear(512, 64, device=device, dtype=torch.bfloat16)
        self.norm = nn.BatchNorm1d(64, device=device)
        self.register_buffer("kept", torch.full((3,), 5.0))


@pytest.fixture
def modules() -> tuple[Mixed, Mixed]:
    """Return the same module on the CPU and on a device."""
    torch.manual_seed(0)
    here, there = Mixed("cpu"), Mixed("cuda")
    there.load_state_dict(here.state_dict())
    return here, there


def test_flat_vectors_of_a_module_on_the_cpu_are_not_pinned() -> None:
    module = Mixed("cpu")
    flat = Binding(Layout.of(module), module).new_flat()
    assert not flat.is_pinned()
    assert not flat.any()


@needs_gpus(1)
def test_flat_vectors_of_a_module_on_a_device_are_pinned() -> None:
    module = Mixed("cuda")
    flat = Binding(Layout.of(module), module).new_flat()
    assert flat.is_pinned()
    assert not flat.any()


@needs_gpus(1)
def test_copies_are_complete_when_the_call_returns(modules: tuple[Mixed, Mixed]) -> None:
    bindings = [Binding(Layout.of(module), module) for module in modules]
    flats = [binding.new_flat() for binding in bindings]
    values = torch.randn(bindings[0].layout.numel)
    for binding, flat in zip(bindings, flats, strict=True):
        flat.copy_(values)
        binding.load(flat)
        rounded = flat.clone()
        flat.fill_(torch.nan)  # If a copy still read from here, or were made later, NaN would be in the result.
        binding.read(flat)
        torch.testing.assert_close(flat, rounded, rtol=0, atol=0)
    torch.testing.assert_close(*flats, rtol=0, atol=0)

    pushes = [binding.new_flat() for binding in bindings]
    for module, binding, flat, push in zip(modules, bindings, flats, pushes, strict=True):
        with torch.no_grad():
            # The device still computes this when the push is made.
            for _ in range(200):
                for parameter in module.parameters():
                    parameter.mul_(1.0)
            for parameter in module.parameters():
                parameter.mul_(0.5)
        binding.subtract_from(flat, push)
    torch.testing.assert_close(*pushes, rtol=0, atol=0)
    half = bindings[0].layout.views(pushes[0])["wide.weight"]
    torch.testing.assert_close(half, bindings[0].layout.views(flats[0])["wide.weight"] / 2)


@needs_gpus(1)
@pytest.mark.parametrize("encoding", ["bf16", "int8", "int4"])
def test_pushes_are_packed_on_the_device(modules: tuple[Mixed, Mixed], encoding: Any) -> None:
    bindings = [Binding(Layout.of(module), module) for module in modules]
    assert [binding.device.type for binding in bindings] == ["cpu", "cuda"]
    uplinks = [Uplink(binding.layout, encoding, device=binding.device) for binding in bindings]
    base = bindings[0].new_flat()
    bindings[0].read(base)
    for step in range(2):
        pushes = []
        for module, binding, uplink in zip(modules, bindings, uplinks, strict=True):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.mul_(1.0 - 2.0 ** -(3 + step))
            vector = binding.new_flat() if uplink.vector is None else uplink.vector
            binding.subtract_from(base, vector)
            uplink.pack(vector, step)
            pushes.append(vector.cpu())
        assert uplinks[1].packed.is_pinned()
        assert uplinks[1].residual.is_cuda
        assert torch.equal(uplinks[0].packed, uplinks[1].packed)
        torch.testing.assert_close(*pushes, rtol=0, atol=0)
        torch.testing.assert_close(uplinks[0].residual, uplinks[1].copy_residual(), rtol=0, atol=0)


class Device:
    """A binding whose device needs some seconds to finish queued work.

    Args:
        clock: the time, which passes in :meth:`synchronize`.
        behind: seconds of queued work.

    """

    def __init__(self, clock: list[float], behind: float) -> None:
        module = nn.Linear(2, 2)
        self._binding = Binding(Layout.of(module), module)
        self._clock = clock
        self._behind = behind

    def synchronize(self) -> None:
        self._clock[0] += self._behind

    def __getattr__(self, name: str) -> Any:
        return getattr(self._binding, name)


def test_queued_work_of_a_device_counts_as_compute_time_of_the_round() -> None:
    clock = [0.0]
    exchange = Mock(recalled_version=-1)
    reply = Reply(
        incarnation="i",
        sequence=0,
        version=1,
        staleness=0,
        local_steps=4,
        progress=0.0,
        progress_per_step=1.0,
        wait_seconds=0.0,
        stop=False,
        refused=None,
    )
    exchange.join.return_value = exchange.push.return_value = reply
    worker = Worker(0, Device(clock, behind=3.0), exchange, clock=lambda: clock[0])  # type: ignore[arg-type]
    worker.join()
    for _ in range(3):
        clock[0] += 1.0
        worker.count_step()
        worker.end_step(8)
    worker.end_round()
    push = exchange.push.call_args[0][0]
    assert (push.timed_steps, push.compute_seconds) == (2, 5.0), "the first step is not timed"


def trainer(folder: Path, **options: Any) -> L.Trainer:
    return quiet_trainer(**{"accelerator": "gpu", "default_root_dir": folder, **options})


@needs_gpus(1)
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true"])
def test_one_device_trains_saves_resumes_and_validates(tmp_path: Path, precision: Any) -> None:
    module = BoringModel()
    strategy = AsyncLocalSGDStrategy(local_steps=5)
    fit = trainer(
        tmp_path, strategy=strategy, precision=precision, max_steps=20, val_check_interval=5, enable_checkpointing=True
    )
    fit.fit(module)
    assert fit.strategy.root_device.type == "cuda"
    assert fit.global_step == 20
    saved = torch.load(fit.checkpoint_callback.best_model_path, weights_only=True)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(saved["state_dict"][name].cpu(), tensor.cpu(), rtol=0, atol=0)
    again = trainer(tmp_path, strategy=AsyncLocalSGDStrategy(local_steps=5), precision=precision, max_steps=30)
    again.fit(BoringModel(), ckpt_path=fit.checkpoint_callback.best_model_path)
    assert again.global_step == 30
    again.validate(module, verbose=False)


class StateDevices(L.Callback):
    """Records the devices of optimizer states of workers that are not being computed."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        states = trainer.strategy.controller._worker_states  # type: ignore[attr-defined]
        for worker, state in states._states.items():
            if worker != states._current:
                held = [state for tensors, _ in state["optimizers"] for state in tensors.values()]
                values = [value for state in held for value in state.values()]
                tensors = [getattr(value, "tensor", value) for value in values]  # Offloaded ones are wrapped.
                self.seen |= {tensor.device.type for tensor in tensors if tensor.ndim}


@needs_gpus(1)
@pytest.mark.parametrize("on_cpu", [False, True])
def test_inner_states_on_cpu_decides_where_a_simulated_cluster_keeps_optimizer_states(
    tmp_path: Path, on_cpu: bool
) -> None:
    class Model(BoringModel):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    strategy = SimulatedAsyncLocalSGDStrategy([0.1, 0.2, 0.3], local_steps=4, inner_states_on_cpu=on_cpu)
    devices = StateDevices()
    fit = trainer(tmp_path, strategy=strategy, max_steps=20, callbacks=[devices])
    fit.fit(Model())
    assert fit.global_step == 20
    assert devices.seen == {"cpu" if on_cpu else "cuda"}


def launch(started: Jobs, tmp_path: Path, **options: Any) -> list[dict[str, Any]]:
    """Run the job and return the notes of its ranks."""
    started.run(JOB, tmp_path, json.dumps(options))
    ranks = [json.loads((tmp_path / f"rank_{n}.json").read_text()) for n in (0, 1)]
    assert ranks[0]["digest"] == ranks[1]["digest"]
    assert sum(rank["steps"] for rank in ranks) == 100
    assert [rank["metric"] for rank in ranks] == [0.5, 0.5], "the mean over both ranks"
    return ranks


@needs_gpus(1)
def test_two_ranks_on_one_device(started: Jobs, tmp_path: Path) -> None:
    ranks = launch(started, tmp_path, share=True, backend="gloo")
    assert [(rank["device"], rank["backend"]) for rank in ranks] == [("cuda:0", "gloo")] * 2


@needs_gpus(2)
@pytest.mark.parametrize("start_method", ["popen", "spawn"])
def test_two_ranks_with_one_device_each(started: Jobs, tmp_path: Path, start_method: str) -> None:
    ranks = launch(started, tmp_path, start_method=start_method)
    assert [(rank["device"], rank["backend"]) for rank in ranks] == [("cuda:0", "nccl"), ("cuda:1", "nccl")]


MIXED_JOB = Path(__file__).parents[1] / "live" / "mixed_job.py"


def assert_mixed(tmp_path: Path) -> list[dict[str, Any]]:
    """Check that a worker on a device and one on the CPU have trained one model, and return what they noted."""
    ranks = [json.loads((tmp_path / f"rank_{n}.json").read_text()) for n in (0, 1)]
    assert ranks[0]["state"] == ranks[1]["state"]
    workers = ranks[0]["summary"]["workers"]
    assert [worker["device"] for worker in workers] == [torch.cuda.get_device_name(0), "cpu"]
    assert [worker["precision"] for worker in workers] == ["16-mixed", "32-true"]
    assert all(worker["rounds"] > 1 for worker in workers)
    return ranks


@needs_gpus(1)
def test_rank_on_a_device_and_rank_on_the_cpu(started: Jobs, tmp_path: Path) -> None:
    options = {"precision": ["16-mixed", "32-true"], "accelerator": ["gpu", "cpu"], "devices": "auto", "tests": True}
    code, text = started.finish(started.start([*TORCHRUN, MIXED_JOB, tmp_path, json.dumps(options)]))
    assert code == 0, text[-6000:]
    ranks = assert_mixed(tmp_path)
    assert {rank["backend"] for rank in ranks} == {"gloo"}
    assert ranks[0]["test_loss_epoch"] == pytest.approx(ranks[1]["test_loss_epoch"])


@needs_gpus(1)
def test_worker_on_the_cpu_joins_one_on_a_device(started: Jobs, tmp_path: Path) -> None:
    port = free_port()
    common = {"devices": 1, "exchange": {"port": port, "token": "of-a-device-and-a-cpu"}}
    common["strategy"] = {"expected_workers": 2}
    here = {**common, "precision": ["16-mixed"], "accelerator": ["gpu"]}
    there = {**common, "precision": ["32-true"], "accelerator": ["cpu"]}
    processes = [
        started.start([sys.executable, MIXED_JOB, tmp_path, json.dumps(here)]),
        started.start(
            [sys.executable, MIXED_JOB, tmp_path, json.dumps(there)], ASYNC_LOCALSGD_JOIN=f"tcp://127.0.0.1:{port}"
        ),
    ]
    for process in processes:
        code, text = started.finish(process)
        assert code == 0, text[-6000:]
    assert_mixed(tmp_path)
