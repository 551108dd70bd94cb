"""Tensors that are not exchanged, on ranks that have them in unequal dtypes."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from lightning_async_localsgd.runtime.sync_state import (
    frozen_digest,
    same_frozen,
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


def digest_of(**tensors: torch.Tensor) -> str:
    return frozen_digest(nn.Linear(4, 4), tensors, tensor_digests(tensors))


def test_frozen_weights_are_the_same_in_every_precision() -> None:
    own = digest_of(w=VALUES)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert same_frozen(own, digest_of(w=VALUES.to(dtype)))
    assert not same_frozen(own, digest_of(w=(VALUES + 1).bfloat16()))
    assert not same_frozen(own, digest_of(v=VALUES))


def test_small_difference_between_frozen_weights_of_equal_dtypes_counts() -> None:
    other = VALUES * (1 + 1e-6)
    assert torch.equal(other.bfloat16(), VALUES.bfloat16())
    assert not same_frozen(digest_of(w=VALUES), digest_of(w=other))
    assert same_frozen(digest_of(w=VALUES), digest_of(w=other.double()))


def test_floating_buffer_keeps_the_dtype_of_its_rank() -> None:
    module = nn.BatchNorm1d(2).bfloat16()
    set_buffer(module, "running_mean", torch.ones(3))
    assert torch.equal(module.running_mean, torch.ones(3, dtype=torch.bfloat16))
    set_buffer(module, "num_batches_tracked", torch.tensor(3))
    assert module.num_batches_tracked == 3


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float4_e2m1fn_x2"])
def test_quantized_weights_count_with_their_exact_bytes(name: str) -> None:
    if not hasattr(torch, name):
        pytest.skip(f"torch {torch.__version__} has no {name}")
    first, second = (torch.full((4,), byte, dtype=torch.uint8).view(getattr(torch, name)) for byte in (1, 2))
    assert tensor_digests({"w": first}) == tensor_digests({"w": first.clone()})
    assert tensor_digests({"w": first}) != tensor_digests({"w": second})
