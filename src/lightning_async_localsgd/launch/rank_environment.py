"""How code that reads data learns which rank it runs on: environment variables, and ``torch.distributed``.

Data libraries split data among ranks by one of the two. Training has no process group, so the environment must be
right in every rank's process, however the process was started. Code that asks ``torch.distributed`` gets an answer
while it reads data, and only then.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch.distributed as dist

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals with handlers of Lightning, which use the default process group if there is one."""


@contextmanager
def rank_environment(rank: int, world_size: int, local_rank: int, local_world_size: int) -> Iterator[None]:
    """Set the environment variables that torchrun sets, and ``GLOBAL_RANK``; restore the previous ones afterwards.

    Args:
        rank: number of this process among all ranks.
        world_size: number of ranks.
        local_rank: number of this process among the ranks of this node.
        local_world_size: number of ranks of this node.

    """
    values = {
        "RANK": rank,
        "GLOBAL_RANK": rank,  # LitData reads this name.
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": local_world_size,
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: str(value) for name, value in values.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Ranks:
    """Stands in for the default process group. Knows the ranks, and refuses to communicate.

    Args:
        rank: number of this process.
        world_size: number of ranks.

    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size

    def rank(self) -> int:
        """Return the number of this process."""
        return self._rank

    def size(self) -> int:
        """Return the number of ranks."""
        return self._world_size

    def __repr__(self) -> str:
        # Some of torch's errors show this.
        return (
            "(in training with async_localsgd, torch.distributed only tells code that reads data its rank and the "
            "number of ranks, because ranks do not wait for each other; communicate before fit, or split the data by "
            "rank and world size alone)"
        )

    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError(f"There is no {name!r} in this process group {self!r}.")


@contextmanager
def ranks_in_torch_distributed(rank: int, world_size: int) -> Iterator[None]:
    """Let ``torch.distributed`` tell the rank and the number of ranks. A process that is forked here keeps this.

    Handlers of signals run without it. With a default process group, this does nothing.

    Args:
        rank: number of this process.
        world_size: number of ranks.

    """
    if not dist.is_available() or dist.is_initialized():
        yield
        return
    ranks: Any = _Ranks(rank, world_size)
    restores = _hide_from_signal_handlers(ranks)
    dist.GroupMember.WORLD = ranks
    try:
        yield
    finally:
        dist.GroupMember.WORLD = None
        for restore in restores:
            restore()


def _hide_from_signal_handlers(ranks: Any) -> list[Callable[[], Any]]:
    """Wrap the handlers of signals, and return functions that put the handlers back."""

    def hidden(handler: Callable[..., Any]) -> Callable[..., Any]:
        def handle(signum: int, frame: Any) -> None:
            shown = dist.GroupMember.WORLD is ranks
            if shown:
                dist.GroupMember.WORLD = None
            try:
                handler(signum, frame)
            finally:
                if shown:
                    dist.GroupMember.WORLD = ranks

        return handle

    restores: list[Callable[[], Any]] = []
    for signum in _SIGNALS:
        handler = signal.getsignal(signum)
        if callable(handler):
            wrapped = hidden(handler)
            try:
                signal.signal(signum, wrapped)
            except ValueError:  # Outside the main thread there is no handler to run, either.
                break
            restores.append(partial(signal.signal, signum, handler))
    return restores
