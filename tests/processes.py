"""Jobs of real processes for the tests, and a look that nothing of them remains."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

OF_A_LAUNCHER = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE", "MASTER_", "SLURM_", "TORCHELASTIC_",
                 "ASYNC_LOCALSGD_")  # fmt: skip
"""How the variables begin by which a process is told that it is one rank of several."""

_MARK = "ASYNC_LOCALSGD_TEST_JOB"


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


class Jobs:
    """Starts processes, which pass the mark in their environment on to their own.

    Args:
        folder: temporary folder of the processes.

    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self, command: Sequence[str | Path], **variables: str) -> subprocess.Popen[str]:
        """Starts ``command`` in a process group of its own, without what another launcher may have set."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OF_A_LAUNCHER)}
        return subprocess.Popen(
            [str(word) for word in command],
            env={**kept, "OMP_NUM_THREADS": "1", "TMPDIR": str(self._folder), _MARK: str(self._folder), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, process: subprocess.Popen[str], timeout: float = 120.0) -> tuple[int, str]:
        """Exit code and output of the process, which the test fails for if it does not end."""
        try:
            text, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
            pytest.fail(f"the job did not end within {timeout} s:\n{text[-6000:]}")
        return process.returncode, text

    def processes(self) -> list[psutil.Process]:
        """All processes of these jobs that are there at the moment."""
        return [process for process in psutil.process_iter() if _mark(process) == str(self._folder)]


def python_path(folder: Path) -> dict[str, str]:
    """The variable by which a job finds what is in ``folder``, and what this process finds, too."""
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


@contextmanager
def jobs() -> Iterator[Jobs]:
    """For starting jobs; afterwards no process and no file of theirs may be left."""
    # Of its own, so that what is left there is this test's; short, because DataLoader workers bind socket files in it.
    sockets = Path(tempfile.mkdtemp(prefix="s"))
    started = Jobs(sockets)
    try:
        yield started
        # Ranks above 0 may outlive rank 0 by the moments in which they notice that it is gone.
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
