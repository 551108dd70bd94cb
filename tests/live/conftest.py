"""Runs the job of this folder as real processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Outcome, jobs

__all__ = ["Outcome"]

JOB = Path(__file__).with_name("job.py")


def run_all(out: Path, runs: dict[str, dict[str, Any]]) -> dict[str, Outcome]:
    """Runs the job with each of these options, one after the other in one script: a run is short, its start is not."""
    for name in runs:
        (out / name).mkdir()
    with jobs() as started:
        code, text = started.finish(started.start([sys.executable, JOB, out, json.dumps({"runs": runs})]), 280.0)
    if code != 0:
        pytest.fail(f"the job ended with {code}:\n{text[-6000:]}")
    return {name: Outcome(code, text, out / name) for name in runs}


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., Outcome]]:
    """Starts the job and waits for it; afterwards no process and no file of it may be left."""
    with jobs() as started:

        def run(timeout: float = 120.0, check: bool = True, **options: Any) -> Outcome:
            out = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
            out.mkdir()
            code, text = started.finish(started.start([sys.executable, JOB, out, json.dumps(options)]), timeout)
            if check and code != 0:
                pytest.fail(f"the job ended with {code}:\n{text[-6000:]}")
            return Outcome(code, text, out)

        yield run
