"""Runs the job of this folder as real processes, and looks that nothing of it remains."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

JOB = Path(__file__).with_name("job.py")


@dataclass
class Outcome:
    """What a job came to."""

    code: int
    text: str
    out: Path

    def rank(self, number: int) -> dict[str, Any]:
        """What the rank noted."""
        found: dict[str, Any] = json.loads((self.out / f"rank_{number}.json").read_text())
        return found

    @property
    def ranks(self) -> list[dict[str, Any]]:
        """What all ranks noted, in order."""
        return [self.rank(n) for n in range(len(list(self.out.glob("rank_*.json"))))]

    @property
    def summary(self) -> dict[str, Any]:
        """The run's summary as the callback wrote it."""
        found: dict[str, Any] = json.loads((self.out / "async_localsgd_summary.json").read_text())
        return found


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., Outcome]]:
    """Starts the job and waits for it; afterwards no process and no file of it may be left."""
    started: list[subprocess.Popen[str]] = []
    # Of its own, so that what is left there is this test's; short, because DataLoader workers bind socket files in it.
    sockets = Path(tempfile.mkdtemp(prefix="s"))

    def run(timeout: float = 120.0, check: bool = True, **options: Any) -> Outcome:
        out = tmp_path / f"run{len(started)}"
        out.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(sockets)}
        for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        process = subprocess.Popen(
            [sys.executable, str(JOB), str(out), json.dumps(options)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        try:
            text, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
            pytest.fail(f"the job did not end within {timeout} s:\n{text[-6000:]}")
        if check and process.returncode != 0:
            pytest.fail(f"the job ended with {process.returncode}:\n{text[-6000:]}")
        return Outcome(process.returncode, text, out)

    yield run
    # Ranks above 0 may outlive rank 0 by the moments in which they notice that it is gone.
    _, alive = psutil.wait_procs(
        [p for p in psutil.process_iter() if any(str(tmp_path) in word for word in _words(p))], timeout=30
    )
    for process in alive:
        process.kill()
    assert not alive, f"processes of the job are left: {alive}"
    left = [path for path in sockets.rglob("*") if path.is_socket() or path.name.startswith("async_localsgd_")]
    shutil.rmtree(sockets)
    assert not left, f"socket files are left: {left}"


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
