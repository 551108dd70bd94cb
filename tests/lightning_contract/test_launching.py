"""All ways to launch ranks, in real processes of unequal speed."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import MPSAccelerator

from lightning_async_localsgd import AsyncLocalSGDStrategy
from tests.hosts import two_hosts
from tests.lightning_contract.launching import (
    BUDGET,
    ENDLESS,
    JOB,
    TORCHRUN,
    assert_resumed,
    assert_synchronous,
    assert_trained,
    command,
    free_port,
    notes,
    succeed,
    wait_for_file,
)
from tests.lightning_models import digest, quiet_trainer
from tests.processes import Jobs, python_path

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["async_localsgd", "async_localsgd_spawn", "async_localsgd_fork"])
def test_launchers_of_the_strategy(started: Jobs, out: Path, name: str) -> None:
    # The other two launchers start new ranks for each call.
    calls = ("fit", "validate", "test", "predict") if name == "async_localsgd" else ("fit", "test")
    text = succeed(started, started.start(command(out, strategy=name, calls=[calls])))
    seen = assert_trained(out)
    assert_synchronous(seen, calls[1:])
    # With the first launcher, every rank runs the script to its end.
    assert text.count("the script's end") == (2 if name == "async_localsgd" else 1)


def test_notebook(started: Jobs, out: Path) -> None:
    text = succeed(started, started.start(command(out, strategy="async_localsgd_notebook", interactive=True)))
    seen = assert_trained(out)
    assert text.count("the script's end") == 1
    assert os.getpid() not in {fit["pid"] for fits in seen.values() for fit in fits}


def test_notebook_needs_the_notebook_strategy(started: Jobs, out: Path) -> None:
    code, text = started.finish(started.start(command(out, interactive=True)))
    assert code != 0
    assert "strategy='async_localsgd_notebook'" in text


@pytest.mark.parametrize("static", [False, True], ids=["standalone", "static"])
def test_torchrun(started: Jobs, out: Path, static: bool) -> None:
    rendezvous = ["--rdzv-backend=static", f"--master-port={free_port()}"] if static else ["--standalone"]
    calls = [["fit", "validate"], ["fit"]]
    text = succeed(started, started.start([*TORCHRUN, *rendezvous, *command(out, calls=calls)[1:]]))
    assert_synchronous(assert_trained(out, fits=2), ("validate",))
    assert text.count("the script's end") == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_all_ranks(started: Jobs, out: Path, rank: int) -> None:
    own = {"local_steps": 5, "checkpoint_every": 3}
    # Rank 1 is four times as slow.
    options = {"fail": {"kill": rank, "step": 24 if rank else 60}, "own_strategy": own}
    line = [*TORCHRUN, "--standalone", "--max-restarts=1", *command(out, **options)[1:]]
    text = succeed(started, started.start(line))
    assert_resumed(out, text)


def start_slurm_tasks(started: Jobs, line: list[str | Path], **more: str) -> list[subprocess.Popen[str]]:
    common = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    common |= {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [started.start(line, SLURM_PROCID=str(n), SLURM_LOCALID=str(n), **common, **more) for n in (0, 1)]


@pytest.mark.parametrize("warned", [True, False], ids=["warned", "failed"])
def test_slurm_requeues_a_job(started: Jobs, out: Path, warned: bool) -> None:
    """SLURM either warns the tasks shortly before the time limit, or ends the job because a task was killed."""
    scontrol = out / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {out}/scontrol.txt\n")
    scontrol.chmod(0o755)
    path = {"PATH": f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}"}
    own = {"local_steps": 5, "checkpoint_every": None if warned else 3}
    options = {} if warned else {"fail": {"kill": 1, "step": 24}}
    line = command(out, own_strategy=own, trainer={"max_steps": 200}, **options)
    tasks = start_slurm_tasks(started, line, **path)
    for rank in (0, 1):
        wait_for_file(started, tasks[rank], out / f"advanced_{rank}")
    if warned:
        for task in tasks:
            task.send_signal(signal.SIGUSR1)
        wait_for_file(started, tasks[0], out / "scontrol.txt")
        assert (out / "scontrol.txt").read_text() == "requeue 123456\n"
    else:
        tasks[1].wait(60)
    for task in tasks:
        task.send_signal(signal.SIGTERM)
    for task in tasks:
        assert "the script's end" not in started.finish(task, 30)[1]
    text = succeed(started, *start_slurm_tasks(started, line, SLURM_RESTART_COUNT="1", **path))
    assert_resumed(out, text, budget=400)


def test_slurm(started: Jobs, out: Path) -> None:
    tasks = start_slurm_tasks(started, command(out, calls=[["fit", "validate"]]))
    succeed(started, *tasks)
    seen = assert_trained(out)
    assert_synchronous(seen, ("validate",))
    assert [seen["fit", rank][0]["pid"] for rank in (0, 1)] == [task.pid for task in tasks], "no process was launched"


def test_ranks_started_by_hand(started: Jobs, out: Path) -> None:
    port = str(free_port())
    ranks = [started.start(command(out), LOCAL_RANK=str(n), MASTER_PORT=port) for n in (0, 1)]
    succeed(started, *ranks)
    seen = assert_trained(out)
    assert [seen["fit", rank][0]["pid"] for rank in (0, 1)] == [rank.pid for rank in ranks]


def test_call_after_a_lost_rank_ends_at_once(started: Jobs, out: Path) -> None:
    port, fail = str(free_port()), {"rank": 1, "step": 5}
    line = command(out, calls=[["fit", "validate"]], fail=fail)
    ranks = [started.start(line, LOCAL_RANK=str(n), MASTER_PORT=port) for n in (0, 1)]
    (code, text), (failed, traceback) = (started.finish(rank, 60) for rank in ranks)
    assert (code, failed) == (1, 1)
    assert traceback.rstrip().endswith("a fault of this rank's own")
    reason = "it ended with RuntimeError: a fault of this rank's own"
    assert f"fit has lost rank 1 ({reason})" in text.splitlines()[-1]
    assert "Traceback" not in text
    assert notes(out)["fit", 0][0]["steps"] > 100
    assert ("validate", 0) not in notes(out)


def test_one_device(started: Jobs, out: Path) -> None:
    calls = [["fit", "validate", "test", "predict"]]
    succeed(started, started.start(command(out, calls=calls, trainer={"devices": 1})))
    seen = notes(out)
    assert seen["fit", 0][0]["steps"] == 100
    assert seen["fit", 0][0]["world_size"] == 1
    assert {call: note["group"] for (call, _), [note] in seen.items()} == {
        "fit": False, "validate": True, "test": True, "predict": True
    }  # fmt: skip
    assert {call for call, _ in seen} == {"fit", "validate", "test", "predict"}


def test_second_trainer_in_the_same_script_uses_the_same_processes(started: Jobs, out: Path) -> None:
    succeed(started, started.start(command(out, calls=[["fit"], ["fit", "test"]])))
    seen = assert_trained(out, fits=2)
    assert_synchronous(seen, ("test",))
    first, second = seen["fit", 1]
    assert first["digest"] != second["digest"]
    assert first["pid"] == second["pid"], "the ranks of the first Trainer continue"


@pytest.mark.parametrize("name", ["async_localsgd", "async_localsgd_fork"])
def test_worker_is_restarted_in_the_second_fit(started: Jobs, out: Path, name: str) -> None:
    options = {"fail": {"kill": 1, "step": 8}, "awaited": 1, "trainer": ENDLESS}
    calls = [["fit"], ["fit", "test"]]
    text = succeed(started, started.start(command(out, strategy=name, calls=calls, **{"trainer 1": options})))
    assert "worker 1 ended with signal 9 (SIGKILL); restarting it in 0.5 s (restart 1 of 3)" in text
    seen = notes(out)
    first, second = ([seen["fit", rank][number] for rank in (0, 1)] for number in (0, 1))
    assert sum(fit["steps"] for fit in first) == BUDGET, "the first fit is complete, and is not repeated"
    assert len(seen["fit", 1]) == 2
    assert second[0]["digest"] == second[1]["digest"]
    assert first[1]["pid"] != second[1]["pid"]
    assert_synchronous(seen, ("test",))


# ----------------------------------------------------------------------------------------------------- two nodes


@pytest.mark.parametrize("devices", [1, 2])
def test_two_launchers(started: Jobs, out: Path, devices: int) -> None:
    line = command(
        out,
        calls=[["fit", "validate"]],
        exchange={"transport": "tcp", "encrypt": True},
        trainer={"num_nodes": 2, "devices": devices, "max_steps": 100 // devices},
    )
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    succeed(started, *[started.start(line, NODE_RANK=node, **rendezvous) for node in ("1", "0")])
    seen = assert_trained(out, ranks=2 * devices)
    for rank in range(1, 2 * devices):
        assert seen["fit", rank][0]["address"] == ["tcp", True]
    assert [seen["fit", rank][0]["local_rank"] for rank in range(2 * devices)] == [*range(devices)] * 2


def test_two_hosts(started: Jobs, out: Path) -> None:
    line = command(out, calls=[["fit", "validate"]], trainer={"num_nodes": 2})
    # GLOO_SOCKET_IFNAME is for the process group of `validate`. Without it, gloo uses the address of the host's name.
    with two_hosts() as hosts:
        rendezvous = {"MASTER_ADDR": hosts.address, "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": hosts.device}
        nodes = [started.start([*hosts.enter[node], *line], NODE_RANK=str(node), **rendezvous) for node in (0, 1)]
        succeed(started, *nodes)
    seen = assert_trained(out, ranks=4, budget=400)
    # By default, the rank on rank 0's host uses a Unix socket, and traffic over the network is encrypted.
    assert [seen["fit", rank][0]["address"] for rank in (1, 2, 3)] == [["ipc", False], ["tcp", True], ["tcp", True]]


# ------------------------------------------------------------------------------------------------- command line


def test_lightning_cli(started: Jobs, out: Path) -> None:
    checkpoint = out / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    common = ["--trainer.strategy=async_localsgd", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    common += ["--trainer.max_steps=100", f"--trainer.default_root_dir={out}", "--trainer.enable_progress_bar=false"]
    common += [f"--trainer.callbacks+={JOB.stem}.Notes", f"--trainer.callbacks.out={out}"]
    saving = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
    for call in ("fit", "validate", "test", "predict"):
        extra = saving if call == "fit" else [f"--ckpt_path={checkpoint}"]
        line = command(out, cli=[call, *common, *extra])
        succeed(started, started.start(line, **python_path(JOB.parent)))
    seen = assert_trained(out)
    assert_synchronous(seen)
    state = digest(torch.load(checkpoint, weights_only=True)["state_dict"])
    for call in ("validate", "test", "predict"):
        assert {seen[call, rank][0]["digest"] for rank in (0, 1)} == {state}
    assert (out / "lightning_logs" / "version_0" / "config.yaml").exists()


def test_supervisor_with_lightning_cli(started: Jobs, out: Path) -> None:
    arguments = ["fit", "--trainer.strategy=lightning_async_localsgd.AsyncLocalSGDStrategy"]
    arguments += ["--trainer.strategy.local_steps=5", "--trainer.strategy.checkpoint_every=3"]
    # jsonargparse turns this into an object that refers to the trainer. It can be neither copied nor pickled.
    arguments += ["--trainer.strategy.outer_optimizer=torch.optim.SGD", "--trainer.strategy.outer_optimizer.lr=0.3"]
    arguments += ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.max_steps=100"]
    arguments += [f"--trainer.default_root_dir={out}", "--trainer.enable_progress_bar=false"]
    arguments += [f"--trainer.callbacks+={JOB.stem}.Notes", f"--trainer.callbacks.out={out}"]
    arguments += ['--trainer.callbacks.fail={"kill": 0, "step": 60}']
    line = command(out, cli=arguments)
    line[1:1] = ["-m", "lightning_async_localsgd"]
    text = succeed(started, started.start(line, **python_path(JOB.parent)))
    assert "the script ended with signal 9 (SIGKILL); restarting it" in text
    assert_resumed(out, text)
    assert len(list(out.glob("lightning_logs/version_*/config.yaml"))) == 2


# ---------------------------------------------------------------------------------------------------- rejections


@pytest.mark.parametrize("strategy", ["async_localsgd", "async_localsgd_notebook"])
def test_mps_is_rejected_by_name(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: True)
    monkeypatch.setattr("lightning.fabric.accelerators.mps._get_all_available_mps_gpus", lambda: [0])
    with pytest.raises(ValueError, match=r"accelerator='mps'.*async_localsgd"):
        quiet_trainer(strategy, accelerator="mps")


def test_unsupported_accelerator_is_rejected_by_name() -> None:
    """XLA needs no test here: Lightning accepts its accelerator only with its own strategies."""
    accelerator = MPSAccelerator.__new__(MPSAccelerator)
    strategy = AsyncLocalSGDStrategy(accelerator=accelerator, parallel_devices=[torch.device("cpu")])
    strategy.cluster_environment = L.fabric.plugins.environments.LightningEnvironment()
    with pytest.raises(ValueError, match=rf"accelerator='{accelerator.name()}'.*async_localsgd"):
        strategy._configure_launcher()
