"""Devices of this host's ranks, and the ranks of a process that joins a running training."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from lightning_async_localsgd import AsyncLocalSGDStrategy, ExchangeOptions
from lightning_async_localsgd.launch.joining import JoinGrant
from lightning_async_localsgd.launch.restarts import JoinTicket
from lightning_async_localsgd.lightning.launchers import host_ranks, script_launcher
from lightning_async_localsgd.lightning.launchers.host_ranks import JoiningEnvironment, adopt_ranks
from lightning_async_localsgd.lightning.launchers.script_launcher import AsyncScriptLauncher
from lightning_async_localsgd.protocol.messages import JoinInfo

TOKEN = "of-a-run-that-does-not-exist"

IPC = ExchangeOptions(token=TOKEN, transport="ipc")

TORCHRUN = {"RANK": "4", "WORLD_SIZE": "5", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3", "GROUP_RANK": "1",
            "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # fmt: skip

SLURM = {"SLURM_NTASKS": "5", "SLURM_NTASKS_PER_NODE": "3", "SLURM_NNODES": "2", "SLURM_TASKS_PER_NODE": "2,3",
         "SLURM_PROCID": "4", "SLURM_LOCALID": "2", "SLURM_NODEID": "1"}  # fmt: skip


def strategy_with(environment: Any, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], **trainer: Any) -> Any:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    options = {"devices": "auto", "num_nodes": 2, "accelerator": "cpu", "logger": False, **trainer}
    return L.Trainer(strategy="async_localsgd", plugins=[environment()], **options).strategy


@pytest.mark.parametrize(("environment", "variables"), [(TorchElasticEnvironment, TORCHRUN), (SLURMEnvironment, SLURM)])
def test_ranks_and_sizes_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: Any, variables: dict[str, str]
) -> None:
    strategy = strategy_with(environment, monkeypatch, variables)
    assert (strategy.world_size, strategy.global_rank, strategy.num_processes, strategy.local_rank) == (5, 4, 3, 2)
    assert strategy.root_device == torch.device("cpu")
    assert strategy.distributed_sampler_kwargs == {"num_replicas": 5, "rank": 4}


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
@pytest.mark.parametrize(
    ("environment", "variables", "launcher"),
    [
        (TorchElasticEnvironment, TORCHRUN, "torchrun"),
        (SLURMEnvironment, SLURM, "SLURM"),
        (LightningEnvironment, {"LOCAL_RANK": "0"}, "a launcher that sets LOCAL_RANK"),
    ],
)
def test_ranks_are_not_started_twice(
    monkeypatch: pytest.MonkeyPatch, method: Any, environment: Any, variables: dict[str, str], launcher: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    options = {"devices": "auto", "num_nodes": 2, "accelerator": "cpu", "logger": False}
    text = f"start_method='{method}' starts ranks, but {launcher} has started them already; use strategy='async_local"
    with pytest.raises(ValueError, match=text):
        L.Trainer(strategy=AsyncLocalSGDStrategy(start_method=method), plugins=[environment()], **options)
    monkeypatch.setenv("ASYNC_LOCALSGD_JOIN", "tcp://127.0.0.1:1")
    monkeypatch.setenv("ASYNC_LOCALSGD_TOKEN", TOKEN)
    joins = L.Trainer(strategy=AsyncLocalSGDStrategy(start_method=method), plugins=[environment()], **options)
    assert isinstance(joins.strategy.launcher, AsyncScriptLauncher)


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ({"devices": 2}, "its Trainer has 2 device"),
        ({"num_nodes": 3}, "num_nodes=3"),
    ],
)
def test_contradiction_ends_all_ranks_when_they_start(
    monkeypatch: pytest.MonkeyPatch, trainer: dict[str, Any], words: str
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(host_ranks, "end_all_ranks", lambda *arguments: told.append(arguments))
    strategy = strategy_with(TorchElasticEnvironment, monkeypatch, TORCHRUN, **trainer)
    with pytest.raises(ValueError, match=f"host {socket.gethostname()}.*{words}"):
        strategy.launcher.launch(lambda: pytest.fail("nothing is started"))
    [(address, port, rank, world_size, *_, reason)] = told
    assert (address, port, rank, world_size) == ("127.0.0.1", 1, 4, 5)
    assert words in reason


def test_data_libraries_see_all_workers_and_the_run_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    own = AsyncLocalSGDStrategy(expected_workers=6, exchange=ExchangeOptions(token=TOKEN))
    options = {"devices": "auto", "num_nodes": 2, "accelerator": "cpu", "logger": False}
    trainer = L.Trainer(strategy=own, plugins=[TorchElasticEnvironment()], **options)
    own._show_ranks(trainer, fitting=True)
    assert (os.environ["WORLD_SIZE"], os.environ["RANK"], os.environ["LOCAL_WORLD_SIZE"]) == ("6", "4", "3")
    assert (own.world_size, own.global_rank) == (5, 4)
    own._close_stage()
    assert os.environ["WORLD_SIZE"] == "5"
    # The next Trainer with this strategy may have other ranks.
    monkeypatch.setenv("WORLD_SIZE", "7")
    assert own.world_size == 7


def test_variables_of_an_interactive_job_say_nothing_about_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = strategy_with(SLURMEnvironment, monkeypatch, {**SLURM, "SLURM_JOB_NAME": "interactive"}, devices=2)
    assert strategy.num_processes == 2


@pytest.mark.parametrize(("devices", "processes"), [(1, 3), (4, 3)])
def test_script_that_joins_under_torchrun_may_have_the_devices_of_the_run(
    monkeypatch: pytest.MonkeyPatch, devices: int, processes: int
) -> None:
    monkeypatch.setenv("ASYNC_LOCALSGD_JOIN", "tcp://127.0.0.1:1")
    monkeypatch.setenv("ASYNC_LOCALSGD_TOKEN", TOKEN)
    strategy = strategy_with(TorchElasticEnvironment, monkeypatch, TORCHRUN, devices=devices, num_nodes=1)
    assert (strategy.num_processes, strategy.local_rank, strategy.is_global_zero) == (processes, 2, False)


def test_joining_process_knows_its_rank_only_once_it_has_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    before = JoiningEnvironment.of(LightningEnvironment(), None)
    assert (before.global_rank(), before.world_size(), before.creates_processes_externally) == (1, 2, False)
    info = JoinInfo(5, seed=0, fit_number=1, run_name="r", frozen_digest="", worker=7)
    after = JoiningEnvironment.of(before, JoinGrant(None, info, late_joiner=True))  # type: ignore[arg-type]
    after.set_global_rank(0)
    after.set_world_size(1)
    assert (after.global_rank(), after.world_size(), after.node_rank()) == (7, 5, 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert after.creates_processes_externally
    assert after.local_rank() == 1


@pytest.mark.parametrize("value", [0, -2, 1.5, True])
def test_expected_workers_must_be_a_number_of_workers(value: Any) -> None:
    with pytest.raises(ValueError, match=f"expected_workers={value!r} must be a number of workers >= 1"):
        AsyncLocalSGDStrategy(expected_workers=value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"expected_workers": 1, "exchange": ExchangeOptions(token=TOKEN)}, "expected_workers=1, but 2 ranks"),
        ({"expected_workers": 5}, "expected_workers=5 waits for 3 worker.*ASYNC_LOCALSGD_TOKEN"),
        ({"min_workers": 3}, "min_workers=3 is larger than the 2 worker.* set ASYNC_LOCALSGD_TOKEN"),
        ({"expected_workers": 5, "exchange": IPC}, "expected_workers=5 waits for 3 worker.*transport='auto' or 'tcp'"),
        ({"min_workers": 3, "exchange": IPC}, "min_workers=3 is larger than the 2 worker.*transport='auto' or 'tcp'"),
    ],
)
def test_workers_that_cannot_come_are_refused_when_the_trainer_is_made(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    monkeypatch.delenv("ASYNC_LOCALSGD_TOKEN", raising=False)
    with pytest.raises(ValueError, match=words):
        L.Trainer(strategy=AsyncLocalSGDStrategy(**options), accelerator="cpu", devices=2, logger=False)


def test_launcher_of_a_joined_host_restarts_no_worker_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script_launcher, "children", {1: None})
    launcher = AsyncScriptLauncher(JoiningEnvironment(LightningEnvironment()), num_processes=2, num_nodes=1)
    launcher.mark_started(JoinTicket("tcp://127.0.0.1:1", TOKEN, True, 1))
    assert launcher._watch is None


@pytest.mark.parametrize(
    ("found", "used"),
    [
        (8, [0, 1, 2]),  # devices="auto" on a host with more GPUs than ranks
        (3, [0, 1, 2]),
        (2, None),  # A GPU is not shared.
    ],
)
def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, found: int, used: list[int] | None) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(host_ranks, "end_all_ranks", lambda *_: None)
    strategy: Any = SimpleNamespace(
        cluster_environment=TorchElasticEnvironment(),
        parallel_devices=[torch.device("cuda", number) for number in range(found)],
        accelerator=SimpleNamespace(auto_device_count=lambda: found),
        num_nodes=2,
    )
    check = adopt_ranks(strategy, "popen", timeout=1.0)
    if used is None:
        with pytest.raises(ValueError, match=r"has 3 rank\(s\) .* its Trainer has 2 device\(s\)"):
            check()
    else:
        check()
        assert [device.index for device in strategy.parallel_devices] == used
