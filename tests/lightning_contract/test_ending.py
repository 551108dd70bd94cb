"""How a job ends: signals, errors and deaths of launchers, in real processes."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.lightning_contract.launching import (
    ENDLESS,
    TORCHRUN,
    assert_all_end,
    command,
    free_port,
    notes,
    succeed,
    wait_for_file,
    wait_for_training,
)
from tests.processes import Jobs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_ends_all_ranks_with_the_error_of_one(started: Jobs, out: Path, rank: int) -> None:
    options = {"fail": {"rank": rank, "step": 3}, "trainer": {"max_steps": 100_000}}
    code, text = started.finish(started.start([*TORCHRUN, "--standalone", *command(out, **options)[1:]]))
    assert code != 0
    assert "a fault of this rank's own" in text
    assert "the script's end" not in text


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        # SIGINT to spawned ranks is tested below, during a validation.
        ("async_localsgd", "SIGINT"),
        ("async_localsgd", "SIGTERM"),
        ("async_localsgd_spawn", "SIGTERM"),
        ("async_localsgd_fork", "SIGINT"),
        ("async_localsgd_fork", "SIGTERM"),
    ],
)
def test_signal_ends_all_ranks(started: Jobs, out: Path, name: str, sent: str) -> None:
    process = started.start(command(out, strategy=name, trainer=ENDLESS))
    processes = wait_for_training(started, out, process)
    assert len(processes) >= (2 if name == "async_localsgd" else 3)
    if sent == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # As a terminal does at Ctrl+C.
    else:
        process.send_signal(signal.SIGTERM)
    assert_all_end(started, process, processes)


@pytest.mark.parametrize(("method", "sent"), [("popen", "SIGTERM"), ("popen", "SIGINT"), ("fork", "SIGTERM")])
def test_signal_that_also_kills_loader_processes_leaves_the_run_saved(
    started: Jobs, out: Path, method: str, sent: str
) -> None:
    own = {"local_steps": 5, "start_method": method}
    with tempfile.TemporaryDirectory(prefix="s") as sockets:  # Processes that are killed leave their sockets.
        job = command(out, own_strategy=own, loader_processes=2, trainer=ENDLESS)
        process = started.start(job, TMPDIR=sockets)
        wait_for_file(started, process, out / "advanced_1")
        processes = wait_for_file(started, process, out / "advanced_0")
        os.killpg(process.pid, getattr(signal, sent))
        text = assert_all_end(started, process, processes)
    assert "Traceback" not in text, text
    [folder] = (out / "async_localsgd").iterdir()
    assert len(list(folder.glob("rounds=*.ckpt"))) == 1
    assert len(list(folder.glob("worker-1-*.pt"))) == 1


@pytest.mark.parametrize("name", ["async_localsgd", "async_localsgd_spawn"])
def test_interrupt_of_the_first_process_alone_ends_all_ranks(started: Jobs, out: Path, name: str) -> None:
    process = started.start(command(out, strategy=name, trainer=ENDLESS))
    processes = wait_for_training(started, out, process)
    process.send_signal(signal.SIGINT)
    assert_all_end(started, process, processes)


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM"])
def test_signal_to_torchrun_ends_all_ranks(started: Jobs, out: Path, sent: str) -> None:
    process = started.start([*TORCHRUN, "--standalone", *command(out, trainer=ENDLESS)[1:]])
    processes = wait_for_training(started, out, process)
    process.send_signal(getattr(signal, sent))
    assert_all_end(started, process, processes)


@pytest.mark.parametrize("method", ["popen", "spawn", "fork"])
def test_exception_of_rank_0_ends_all_ranks_and_is_printed_last(started: Jobs, out: Path, method: str) -> None:
    own = {"local_steps": 5, "start_method": method}
    process = started.start(command(out, own_strategy=own, fail={"rank": 0, "step": 20}, trainer=ENDLESS))
    processes = wait_for_file(started, process, out / "failed")
    text = assert_all_end(started, process, processes)
    assert process.returncode != 0
    assert "a fault of this rank's own" in text
    assert text.rstrip().endswith("a fault of this rank's own")
    # Of all tracebacks only that of the first failure is printed, and one line says before all others what it was.
    assert text.count("(most recent call last)") == (1 if method == "popen" else 2), "torch prints two for one error"
    assert "rank 0 ended with RuntimeError: a fault of this rank's own" in text


MOMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "validation": ("validating", {"slow_validation": True, "trainer": {**ENDLESS, "val_check_interval": 5}}),
    "mid-push": (
        "injected",
        {
            "fault": {"kind": "DELAY", "worker": 1, "moment": "mid-push", "seconds": 100.0},
            "trainer": ENDLESS,
        },
    ),
    "paused": (
        "paused",
        {"own_strategy": {"min_workers": 2, "max_restarts": 0}, "fail": {"kill": 1, "step": 3}, "trainer": ENDLESS},
    ),
    "booting": ("booting", {"boots_for_long": True, "fail": {"kill": 1, "step": 3}, "trainer": ENDLESS}),
}
"""For each moment: the file that the job creates then, and the options that make the moment last."""


@pytest.mark.parametrize(
    ("moment", "method", "sent"),
    [
        ("validation", "popen", "SIGTERM"),
        ("validation", "spawn", "SIGINT"),
        ("mid-push", "popen", "SIGTERM"),
        ("mid-push", "popen", "SIGINT"),
        ("mid-push", "fork", "SIGTERM"),
        ("paused", "popen", "SIGTERM"),
        ("paused", "fork", "SIGINT"),
        ("booting", "popen", "SIGTERM"),
        ("booting", "popen", "SIGINT"),
        ("booting", "fork", "SIGTERM"),
    ],
)
def test_signal_ends_all_ranks_at_any_moment(started: Jobs, out: Path, moment: str, method: str, sent: str) -> None:
    file, options = MOMENTS[moment]
    own = {"local_steps": 5, "start_method": method, **options.get("own_strategy", {})}
    process = started.start(command(out, **{**options, "own_strategy": own}, saves_on_exception=True))
    processes = wait_for_file(started, process, out / file)
    if sent == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    assert_all_end(started, process, processes)
    [saved] = out.glob("*.ckpt")
    assert torch.load(saved, weights_only=True)["async_localsgd"]["model"]["version"] >= 0


@pytest.mark.parametrize("method", ["popen", "fork"])
def test_restarted_process_ends_when_its_launcher_dies(started: Jobs, out: Path, method: str) -> None:
    file, options = MOMENTS["booting"]
    process = started.start(command(out, own_strategy={"local_steps": 5, "start_method": method}, **options))
    processes = wait_for_file(started, process, out / file)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM"])
def test_supervisor_forwards_signals(started: Jobs, out: Path, sent: str) -> None:
    line = command(out, trainer=ENDLESS)
    process = started.start([line[0], "-m", "lightning_async_localsgd", *line[1:]])
    processes = wait_for_training(started, out, process)
    process.send_signal(getattr(signal, sent))
    text = assert_all_end(started, process, processes)
    assert "(restart 1 of" not in text


@pytest.mark.parametrize("method", ["popen", "fork"])
def test_stopped_worker_leaves_and_is_not_restarted(started: Jobs, out: Path, method: str) -> None:
    own = {"local_steps": 5, "start_method": method}
    process = started.start(command(out, own_strategy=own, trainer={"max_steps": 300}))
    wait_for_training(started, out, process)
    pid = int((out / "training_1").read_text())
    os.kill(pid, signal.SIGTERM)
    text = succeed(started, process)
    # Lightning ends with 0 or, in later versions, with 128 + 15.
    left = r"worker 1 left with exit code (0|143 \(SIGTERM\)); not restarting it, training continues without it"
    assert re.search(left, text)
    assert "(restart 1 of" not in text
    assert notes(out)["fit", 0][0]["steps"] > 300
    assert ("fit", 1) not in notes(out)


@pytest.mark.parametrize("rank", [0, 1])
def test_error_in_a_synchronous_call_ends_all_ranks(started: Jobs, out: Path, rank: int) -> None:
    process = started.start(command(out, calls=[["validate", "fit"]], fail={"rank": rank, "step": 0}))
    code, text = started.finish(process)
    assert code != 0
    assert "a fault of this rank's own" in text
    assert "the script's end" not in text
    assert not notes(out)


def test_interrupt_ends_ranks_that_wait_for_a_missing_rank(started: Jobs, out: Path) -> None:
    # Only the first of two nodes is started.
    line = command(out, trainer={**ENDLESS, "num_nodes": 2})
    process = started.start(line, NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    until = time.monotonic() + 60
    while len(processes := started.processes()) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(processes) == 2
    time.sleep(1.0)  # The job must end wherever it is in its start.
    os.killpg(process.pid, signal.SIGINT)
    assert_all_end(started, process, processes)
