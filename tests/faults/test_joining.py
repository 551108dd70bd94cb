"""Machines that join a run later: the same script, with the address of the run and its token."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.step_notes import Life, read_notes
from tests.faults.conftest import command
from tests.faults.runs import Run
from tests.processes import Jobs

pytestmark = pytest.mark.slow

TOKEN = "of-two-machines-that-come-later"

SLURM_TASK = {
    "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
}  # fmt: skip
"""Variables of the only task of a job on another cluster."""

OF_TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
}  # fmt: skip
"""Variables that ``torchrun`` sets for its only process."""


class Host:
    """A run that others join.

    Args:
        started: starts the processes.
        out: folder of the job.
        ranks: ranks of the run itself.
        exchange: options of the exchange.
        **options: options of the job.

    """

    def __init__(
        self, started: Jobs, out: Path, ranks: int, exchange: dict[str, Any] | None = None, **options: Any
    ) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        self.out = out
        self.started = started
        self.words = command(out, ranks=ranks, held=True, exchange={"port": port, **(exchange or {})}, **options)
        self.joining = {"ASYNC_LOCALSGD_TOKEN": TOKEN, "ASYNC_LOCALSGD_JOIN": f"tcp://127.0.0.1:{port}"}
        self.run = started.start(self.words, ASYNC_LOCALSGD_TOKEN=TOKEN)
        _await(lambda: all((rank, 0) in read_notes(out) for rank in range(ranks)), self.run)

    def join(self, **variables: str) -> subprocess.Popen[str]:
        """Start the same script, which joins the run."""
        return self.started.start(self.words, **self.joining, **variables)


def test_two_machines_join_a_run_and_one_leaves_again(started: Jobs, tmp_path: Path, normal: Run) -> None:
    out = tmp_path / "out"
    host = Host(started, out, ranks=2, strategy={"checkpoint_every": 2})
    run = host.run
    stays = host.join(**SLURM_TASK)
    _await(lambda: (2, 0) in read_notes(out), run, stays)
    leaves = host.join(**OF_TORCHRUN)
    _await(lambda: (3, 0) in read_notes(out) and len(read_notes(out)[3, 0].answers) >= 2, run, leaves)
    leaves.send_signal(signal.SIGINT)
    _, said_leaving = started.finish(leaves, 60.0)
    assert "Traceback" not in said_leaving
    assert not any(TOKEN in word for process in started.processes() for word in process.cmdline())
    there = len(read_notes(out)[2, 0].answers)
    _await(lambda: len(read_notes(out)[2, 0].answers) >= there + 3, run, stays)
    (out / "stop").touch()

    code, text = started.finish(run)
    assert code == 0, text[-6000:]
    stayed, said = started.finish(stays)
    assert stayed == 0, said[-6000:]
    found = Run(out, text)
    found.assert_exactly_once()
    found.assert_one_model({0, 1, 2})
    found.assert_learned(normal)
    # Data libraries on a late joiner read the part of one of the two ranks.
    parts = [json.loads((out / f"rank_{worker}.json").read_text())["environment"] for worker in (0, 1, 2)]
    assert parts == [["0", "2", "0", "2"], ["1", "2", "1", "2"], ["0", "2", "0", "1"]]
    for worker in (2, 3):
        assert len(found.pushes(worker, refused=False)) >= 2, "its pushes were merged"
    assert re.search("worker 3 .*it ended with KeyboardInterrupt", text)
    for said_by in (text, said, said_leaving):
        assert TOKEN not in said_by
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {".ckpt", ".pt", ".jsonl", ".txt"} <= {path.suffix for path in files}
    assert not any(TOKEN.encode() in path.read_bytes() for path in files)


def test_run_of_one_rank_is_joined_by_a_machine_that_dies_and_one_that_freezes(
    started: Jobs, tmp_path: Path, normal: Run
) -> None:
    out = tmp_path / "out"
    host = Host(started, out, ranks=1, exchange={"silence_timeout": 2.0})
    dies, freezes = host.join(), host.join()

    def lives(process: subprocess.Popen[str]) -> list[Life]:
        return [life for life in read_notes(out).values() if life.pid == process.pid]

    def has_merged(process: subprocess.Popen[str], rounds: int) -> bool:
        return any(len(life.answers) >= rounds for life in lives(process))

    _await(lambda: has_merged(dies, 2) and has_merged(freezes, 2), host.run, dies, freezes)
    dies.kill()
    freezes.send_signal(signal.SIGSTOP)
    time.sleep(5.0)
    freezes.send_signal(signal.SIGCONT)
    [frozen], [dead] = lives(freezes), lives(dies)
    _await(lambda: has_merged(freezes, len(frozen.answers) + 2), host.run, freezes)
    (out / "stop").touch()

    code, text = started.finish(host.run)
    assert code == 0, text[-6000:]
    returned, said = started.finish(freezes)
    assert returned == 0, said[-6000:]
    started.finish(dies)
    found = Run(out, text)
    found.assert_exactly_once()
    found.assert_one_model({0, frozen.worker})
    found.assert_learned(normal)
    assert {frozen.worker, dead.worker} == {1, 2}
    for gone in (frozen, dead):
        assert f"worker {gone.worker} left the run" in text
    assert "restarting" not in text, "there is no launcher that restarts workers"
    assert found.pushes(frozen.worker, refused=True) == [], "the interrupted round counts"
    for begin, end in found.outages(frozen.worker, least=4.0):
        found.assert_others_went_on(begin, end, but={1, 2})


def _await(condition: Callable[[], bool], *running: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120.0
    while not condition():
        for process in running:
            assert process.poll() is None, process.communicate()[0][-6000:]
        assert time.monotonic() < until
        time.sleep(0.05)
