"""The process group of ranks that differ in device and precision."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_async_localsgd.launch.rendezvous import HostsDifferError
from lightning_async_localsgd.launch.stage_group import GroupMember, StageGroup, common_backend

CUDA = GroupMember("here", "cuda", None, "nccl", "32-true")
CPU = GroupMember("there", "cpu", None, "gloo", "32-true")


def test_ranks_use_nccl_only_if_all_have_a_cuda_device() -> None:
    assert common_backend([CUDA, CUDA]) == "nccl"
    assert common_backend([CPU, CPU]) == "gloo"
    assert common_backend([CUDA, CPU]) == common_backend([CPU, CUDA]) == "gloo"


def test_backend_that_one_rank_was_given_holds_for_all() -> None:
    assert common_backend([replace(CUDA, chosen="gloo"), CUDA]) == "gloo"
    assert common_backend([CUDA, replace(CPU, chosen="gloo"), CPU]) == "gloo"


def test_contradicting_backends_name_the_hosts() -> None:
    reason = r"'gloo' \(rank 0 on host here\) and process_group_backend='nccl' \(rank 1 on host here\)"
    with pytest.raises(HostsDifferError, match=reason):
        common_backend([replace(CUDA, chosen="gloo"), replace(CUDA, chosen="nccl")])
    reason = r"'nccl' \(rank 0 on host here\) needs a CUDA device for each rank, but rank 1 on host there is on 'cpu'"
    with pytest.raises(HostsDifferError, match=reason):
        common_backend([replace(CUDA, chosen="nccl"), CPU])


def test_only_ranks_of_unequal_precision_convert_what_they_exchange() -> None:
    group, seen = StageGroup(), list[torch.dtype]()

    def operation(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor.dtype)
        return tensor * 2

    for mixed in (False, True):
        group.mixed = mixed
        for value in (torch.tensor(1.5, dtype=torch.bfloat16), torch.tensor(3)):
            result = group.run(operation, value)
            assert result.dtype == value.dtype
            assert result == value * 2
    assert seen == [torch.bfloat16, torch.int64, torch.float64, torch.int64]


@pytest.mark.parametrize(
    ("other", "mixed"),
    [({}, False), ({"host": "there"}, False), ({"precision": "bf16-mixed"}, True),
     ({"device": "cuda"}, True), ({"software": "2.5.0"}, True)],
)  # fmt: skip
def test_dtypes_may_be_unequal_if_precision_device_or_torch_are(other: dict[str, Any], mixed: bool) -> None:
    def gather(own: GroupMember) -> list[GroupMember]:
        return [own, replace(own, **other)]

    rendezvous: Any = SimpleNamespace(barrier=lambda _: None, gather=gather, open_group=lambda *_, **__: None)
    group = StageGroup()
    assert group.open(rendezvous, torch.device("cpu"), "gloo", "32-true", None) == "gloo"
    assert group.mixed == mixed
