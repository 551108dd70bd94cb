"""Every way of starting ranks, of unequal speed and in real processes, and every way of ending them."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import pytest
import torch
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_async_localsgd import AsyncLocalSGDStrategy
from tests.hosts import two_hosts
from tests.processes import Jobs, jobs, python_path

pytestmark = pytest.mark.slow

JOB = Path(__file__).with_name("launching_job.py")
BUDGET = 200
"""Steps of two ranks together: the job has ``max_steps=100``."""

Notes = dict[tuple[str, int], list[dict[str, Any]]]


@pytest.fixture
def started() -> Iterator[Jobs]:
    with jobs() as started:
        yield started


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def command(out: Path, **options: Any) -> list[str | Path]:
    return [sys.executable, JOB, out, json.dumps(options)]


def succeed(started: Jobs, *processes: subprocess.Popen[str]) -> str:
    texts = []
    for process in processes:
        code, text = started.finish(process)
        assert code == 0, text[-6000:]
        texts.append(text)
    return "\n".join(texts)


def notes(out: Path) -> Notes:
    """What the ranks noted, by call and rank, in the order of time."""
    found: Notes = {}
    for path in sorted(out.glob("rank_*.jsonl")):
        for line in path.read_text().splitlines():
            note = json.loads(line)
            found.setdefault((note["call"], note["rank"]), []).append(note)
    return found


def assert_trained(out: Path, ranks: int = 2, times: int = 1, budget: int = BUDGET) -> Notes:
    seen = notes(out)
    assert {rank for call, rank in seen if call == "fit"} == set(range(ranks))
    for time_ in range(times):
        fits = [seen["fit", rank][time_] for rank in range(ranks)]
        assert len({fit["digest"] for fit in fits}) == 1
        assert sum(fit["steps"] for fit in fits) == budget
        assert all(fit["world_size"] == ranks and not fit["group"] for fit in fits)
        assert len({fit["pid"] for fit in fits}) == ranks
        # Even ranks are four times as fast.
        assert fits[0]["steps"] > fits[1]["steps"] > 0
    return seen


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


# ---------------------------------------------------------------------------------------------------- launchers


@pytest.mark.parametrize("name", ["async_localsgd", "async_localsgd_spawn", "async_localsgd_fork"])
def test_lightnings_own_launchers(started: Jobs, out: Path, name: str) -> None:
    # All ranks are started again for each call, except by the first.
    calls = ("fit", "validate", "test", "predict") if name == "async_localsgd" else ("fit", "test")
    text = succeed(started, started.start(command(out, strategy=name, calls=[calls])))
    seen = assert_trained(out)
    assert_synchronous(seen, calls[1:])
    # With the first, every rank runs the script to its end.
    assert text.count("the script's end") == (2 if name == "async_localsgd" else 1)


def assert_synchronous(seen: Notes, calls: tuple[str, ...] = ("validate", "test", "predict")) -> None:
    """What follows fit has a process group, in which both ranks take part."""
    for call in calls:
        for rank in (0, 1):
            [note] = seen[call, rank]
            assert note["group"]
            assert note["digest"] == seen[call, 0][0]["digest"]
            if call == "predict":
                assert note["batches"] == 2, "half of them"
            else:
                assert note["rank_metric"] == 0.5, "the mean over both ranks"


def test_a_notebook(started: Jobs, out: Path) -> None:
    text = succeed(started, started.start(command(out, strategy="async_localsgd_notebook", interactive=True)))
    seen = assert_trained(out)
    assert text.count("the script's end") == 1
    assert os.getpid() not in {fit["pid"] for fits in seen.values() for fit in fits}


def test_a_notebook_needs_the_strategy_for_it(started: Jobs, out: Path) -> None:
    code, text = started.finish(started.start(command(out, interactive=True)))
    assert code != 0
    assert "strategy='async_localsgd_notebook'" in text


@pytest.mark.parametrize("meeting", [["--standalone"], ["--rdzv-backend=static", "--master-port={port}"]])
def test_torchrun(started: Jobs, out: Path, meeting: list[str]) -> None:
    options = [option.format(port=free_port()) for option in meeting]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *options]
    calls = [["fit", "validate"], ["fit"]]
    text = succeed(started, started.start([*torchrun, *command(out, calls=calls)[1:]]))
    assert_synchronous(assert_trained(out, times=2), ("validate",))
    assert text.count("the script's end") == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_ends_all_with_the_error_of_one(started: Jobs, out: Path, rank: int) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    options = {"fail": {"rank": rank, "step": 3}, "trainer": {"max_steps": 100_000}}
    code, text = started.finish(started.start([*torchrun, *command(out, **options)[1:]]))
    assert code != 0
    assert "a fault of this rank's own" in text
    assert "the script's end" not in text


def assert_went_on(out: Path, text: str, budget: int = BUDGET) -> None:
    """A job was started again, and its ranks took only the steps that were left."""
    assert "the run goes on from" in text or "Restoring states from the checkpoint path" in text
    fits = [notes(out)["fit", rank][-1] for rank in (0, 1)]
    assert len({fit["digest"] for fit in fits}) == 1
    assert 0 < sum(fit["steps"] for fit in fits) < budget


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_starts_all_again(started: Jobs, out: Path, rank: int) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--max-restarts=1"]
    own = {"local_steps": 5, "checkpoint_every": 3}
    # Rank 1 is four times as slow.
    options = {"fail": {"kill": rank, "step": 24 if rank else 60}, "own_strategy": own}
    text = succeed(started, started.start([*torchrun, *command(out, **options)[1:]]))
    assert_went_on(out, text)


def slurm_tasks(started: Jobs, line: list[str | Path], **more: str) -> list[subprocess.Popen[str]]:
    common = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    common |= {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [started.start(line, SLURM_PROCID=str(n), SLURM_LOCALID=str(n), **common, **more) for n in (0, 1)]


@pytest.mark.parametrize("warned", [True, False], ids=["warned", "failed"])
def test_slurm_requeues_a_job(started: Jobs, out: Path, warned: bool) -> None:
    """Either shortly before the time limit, of which SLURM warns, or because a task was killed."""
    scontrol = out / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {out}/scontrol.txt\n")
    scontrol.chmod(0o755)
    path = {"PATH": f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}"}
    own = {"local_steps": 5, "checkpoint_every": None if warned else 3}
    options = {} if warned else {"fail": {"kill": 1, "step": 24}}
    line = command(out, own_strategy=own, trainer={"max_steps": 200}, **options)
    tasks = slurm_tasks(started, line, **path)
    for rank in (0, 1):
        await_file(started, tasks[rank], out / f"advanced_{rank}")
    if warned:
        for task in tasks:
            task.send_signal(signal.SIGUSR1)
        await_file(started, tasks[0], out / "scontrol.txt")
        assert (out / "scontrol.txt").read_text() == "requeue 123456\n"
    else:
        tasks[1].wait(60)
    for task in tasks:
        task.send_signal(signal.SIGTERM)
    for task in tasks:
        assert "the script's end" not in started.finish(task, 30)[1]
    text = succeed(started, *slurm_tasks(started, line, SLURM_RESTART_COUNT="1", **path))
    assert_went_on(out, text, budget=400)


def test_slurm(started: Jobs, out: Path) -> None:
    tasks = slurm_tasks(started, command(out, calls=[["fit", "validate"]]))
    succeed(started, *tasks)
    seen = assert_trained(out)
    assert_synchronous(seen, ("validate",))
    assert [seen["fit", rank][0]["pid"] for rank in (0, 1)] == [task.pid for task in tasks], "nothing was launched"


def test_ranks_started_by_hand(started: Jobs, out: Path) -> None:
    port = str(free_port())
    ranks = [started.start(command(out), LOCAL_RANK=str(n), MASTER_PORT=port) for n in (0, 1)]
    succeed(started, *ranks)
    seen = assert_trained(out)
    assert [seen["fit", rank][0]["pid"] for rank in (0, 1)] == [rank.pid for rank in ranks]


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


def test_a_second_trainer_in_the_same_script(started: Jobs, out: Path) -> None:
    succeed(started, started.start(command(out, calls=[["fit"], ["fit", "test"]])))
    seen = assert_trained(out, times=2)
    assert_synchronous(seen, ("test",))
    first, second = seen["fit", 1]
    assert first["digest"] != second["digest"]
    assert first["pid"] == second["pid"], "the ranks of the first go on"


@pytest.mark.parametrize("name", ["async_localsgd", "async_localsgd_fork"])
def test_a_worker_is_started_again_in_the_second_fit(started: Jobs, out: Path, name: str) -> None:
    second = {"fail": {"kill": 1, "step": 8}, "awaited": 1, "trainer": ENDLESS}
    calls = [["fit"], ["fit", "test"]]
    text = succeed(started, started.start(command(out, strategy=name, calls=calls, **{"trainer 1": second})))
    assert "worker 1 ended with signal 9 (SIGKILL); it is started again in 0.5 s (restart 1 of 3)" in text
    seen = notes(out)
    first, again = ([seen["fit", rank][time_] for rank in (0, 1)] for time_ in (0, 1))
    assert sum(fit["steps"] for fit in first) == BUDGET, "the first fit is complete, and not fitted again"
    assert len(seen["fit", 1]) == 2
    assert again[0]["digest"] == again[1]["digest"]
    assert first[1]["pid"] != again[1]["pid"]
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
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    succeed(started, *[started.start(line, NODE_RANK=node, **meeting) for node in ("1", "0")])
    seen = assert_trained(out, ranks=2 * devices)
    for rank in range(1, 2 * devices):
        assert seen["fit", rank][0]["address"] == ["tcp", True]
    assert [seen["fit", rank][0]["local_rank"] for rank in range(2 * devices)] == [*range(devices)] * 2


def test_two_hosts(started: Jobs, out: Path) -> None:
    line = command(out, calls=[["fit", "validate"]], trainer={"num_nodes": 2})
    # The last is for the process group of `validate`: gloo would take the address that the host's name leads to.
    with two_hosts() as hosts:
        meeting = {"MASTER_ADDR": hosts.address, "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": hosts.device}
        nodes = [started.start([*hosts.enter[node], *line], NODE_RANK=str(node), **meeting) for node in (0, 1)]
        succeed(started, *nodes)
    seen = assert_trained(out, ranks=4, budget=400)
    # Nobody has said anything about the exchange: the rank beside rank 0 has a socket of its own to it, and what goes
    # over the network is encrypted.
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
    state = hashlib.sha256()
    for tensor in torch.load(checkpoint, weights_only=True)["state_dict"].values():
        state.update(tensor.numpy().tobytes())
    for call in ("validate", "test", "predict"):
        assert {seen[call, rank][0]["digest"] for rank in (0, 1)} == {state.hexdigest()}
    assert (out / "lightning_logs" / "version_0" / "config.yaml").exists()


def test_the_supervisor_with_lightning_cli(started: Jobs, out: Path) -> None:
    arguments = ["fit", "--trainer.strategy=lightning_async_localsgd.AsyncLocalSGDStrategy"]
    arguments += ["--trainer.strategy.local_steps=5", "--trainer.strategy.checkpoint_every=3"]
    # What jsonargparse makes of this knows the trainer, and with it what can be neither copied nor pickled.
    arguments += ["--trainer.strategy.outer_optimizer=torch.optim.SGD", "--trainer.strategy.outer_optimizer.lr=0.3"]
    arguments += ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.max_steps=100"]
    arguments += [f"--trainer.default_root_dir={out}", "--trainer.enable_progress_bar=false"]
    arguments += [f"--trainer.callbacks+={JOB.stem}.Notes", f"--trainer.callbacks.out={out}"]
    arguments += ['--trainer.callbacks.fail={"kill": 0, "step": 60}']
    line = command(out, cli=arguments)
    line[1:1] = ["-m", "lightning_async_localsgd"]
    text = succeed(started, started.start(line, **python_path(JOB.parent)))
    assert "the job was ended by signal 9 (SIGKILL); it is started again" in text
    assert_went_on(out, text)
    assert len(list(out.glob("lightning_logs/version_*/config.yaml"))) == 2


# ------------------------------------------------------------------------------------------------------- ending


def await_training(started: Jobs, out: Path, process: subprocess.Popen[str], ranks: int = 2) -> list[psutil.Process]:
    """Waits until every rank trains; returns the processes that do, the started one among them."""
    until = time.monotonic() + 120
    while len(list(out.glob("training_*"))) < ranks:
        if process.poll() is not None or time.monotonic() > until:
            pytest.fail(f"the job did not begin to train:\n{started.finish(process, 1)[1][-6000:]}")
        time.sleep(0.05)
    return started.processes()


def await_file(started: Jobs, process: subprocess.Popen[str], path: Path) -> list[psutil.Process]:
    until = time.monotonic() + 120
    while not path.exists():
        if process.poll() is not None or time.monotonic() > until:
            pytest.fail(f"the job did not come to {path.name}:\n{started.finish(process, 1)[1][-6000:]}")
        time.sleep(0.05)
    return started.processes()


SECONDS_TO_END = 10.0 + 5.0
"""What is promised, and what a machine may need that also runs other tests."""


def assert_all_end(started: Jobs, process: subprocess.Popen[str], there: list[psutil.Process]) -> str:
    begun = time.monotonic()
    _, text = started.finish(process, 30)
    assert "the script's end" not in text
    _, alive = psutil.wait_procs(there, timeout=10)
    assert not alive
    assert time.monotonic() - begun < SECONDS_TO_END
    return text


ENDLESS = {"max_steps": 1_000_000, "max_epochs": -1}


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        # SIGINT of spawned ranks is below, in a validation.
        ("async_localsgd", "SIGINT"),
        ("async_localsgd", "SIGTERM"),
        ("async_localsgd_spawn", "SIGTERM"),
        ("async_localsgd_fork", "SIGINT"),
        ("async_localsgd_fork", "SIGTERM"),
    ],
)
def test_a_signal_ends_all_ranks(started: Jobs, out: Path, name: str, sent: str) -> None:
    process = started.start(command(out, strategy=name, trainer=ENDLESS))
    there = await_training(started, out, process)
    assert len(there) >= (2 if name == "async_localsgd" else 3)
    if sent == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # As a terminal does at Ctrl+C.
    else:
        process.send_signal(signal.SIGTERM)
    assert_all_end(started, process, there)


@pytest.mark.parametrize("name", ["async_localsgd", "async_localsgd_spawn"])
def test_an_interrupt_of_rank_0s_process_alone_ends_all_ranks(started: Jobs, out: Path, name: str) -> None:
    process = started.start(command(out, strategy=name, trainer=ENDLESS))
    there = await_training(started, out, process)
    process.send_signal(signal.SIGINT)
    assert_all_end(started, process, there)


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM"])
def test_a_signal_to_torchrun_ends_all_ranks(started: Jobs, out: Path, sent: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    process = started.start([*torchrun, *command(out, trainer=ENDLESS)[1:]])
    there = await_training(started, out, process)
    process.send_signal(getattr(signal, sent))
    assert_all_end(started, process, there)


@pytest.mark.parametrize("method", ["popen", "spawn", "fork"])
def test_an_exception_of_rank_0_ends_all_and_is_what_is_seen(started: Jobs, out: Path, method: str) -> None:
    own = {"local_steps": 5, "start_method": method}
    process = started.start(command(out, own_strategy=own, fail={"rank": 0, "step": 20}, trainer=ENDLESS))
    there = await_file(started, process, out / "failed")
    text = assert_all_end(started, process, there)
    assert process.returncode != 0
    assert "a fault of this rank's own" in text
    assert text.rstrip().endswith("a fault of this rank's own")


MOMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "validation": ("validating", {"slow_validation": True, "trainer": {**ENDLESS, "val_check_interval": 5}}),
    "mid-push": (
        "injected",
        {
            "fault": {"kind": "DELAY", "worker": 1, "moment": "mid-push", "seconds": 100.0},
            "trainer": ENDLESS,
        },
    ),
    "booting": ("booting", {"boots_for_long": True, "fail": {"kill": 1, "step": 3}, "trainer": ENDLESS}),
}
"""At which file of the job's a moment is known, and the options that make it last."""


@pytest.mark.parametrize(
    ("moment", "method", "sent"),
    [
        ("validation", "popen", "SIGTERM"),
        ("validation", "spawn", "SIGINT"),
        ("mid-push", "popen", "SIGTERM"),
        ("mid-push", "popen", "SIGINT"),
        ("mid-push", "fork", "SIGTERM"),
        ("booting", "popen", "SIGTERM"),
        ("booting", "popen", "SIGINT"),
        ("booting", "fork", "SIGTERM"),
    ],
)
def test_a_signal_ends_all_ranks_at_any_moment(started: Jobs, out: Path, moment: str, method: str, sent: str) -> None:
    file, options = MOMENTS[moment]
    own = {"local_steps": 5, "start_method": method}
    process = started.start(command(out, own_strategy=own, saves_on_exception=True, **options))
    there = await_file(started, process, out / file)
    if sent == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    assert_all_end(started, process, there)
    [saved] = out.glob("*.ckpt")
    assert torch.load(saved, weights_only=True)["async_localsgd"]["model"]["version"] >= 0


@pytest.mark.parametrize("method", ["popen", "fork"])
def test_who_is_being_started_again_ends_with_who_does_so(started: Jobs, out: Path, method: str) -> None:
    file, options = MOMENTS["booting"]
    process = started.start(command(out, own_strategy={"local_steps": 5, "start_method": method}, **options))
    there = await_file(started, process, out / file)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(there, timeout=30)
    assert not alive


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM"])
def test_the_supervisor_passes_signals_on(started: Jobs, out: Path, sent: str) -> None:
    line = command(out, trainer=ENDLESS)
    process = started.start([line[0], "-m", "lightning_async_localsgd", *line[1:]])
    there = await_training(started, out, process)
    process.send_signal(getattr(signal, sent))
    text = assert_all_end(started, process, there)
    assert "started again" not in text


@pytest.mark.parametrize("method", ["popen", "fork"])
def test_a_worker_that_is_asked_to_end_leaves(started: Jobs, out: Path, method: str) -> None:
    own = {"local_steps": 5, "start_method": method}
    process = started.start(command(out, own_strategy=own, trainer={"max_steps": 300}))
    await_training(started, out, process)
    pid = int((out / "training_1").read_text())
    os.kill(pid, signal.SIGTERM)
    text = succeed(started, process)
    assert "worker 1 has left, with exit code 0; training goes on without it" in text
    assert "started again" not in text
    assert notes(out)["fit", 0][0]["steps"] > 300
    assert ("fit", 1) not in notes(out)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_where_all_ranks_are_needed_ends_all(started: Jobs, out: Path, rank: int) -> None:
    process = started.start(command(out, calls=[["validate", "fit"]], fail={"rank": rank, "step": 0}))
    code, text = started.finish(process)
    assert code != 0
    assert "a fault of this rank's own" in text
    assert "the script's end" not in text
    assert not notes(out)


def test_an_interrupt_while_ranks_wait_for_one_that_does_not_come(started: Jobs, out: Path) -> None:
    # Of two nodes only the first is there.
    line = command(out, trainer={**ENDLESS, "num_nodes": 2})
    process = started.start(line, NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    until = time.monotonic() + 60
    while len(there := started.processes()) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(there) == 2
    time.sleep(1.0)  # Wherever in its start the job is, it must end.
    os.killpg(process.pid, signal.SIGINT)
    assert_all_end(started, process, there)


# ------------------------------------------------------------------------------------------------------ refusals


def trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(**{"strategy": "async_localsgd", "accelerator": "cpu", "devices": 1, **quiet, **options})


@pytest.mark.parametrize("strategy", ["async_localsgd", "async_localsgd_notebook"])
def test_mps_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: True)
    monkeypatch.setattr("lightning.fabric.accelerators.mps._get_all_available_mps_gpus", lambda: [0])
    with pytest.raises(ValueError, match=r"accelerator='mps'.*async_localsgd"):
        trainer(accelerator="mps", strategy=strategy)


def test_an_accelerator_that_cannot_work_is_refused_by_name() -> None:
    """Lightning itself refuses XLA's with any strategy but its own."""
    accelerator = MPSAccelerator.__new__(MPSAccelerator)
    strategy = AsyncLocalSGDStrategy(accelerator=accelerator, parallel_devices=[torch.device("cpu")])
    strategy.cluster_environment = L.fabric.plugins.environments.LightningEnvironment()
    with pytest.raises(ValueError, match=rf"accelerator='{accelerator.name()}'.*async_localsgd"):
        strategy._configure_launcher()


class Remembering(BoringModel):
    """Validates in the middle of an epoch, and keeps what it got in a buffer that it trains with afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.inference: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.inference += [tensor.is_inference() for tensor in (*self.parameters(), *self.buffers())]
        return {"loss": (self(batch) * self.scale).sum()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        # In fit, and with a process group of gloo, Lightning turns gradients off in another way.
        assert not torch.is_inference_mode_enabled()
        self(batch)
        self.scale.mul_(0.5)


@pytest.mark.parametrize("inference_mode", [True, False])
def test_validation_in_fit_leaves_nothing_that_cannot_be_trained(tmp_path: Path, inference_mode: bool) -> None:
    fit = trainer(
        strategy=AsyncLocalSGDStrategy(local_steps=3),
        inference_mode=inference_mode,
        max_steps=20,
        val_check_interval=2,
        limit_train_batches=8,
        limit_val_batches=1,
        num_sanity_val_steps=1,
        enable_checkpointing=True,
        default_root_dir=tmp_path,
        enable_model_summary=False,
    )
    module = Remembering()
    fit.fit(module)
    assert fit.global_step == 20
    fit.validate(module, verbose=False)
    assert not any(module.inference)
    # What is kept for later must be of use outside of inference mode, too.
    saved = torch.load(fit.checkpoint_callback.best_model_path, weights_only=True)
    for name, tensor in saved["state_dict"].items():
        assert not tensor.is_inference(), name
    fit.fit_loop.epoch_loop.max_steps = 30
    fit.fit(module)
    assert fit.global_step == 30
