"""How the ranks of one run meet: through the key-value store that the launcher's MASTER_ADDR and MASTER_PORT name.

No process group is opened for training: Lightning itself broadcasts on a default group before every batch, which would
put all ranks in lock-step. What start-up and the end of training need of collectives, a barrier and a broadcast of
small objects, goes through the store. For ``validate``, ``test`` and ``predict`` a real process group is opened over
the same store and destroyed after the stage.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

from lightning_async_localsgd.liveness import has_ended, this_process

_log = logging.getLogger(__name__)

# Seconds between two looks into the store while waiting. Its own blocking wait cannot be used: it prints a warning at
# each time-out, and holds the client that other threads share.
_FIRST_PAUSE = 0.001
_LONGEST_PAUSE = 0.05

_PROCESS = "process"

_stores: dict[tuple[str, int], TCPStore] = {}
"""One store a process and address, kept for the process's life: a second Trainer in the same script meets on it too."""


class RendezvousError(RuntimeError):
    """The ranks did not meet. The text says who is missing and what to do."""


def _open_store(host: str, port: int, is_host: bool, timeout: float) -> TCPStore:
    if (host, port) not in _stores:
        try:
            _stores[host, port] = TCPStore(
                host,
                port,
                is_master=is_host,
                timeout=timedelta(seconds=timeout),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (RuntimeError, OSError) as error:
            if is_host:
                raise RendezvousError(
                    f"rank 0 cannot listen at MASTER_ADDR={host} MASTER_PORT={port} ({error}); another job may be "
                    "using that port: set MASTER_PORT to a free one"
                ) from error
            raise RendezvousError(
                f"rank 0 cannot be reached at MASTER_ADDR={host} MASTER_PORT={port} within start_timeout={timeout:g} s "
                f"({error}); check that rank 0 is running and that the address and port can be reached from here"
            ) from error
    return _stores[host, port]


def _host_identity() -> str:
    """Equal for two processes exactly if they can talk without a network: same machine, same network namespace."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # Not Linux: the name has to do.
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/net"))
    return "/".join(parts)


def open_group_of_one(backend: str, timeout: timedelta | None, **kwargs: Any) -> bool:
    """In a world of one: opens the default process group, unless there is one; returns whether it did."""
    if dist.is_initialized():
        return False
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout, **kwargs)
    return True


class Rendezvous:
    """The meeting point of all ranks for one run. Every rank makes the same calls in the same order.

    Args:
        host: MASTER_ADDR.
        port: MASTER_PORT.
        rank: this rank.
        world_size: ranks in all.
        timeout: seconds for which rank 0 waits for the others, and for which the others wait to reach rank 0. Once
            they have reached it they wait for as long as it lives: it may be preparing data.
        watch: called while waiting; raises if waiting has become pointless (a launched process has ended).
        ended: the ranks whose processes are known to have ended.
        run: number of the run, the same on all ranks.
        late: this rank has been started again while the others train: it has no part in what they do together until
            :meth:`meet_again`, and takes its own values for theirs.

    Raises:
        RendezvousError: the store cannot be opened or reached.

    """

    def __init__(
        self,
        host: str,
        port: int,
        rank: int,
        world_size: int,
        timeout: float,
        watch: Callable[[], None] = lambda: None,
        ended: Callable[[], set[int]] = set,
        run: int = 1,
        late: bool = False,
    ) -> None:
        self.host = host
        self.rank = rank
        self.world_size = world_size
        self._timeout = timeout
        self._watch = watch
        self._ended = ended
        self._calls = 0
        self._chapter = "before"
        self._late = late
        self._group = False
        self.survivors: Callable[[], set[int]] | None = None
        """On rank 0, once training has run: which ranks are still there. The others are not waited for."""
        # Under torchrun the agent hosts the store, which outlives a restart of the group: keys carry the restart count.
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = _open_store(host, port, rank == 0 and not agent, timeout)
        self._store = PrefixStore(f"async_localsgd/{restart}/{run}", store)
        self.post(_PROCESS, this_process())

    def barrier(self, name: str | None = None) -> None:
        """Returns when all ranks have come here.

        Raises:
            RendezvousError: rank 0 waited for longer than the timeout; names the missing ranks.

        """
        if self._late:
            return
        key = self._next_key(f"barrier({name or ''})")
        self._store.set(f"{key}/{self.rank}", "here")
        if self.rank == 0:
            self._await_all(key, name)
            self._store.set(f"{key}/go", "go")
        else:
            self._await(f"{key}/go")

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The object that rank ``src`` gave, on every rank. Small objects only: it is pickled into the store."""
        if self._late:
            return obj
        key = self._next_key("broadcast")
        if self.rank == src:
            # The store takes values of up to 8 MiB; larger objects go in pieces.
            data = pickle.dumps(obj)
            pieces = [data[at : at + 2**22] for at in range(0, len(data), 2**22)]
            for number, piece in enumerate(pieces):
                self._store.set(f"{key}/{number}", piece)  # type: ignore[arg-type] # bytes are meant
            self._store.set(key, str(len(pieces)))
            return obj
        self._await(key)
        return pickle.loads(b"".join(self._store.get(f"{key}/{n}") for n in range(int(self._store.get(key)))))

    def post(self, name: str, text: str) -> None:
        """Leaves a note for rank 0, at any time; nobody waits for it."""
        self._store.set(f"notes({name})/{self.rank}", text)

    def posted(self, name: str) -> dict[int, str]:
        """The notes of that name that have been left so far, by rank."""
        keys = {rank: f"notes({name})/{rank}" for rank in range(self.world_size)}
        return {rank: self._store.get(key).decode() for rank, key in keys.items() if self._has(key)}

    def one_host(self) -> dict[int, bool]:
        """For every rank, whether it is on rank 0's host."""
        key = self._next_key("host")
        self._store.set(f"{key}/{self.rank}", _host_identity())
        if self.rank == 0:
            self._await_all(key, "host names")
            names = [self._store.get(f"{key}/{rank}") for rank in range(self.world_size)]
            return self.broadcast({rank: name == names[0] for rank, name in enumerate(names)})  # type: ignore[no-any-return]
        return self.broadcast(None)  # type: ignore[no-any-return]

    def open_group(self, backend: str, timeout: timedelta | None, **kwargs: Any) -> None:
        """Opens the default process group for a synchronous stage."""
        if not dist.is_initialized():
            dist.init_process_group(
                backend,
                store=PrefixStore("group", self._store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=timeout,
                **kwargs,
            )
            self._group = True

    def close_group(self) -> None:
        """Destroys the group that :meth:`open_group` opened, if it did."""
        if self._group and dist.is_initialized():
            dist.destroy_process_group()
        self._group = False

    def meet_again(self) -> None:
        """Training has ended on this rank: from here on calls are counted anew, and late ranks take part."""
        self._chapter, self._calls, self._late = "after", 0, False

    def tolerate_deaths(self) -> None:
        """Training has started: from now on a launched process that ends is no reason to stop waiting for rank 0."""
        self._watch = lambda: None

    def conclude(self) -> None:
        """The run is over on this rank. Rank 0, with which the store ends, waits until it is so on the others."""
        key = "conclude"  # Once in a run; a rank that failed may have made fewer calls, so it has no number.
        if self.survivors is None:
            self.survivors = lambda: set(range(self.world_size)) - self._ended()
        if self.rank > 0:
            with suppress(RuntimeError, ConnectionError):  # Rank 0 had no reason to wait any longer.
                self._store.set(f"{key}/{self.rank}", "over")
            return
        self._store.set(f"{key}/0", "over")
        try:
            self._await_all(key, "the end of the run")
        except RuntimeError as error:
            _log.warning("not all ranks have ended their run: %s", error)

    def _next_key(self, name: str) -> str:
        self._calls += 1
        return f"{self._chapter}/{self._calls}/{name}"

    def _await(self, key: str) -> None:
        """Waits without limit while rank 0, which hosts the store or is watched by whoever does, lives."""
        pause = _FIRST_PAUSE
        while not self._has(key):
            self._watch()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _await_all(self, key: str, name: str | None) -> None:
        """Rank 0: waits until every rank has set its key below ``key``."""
        until = time.monotonic() + self._timeout
        pause = _FIRST_PAUSE
        missing = list(range(self.world_size))
        while missing := [rank for rank in missing if not self._has(f"{key}/{rank}")]:
            if self.survivors is None:
                self._watch()
            else:
                alive = self.survivors()
                processes = self.posted(_PROCESS)
                missing = [rank for rank in missing if rank in alive and not has_ended(processes.get(rank, ""))]
            if missing and time.monotonic() > until:
                ranks = ", ".join(map(str, missing))
                raise RendezvousError(
                    f"rank(s) {ranks} of {self.world_size} did not arrive at {name or 'a barrier'!r} within "
                    f"start_timeout={self._timeout:g} s; see whether they were started and what they printed, or raise "
                    "start_timeout if they only need longer"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _has(self, key: str) -> bool:
        try:
            return self._store.check([key])
        except (RuntimeError, ConnectionError) as error:
            raise RendezvousError(
                f"rank {self.rank} lost its connection to the store of the run ({error}); rank 0, which hosts it, has "
                "probably ended: see what it printed"
            ) from error
