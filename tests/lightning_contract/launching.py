"""Starts ``launching_job.py`` in many ways, waits for it, and checks what its ranks noted."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.processes import Jobs

JOB = Path(__file__).with_name("launching_job.py")

BUDGET = 200
"""Local steps of two ranks together with ``max_steps=100``."""

ENDLESS = {"max_steps": 1_000_000, "max_epochs": -1}

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]

SECONDS_TO_END = 10.0 + 5.0
"""The documented limit, and a margin for a machine that also runs other tests."""

Notes = dict[tuple[str, int], list[dict[str, Any]]]


def command(out: Path, **options: Any) -> list[str | Path]:
    """Return the command line of the job."""
    return [sys.executable, JOB, out, json.dumps(options)]


def succeed(started: Jobs, *processes: subprocess.Popen[str]) -> str:
    """Wait for the processes, which must succeed, and return their output."""
    texts = []
    for process in processes:
        code, text = started.finish(process)
        assert code == 0, text[-6000:]
        texts.append(text)
    return "\n".join(texts)


def notes(out: Path) -> Notes:
    """Return what the ranks noted, by call and rank, in order."""
    noted: Notes = {}
    for path in sorted(out.glob("rank_*.jsonl")):
        for line in path.read_text().splitlines():
            note = json.loads(line)
            noted.setdefault((note["call"], note["rank"]), []).append(note)
    return noted


def assert_trained(out: Path, ranks: int = 2, fits: int = 1, budget: int = BUDGET, most: int = 2) -> Notes:
    """Check that each fit met its budget with all ranks, and that all ranks have the same model.

    Args:
        out: folder of the job.
        ranks: number of ranks.
        fits: number of fits.
        budget: local steps of all ranks together in each fit.
        most: largest number of ranks on a host.

    """
    seen = notes(out)
    assert {rank for call, rank in seen if call == "fit"} == set(range(ranks))
    for number in range(fits):
        by_rank = [seen["fit", rank][number] for rank in range(ranks)]
        assert len({fit["digest"] for fit in by_rank}) == 1
        assert sum(fit["steps"] for fit in by_rank) == budget
        assert all(fit["world_size"] == ranks and not fit["group"] for fit in by_rank)
        assert len({fit["pid"] for fit in by_rank}) == ranks
        for fit in by_rank:
            assert_knows_rank(fit, ranks, most)
        # Even ranks are four times as fast.
        assert by_rank[0]["steps"] > by_rank[1]["steps"] > 0
    return seen


def assert_knows_rank(fit: dict[str, Any], ranks: int = 2, most: int = 2) -> None:
    """Check that the environment of a rank named the rank to data libraries."""
    rank, global_rank, world_size, local_rank, local_world_size = map(int, fit["env"])
    assert (rank, global_rank, world_size) == (fit["rank"], fit["rank"], ranks)
    assert local_rank == fit["local_rank"]
    assert local_rank < local_world_size <= ranks
    assert 1 <= local_world_size <= most


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def assert_synchronous(seen: Notes, calls: tuple[str, ...] = ("validate", "test", "predict")) -> None:
    """Check that calls after fit have a process group, in which both ranks take part."""
    for call in calls:
        for rank in (0, 1):
            [note] = seen[call, rank]
            assert note["group"]
            assert note["digest"] == seen[call, 0][0]["digest"]
            if call == "predict":
                assert note["batches"] == 2, "half of the batches"
            else:
                assert note["rank_metric"] == 0.5, "the mean over both ranks"


def assert_resumed(out: Path, text: str, budget: int = BUDGET) -> None:
    """Check that a job was restarted, and that its ranks took only the remaining steps."""
    assert "resuming the run from" in text or "Restoring states from the checkpoint path" in text
    fits = [notes(out)["fit", rank][-1] for rank in (0, 1)]
    assert len({fit["digest"] for fit in fits}) == 1
    for fit in fits:
        assert_knows_rank(fit)
    assert 0 < sum(fit["steps"] for fit in fits) < budget


def wait_for_training(started: Jobs, out: Path, process: subprocess.Popen[str], ranks: int = 2) -> list[psutil.Process]:
    """Wait until every rank trains. Return all processes of the job, including the started one."""
    until = time.monotonic() + 120
    while len(list(out.glob("training_*"))) < ranks:
        if process.poll() is not None or time.monotonic() > until:
            pytest.fail(f"the job did not start to train:\n{started.finish(process, 1)[1][-6000:]}")
        time.sleep(0.05)
    return started.processes()


def wait_for_file(started: Jobs, process: subprocess.Popen[str], path: Path) -> list[psutil.Process]:
    """Wait until the job has created a file. Return all processes of the job."""
    until = time.monotonic() + 120
    while not path.exists():
        if process.poll() is not None or time.monotonic() > until:
            pytest.fail(f"the job did not reach {path.name}:\n{started.finish(process, 1)[1][-6000:]}")
        time.sleep(0.05)
    return started.processes()


def assert_all_end(started: Jobs, process: subprocess.Popen[str], processes: list[psutil.Process]) -> str:
    """Check that all processes end in time before the end of the script. Return the output."""
    begun = time.monotonic()
    _, text = started.finish(process, 30)
    assert "the script's end" not in text
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive
    assert time.monotonic() - begun < SECONDS_TO_END
    return text
