"""Machines that come later and go as they like: the same script, told where the run is and its token."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.step_notes import read_notes
from tests.faults.conftest import ROOT, command
from tests.faults.runs import Run
from tests.processes import Jobs

pytestmark = pytest.mark.slow

TOKEN = "of-two-machines-that-come-later"


def test_two_join_a_running_training_and_one_leaves_again(started: Jobs, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    out = tmp_path / "out"
    words = command(out, ranks=2, held=True, exchange={"port": port})
    environment = {"PYTHONPATH": str(ROOT), "ASYNC_LOCALSGD_TOKEN": TOKEN}
    run = started.start(words, **environment)
    _await(lambda: (0, 0) in read_notes(out) and (1, 0) in read_notes(out), run)

    invited = {**environment, "ASYNC_LOCALSGD_JOIN": f"tcp://127.0.0.1:{port}"}
    stays = started.start(words, **invited)
    _await(lambda: (2, 0) in read_notes(out), run, stays)
    leaves = started.start(words, **invited)
    _await(lambda: (3, 0) in read_notes(out) and len(read_notes(out)[3, 0].answers) >= 2, run, leaves)
    leaves.send_signal(signal.SIGINT)
    _, said_leaving = started.finish(leaves, 60.0)
    assert "Traceback" not in said_leaving
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
    for worker in (2, 3):
        assert len(found.pushes(worker, refused=False)) >= 2, "it was merged"
    assert re.search("worker 3 .*it said goodbye", text)
    for said_by in (text, said, said_leaving):
        assert TOKEN not in said_by
    assert not any(TOKEN in path.read_text() for path in out.rglob("*") if path.is_file() and path.suffix != ".pt")


def _await(condition: Callable[[], bool], *running: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120.0
    while not condition():
        for process in running:
            assert process.poll() is None, process.communicate()[0][-6000:]
        assert time.monotonic() < until
        time.sleep(0.05)
