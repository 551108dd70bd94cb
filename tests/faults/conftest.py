"""Fixtures and helpers that run this folder's job."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import Run
from tests.processes import Jobs, jobs

JOB = Path(__file__).with_name("job.py")


def command(out: Path, **options: Any) -> list[str | Path]:
    """Return the command line of the job."""
    out.mkdir(exist_ok=True)
    return [sys.executable, JOB, out, json.dumps(options)]


@pytest.fixture
def job(started: Jobs, tmp_path: Path) -> Callable[..., Run]:
    """Return a function that runs the job with options. The job must succeed."""

    def run(timeout: float = 150.0, **options: Any) -> Run:
        out = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        began = time.monotonic()
        code, text = started.finish(started.start(command(out, **options)), timeout)
        if code != 0:
            pytest.fail(f"the job ended with {code}:\n{text[-6000:]}")
        return Run(out, text, began)

    return run


@pytest.fixture(scope="session")
def normal(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run the job without faults."""
    out = tmp_path_factory.mktemp("normal")
    with jobs() as started:
        code, text = started.finish(started.start(command(out, ranks=3)))
    assert code == 0, text[-6000:]
    run = Run(out, text)
    run.assert_exactly_once()
    run.assert_one_model({0, 1, 2})
    return run
