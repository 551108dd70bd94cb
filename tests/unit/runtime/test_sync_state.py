"""Tensors that are not exchanged, on ranks that have them in unequal dtypes."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from lightning_async_localsgd.runtime.sync_state import (
    frozen_digest,
    set_buffer,
    sync_differing,
    tensor_digests,
)


class Meeting:
    """A rendezvous of two threads.

    Args:
        rank: rank of the thread.
        barrier: both threads meet at it.
        slot: holds what one of them sends.

    """

    world_size = 2

    def __init__(self, rank: int, barrier: threading.Barrier, slot: list[Any]) -> None:
        self.rank = rank
        self.barrier = barrier
        self.slot = slot
        self.sent: list[Any] = []

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self.rank == src:
            self.slot[0] = obj
            self.sent.append(obj)
        self.barrier.wait(30.0)
        received = self.slot[0]
        self.barrier.wait(30.0)
        return received


def together(*tensors: dict[str, torch.Tensor]) -> list[Meeting]:
    """Synchronize the tensors of two ranks."""
    barrier, slot, failures = threading.Barrier(2), [None], list[BaseException]()
    meetings = [Meeting(rank, barrier, slot) for rank in (0, 1)]

    def run(meeting: Meeting, own: dict[str, torch.Tensor]) -> None:
        try:
            sync_differing(own, tensor_digests(own), meeting)  # type: ignore[arg-type]
        except ValueError as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(meetings, tensors, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    if failures:
        raise failures[0]
    return meetings


VALUES = torch.randn(64, generator=torch.Generator().manual_seed(0))


def sent_tensors(meeting: Meeting) -> int:
    return sum(isinstance(obj, torch.Tensor) for obj in meeting.sent)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_equal_weights_in_another_dtype_are_not_sent(dtype: torch.dtype) -> None:
    here, there = {"w": VALUES.clone()}, {"w": VALUES.to(dtype)}
    assert sent_tensors(together(here, there)[0]) == 0
    assert there["w"].dtype == dtype


def test_unequal_weights_arrive_in_the_dtype_of_each_rank() -> None:
    here, there = {"w": VALUES.clone()}, {"w": torch.zeros(64, dtype=torch.bfloat16)}
    assert sent_tensors(together(here, there)[0]) == 1
    assert torch.equal(there["w"], VALUES.bfloat16())


def test_small_difference_between_equal_dtypes_counts() -> None:
    here, there = {"w": VALUES.clone()}, {"w": VALUES * (1 + 1e-6)}
    assert sent_tensors(together(here, there)[0]) == 1
    assert torch.equal(here["w"], there["w"])


def test_integers_of_another_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 1 differ from rank 0 in name, shape or dtype: \['n'\]"):
        together({"n": torch.zeros(2, dtype=torch.int64)}, {"n": torch.zeros(2, dtype=torch.int32)})


def test_digest_of_frozen_weights_is_that_of_every_precision() -> None:
    module = nn.Linear(4, 4)
    digests = [
        frozen_digest(module, tensor_digests({"w": VALUES.to(dtype)}))
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    ]
    assert len(set(digests)) == 1
    assert frozen_digest(module, tensor_digests({"w": VALUES + 1})) != digests[0]
    assert frozen_digest(module, tensor_digests({"v": VALUES})) != digests[0]


def test_floating_buffer_keeps_the_dtype_of_its_rank() -> None:
    module = nn.BatchNorm1d(2).bfloat16()
    set_buffer(module, "running_mean", torch.ones(3))
    assert torch.equal(module.running_mean, torch.ones(3, dtype=torch.bfloat16))
    set_buffer(module, "num_batches_tracked", torch.tensor(3))
    assert module.num_batches_tracked == 3
