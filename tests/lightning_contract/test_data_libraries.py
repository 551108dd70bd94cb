"""Iterable data that splits itself among ranks, with the libraries that people use."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.lightning_contract.data_libraries_job import SAMPLES, WRITERS
from tests.processes import Jobs

JOB = Path(__file__).with_name("data_libraries_job.py")


def run(
    started: Jobs, out: Path, library: str, strategy: str = "async_localsgd", workers: int = 0
) -> list[dict[str, Any]]:
    """Run the job and return what its ranks have seen."""
    code, text = started.finish(started.start([sys.executable, JOB, out, library, strategy, str(workers)]))
    assert code == 0, text[-6000:]
    assert "began with the same samples" not in text
    return [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]


def assert_split(ranks: list[dict[str, Any]]) -> None:
    """Check that each rank trains on its own half, again and again, and that rank 0 validates on everything."""
    halves = [set().union(*rank["trained"]) for rank in ranks]
    assert halves[0] | halves[1] == set(range(SAMPLES))
    assert not halves[0] & halves[1]
    for rank, half in zip(ranks, halves, strict=True):
        for epoch in rank["trained"][:-1]:
            assert sorted(epoch) == sorted(half)
    assert len(ranks[0]["validated"]) > 1
    for validated in ranks[0]["validated"][1:]:
        assert sorted(validated) == list(range(SAMPLES))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("library", ["torch.distributed", "environment"])
def test_dataset_that_asks_for_its_rank(started: Jobs, out: Path, library: str, workers: int) -> None:
    assert_split(run(started, out, library, workers=workers))


@pytest.mark.parametrize("strategy", ["async_localsgd_spawn", "async_localsgd_fork"])
def test_dataset_that_asks_in_a_started_process(started: Jobs, out: Path, strategy: str) -> None:
    assert_split(run(started, out, "environment", strategy))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("library", ["webdataset", "litdata"])
def test_library_that_splits_among_ranks(started: Jobs, out: Path, library: str, workers: int) -> None:
    pytest.importorskip(library)
    (out / "files").mkdir()
    WRITERS[library](out / "files")
    assert_split(run(started, out, library, workers=workers))
