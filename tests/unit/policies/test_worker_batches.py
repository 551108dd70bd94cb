"""The option ``batch_size``."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lightning_async_localsgd.policies.worker_batches import StepBatch, WorkerBatches

REFERENCE = StepBatch(32, 2)


def of_memory(memory: int) -> Any:
    return memory // 2**30 if memory < 2**35 else (16, 4)


def test_sizes_by_worker() -> None:
    batches = WorkerBatches({1: (16, 4), 0: 64})
    assert batches.of(0, REFERENCE, 0) == (64, 2), "the trainer's accumulation holds for a size without one"
    assert batches.of(1, REFERENCE, 0) == (16, 4)
    assert batches.of(2, REFERENCE, 0) == REFERENCE
    assert batches.workers == [0, 1]
    assert not batches.is_auto
    assert not batches.is_function
    assert str(batches) == "batch_size={0: 64, 1: (16, 4)}"


def test_configuration_files_have_lists_instead_of_tuples() -> None:
    batches = WorkerBatches({1: [16, 4]})  # type: ignore[dict-item]
    assert batches.of(1, REFERENCE, 0) == (16, 4)
    assert str(batches) == str(WorkerBatches({1: (16, 4)})), "hosts may be told in another form"


def test_sizes_by_memory() -> None:
    batches = WorkerBatches(of_memory)
    assert batches.is_function
    assert batches.of(7, REFERENCE, 8 * 2**30) == (8, 2)
    assert batches.of(7, REFERENCE, 64 * 2**30) == (16, 4)
    assert str(batches) == "batch_size=of_memory", "hosts have the same text for the same function"


def test_auto_has_no_sizes() -> None:
    assert WorkerBatches("auto").is_auto
    assert WorkerBatches("auto").workers == []


def test_texts_of_steps() -> None:
    assert (str(StepBatch(16, 1)), str(REFERENCE), REFERENCE.samples) == ("16 samples", "2 x 32 samples", 64)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (64, "batch_size=64 must have sizes by worker"),
        ("largest", "batch_size='largest' must have sizes by worker"),
        ({}, "names no worker"),
        ({-1: 8}, "-1 is not a worker's number"),
        ({"0": 8}, "'0' is not a worker's number"),
        ({0: 0}, r"batch_size[0] is 0; it must be a batch size such as 32"),
        ({0: True}, "batch_size[0] is True"),
        ({0: 8.0}, "batch_size[0] is 8.0"),
        ({3: (8, 0)}, "batch_size[3] is (8, 0)"),
        ({3: (8, 2, 2)}, "batch_size[3] is (8, 2, 2)"),
    ],
)
def test_other_values_are_refused(option: Any, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        WorkerBatches(option)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda memory: memory / 4, "batch_size(100) is 25.0; it must be a batch size"),
        (lambda memory: memory // 0, "batch_size(100) failed with ZeroDivisionError"),
        (lambda: 3, "batch_size(100) failed with TypeError"),
    ],
)
def test_functions_must_return_sizes(function: Any, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        WorkerBatches(function).of(0, REFERENCE, 100)


def test_named_workers_must_exist() -> None:
    batches = WorkerBatches({0: 8, 2: 16})
    batches.check_workers(3, others_may_join=False)
    batches.check_workers(1, others_may_join=True)
    with pytest.raises(ValueError, match="names worker 2, but this run has the 2 workers 0 to 1"):
        batches.check_workers(2, others_may_join=False)
    with pytest.raises(ValueError, match="there is a single worker; set the batch size of the data loader"):
        WorkerBatches("auto").check_workers(1, others_may_join=False)
