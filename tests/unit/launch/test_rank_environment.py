"""What a process learns about its rank, from the environment and from ``torch.distributed``."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import get_rank, get_world_size, is_initialized

from lightning_async_localsgd.launch.rank_environment import rank_environment, ranks_in_torch_distributed
from lightning_async_localsgd.launch.rendezvous import open_group_of_one

NAMES = ("RANK", "GLOBAL_RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def test_environment_names_the_rank_and_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    with rank_environment(5, 6, 1, 2):
        assert [os.environ[name] for name in NAMES] == ["5", "5", "1", "6", "2"]
        with rank_environment(0, 1, 0, 1):
            assert [os.environ[name] for name in NAMES] == ["0", "0", "0", "1", "1"]
        assert [os.environ[name] for name in NAMES] == ["5", "5", "1", "6", "2"]
    assert [os.environ.get(name) for name in NAMES] == [None, None, None, "8", None]


def test_torch_distributed_tells_the_rank_and_nothing_else() -> None:
    assert not is_initialized()
    with ranks_in_torch_distributed(2, 3):
        assert is_initialized()
        assert (get_rank(), get_world_size(), get_rank(dist.group.WORLD)) == (2, 3, 2)
        for communicate in (dist.barrier, lambda: dist.broadcast(torch.ones(1), src=0), lambda: dist.new_group([0])):
            with pytest.raises((RuntimeError, ValueError), match=r"async_localsgd.* split the data by rank and world"):
                communicate()
    assert not is_initialized()


def test_ranks_are_hidden_after_an_error() -> None:
    with pytest.raises(KeyError), ranks_in_torch_distributed(0, 2):
        raise KeyError
    assert not is_initialized()


def test_handlers_of_signals_see_no_process_group() -> None:
    seen: list[bool] = []

    @contextmanager
    def handled(signum: signal.Signals) -> Iterator[Any]:
        before = signal.signal(signum, lambda *_: seen.append(is_initialized()))
        try:
            yield signal.getsignal(signum)
        finally:
            signal.signal(signum, before)

    with handled(signal.SIGTERM) as handler:
        with ranks_in_torch_distributed(0, 2):
            signal.raise_signal(signal.SIGTERM)
            assert is_initialized()
        assert seen == [False]
        assert signal.getsignal(signal.SIGTERM) is handler


def test_existing_process_group_stays() -> None:
    assert open_group_of_one("gloo", None)
    try:
        with ranks_in_torch_distributed(1, 2):
            assert (get_rank(), get_world_size()) == (0, 1)
        assert is_initialized()
    finally:
        dist.destroy_process_group()
