"""Fixtures and helpers that run this folder's job."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Jobs, Outcome, jobs

__all__ = ["Outcome"]

JOB = Path(__file__).with_name("job.py")


def run_all(out: Path, runs: dict[str, dict[str, Any]]) -> dict[str, Outcome]:
    """Run the job with each of these options, in one script, because a start takes longer than a run."""
    for name in runs:
        (out / name).mkdir()
    with jobs() as started:
        text = started.run(JOB, out, json.dumps({"runs": runs}), timeout=280.0)
    return {name: Outcome(0, text, out / name) for name in runs}


@pytest.fixture
def job(started: Jobs, tmp_path: Path) -> Callable[..., Outcome]:
    """Return a function that runs the job with options. By default, the job must succeed."""

    def run(timeout: float = 120.0, check: bool = True, **options: Any) -> Outcome:
        out = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        out.mkdir()
        code, text = started.finish(started.start([sys.executable, JOB, out, json.dumps(options)]), timeout)
        if check and code != 0:
            pytest.fail(f"the job ended with {code}:\n{text[-6000:]}")
        return Outcome(code, text, out)

    return run
