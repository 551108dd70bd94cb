"""Jobs of real processes for the tests, and a check that nothing of them is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

OF_A_LAUNCHER = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GLOBAL_RANK", "RANK", "WORLD_SIZE",
                 "MASTER_", "SLURM_", "TORCHELASTIC_", "ASYNC_LOCALSGD_")  # fmt: skip
"""Prefixes of the variables that tell a process that it is one of several ranks."""

ROOT = Path(__file__).parents[1]
"""Folder of the checkout. Jobs import ``tests`` and ``benchmarks`` from it."""

_MARK = "ASYNC_LOCALSGD_TEST_JOB"


@dataclass
class Outcome:
    """Exit code, output and folder of a finished job."""

    code: int
    text: str
    out: Path

    def rank(self, number: int) -> dict[str, Any]:
        """Return what a rank noted."""
        found: dict[str, Any] = json.loads((self.out / f"rank_{number}.json").read_text())
        return found

    @property
    def ranks(self) -> list[dict[str, Any]]:
        """Notes of all ranks, in order."""
        return [self.rank(n) for n in range(len(list(self.out.glob("rank_*.json"))))]

    @property
    def summary(self) -> dict[str, Any]:
        """The run's summary as written by the callback."""
        found: dict[str, Any] = json.loads((self.out / "async_localsgd_summary.json").read_text())
        return found


class Jobs:
    """Starts processes with a mark in their environment, which their children inherit.

    Args:
        folder: temporary folder of the processes.

    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self, command: Sequence[str | Path], **variables: str) -> subprocess.Popen[str]:
        """Start ``command`` in its own process group, without the variables of other launchers."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OF_A_LAUNCHER)}
        kept |= {**python_path(), "OMP_NUM_THREADS": "1", "TMPDIR": str(self._folder), _MARK: str(self._folder)}
        return subprocess.Popen(
            [str(word) for word in command],
            env={**kept, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, process: subprocess.Popen[str], timeout: float = 120.0) -> tuple[int, str]:
        """Return exit code and output of the process. The test fails if the process does not end in time."""
        try:
            text, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
            pytest.fail(f"the job did not end within {timeout} s:\n{text[-60000:]}")
        return process.returncode, text

    def run(self, script: str | Path, *arguments: str | Path, timeout: float = 120.0) -> str:
        """Run a Python script and return its output. The test fails if the script fails."""
        code, text = self.finish(self.start([sys.executable, script, *arguments]), timeout)
        if code != 0:
            pytest.fail(f"the job ended with {code}:\n{text[-60000:]}")
        return text

    def processes(self) -> list[psutil.Process]:
        """Return all processes of these jobs that are running now."""
        return [process for process in psutil.process_iter() if _mark(process) == str(self._folder)]


def python_path(*folders: Path) -> dict[str, str]:
    """Return the variable that lets a job import from the folders, the checkout and the path of this process."""
    paths = [*map(str, folders), str(ROOT), os.environ.get("PYTHONPATH")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@contextmanager
def jobs() -> Iterator[Jobs]:
    """Start jobs. At the end, fail if a process or a socket file of theirs is left."""
    # A separate folder, so that leftovers belong to this test. A short name, because DataLoader workers bind socket
    # files in it.
    sockets = Path(tempfile.mkdtemp(prefix="s"))
    started = Jobs(sockets)
    try:
        yield started
        # Other ranks may outlive rank 0 for a moment, until they notice that it is gone.
        psutil.wait_procs(started.processes(), timeout=30)
    finally:
        alive = started.processes()
        for process in alive:
            process.kill()
        left = [path for path in sockets.rglob("*") if path.is_socket() or path.name.startswith("async_localsgd_")]
        shutil.rmtree(sockets)
    assert not alive, f"processes of the job are left: {alive}"
    assert not left, f"socket files are left: {left}"


def _mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(_MARK)
    except psutil.Error:
        return None
