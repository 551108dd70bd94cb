"""Rendezvous of a run's ranks, through a key-value store at the launcher's MASTER_ADDR and MASTER_PORT.

Training has no process group: Lightning would broadcast on a default group before every batch, which would keep all
ranks in lock-step. The few collective operations before and after training, a barrier and a broadcast of small objects,
use the store. ``validate``, ``test`` and ``predict`` open a real process group over the same store, and destroy the
group afterwards.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

from lightning_async_localsgd.launch.liveness import has_ended, process_identity
from lightning_async_localsgd.launch.uncaught import FollowingError

_log = logging.getLogger(__name__)

# Seconds between two checks of a key. The store's own blocking wait cannot be used: it prints a warning at each
# time-out, and it blocks the client, which other threads share.
_FIRST_PAUSE = 0.001
_LONGEST_PAUSE = 0.05

_PIECE_BYTES = 2**22
"""The store takes values of up to 8 MiB, so larger objects are split."""

_PROCESS = "process"
_PLACE = "place"

_CONTRADICTION, _READERS = "contradiction", "readers"

_SECONDS_FOR_READERS = 30.0
"""Seconds that rank 0 keeps the store open for ranks that have not read yet why the run ends."""

_SECONDS_TO_TELL = 60.0
"""Seconds that a rank that cannot take part waits for rank 0 to tell the others."""

_RANDOM_NODE = 1 << 40
"""Set in the result of :func:`uuid.getnode` if this is no network card's address, but random for each process."""

_stores: dict[tuple[str, int], TCPStore] = {}
"""One store per address, kept for the lifetime of the process, because the script's next Trainer uses it again."""


class RendezvousError(FollowingError):
    """The ranks did not meet. The text names the missing ranks and what to do."""


class HostsDifferError(FollowingError):
    """The hosts contradict each other about the run. The same text is raised on every host, and names the host."""


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
                    "using this port: set MASTER_PORT to a free one"
                ) from error
            raise RendezvousError(
                f"rank 0 cannot be reached at MASTER_ADDR={host} MASTER_PORT={port} within start_timeout={timeout:g} s "
                f"({error}); check that rank 0 is running, and that this host can reach the address and port"
            ) from error
    return _stores[host, port]


def _host_identity() -> str:
    """Return a text that is equal for two processes exactly if they share a machine and a network namespace."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/net"))
    except OSError:
        # Not Linux. Many Macs have the same host name, and a network card tells them apart.
        node = uuid.getnode()
        if not node & _RANDOM_NODE:
            parts.append(f"{node:012x}")
    return "/".join(parts)


def _agent_hosts_store() -> bool:
    """Return whether torchrun's agent hosts the store. It outlives a restart of the ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def _keys_of_call(store: TCPStore, call: int) -> PrefixStore:
    # Keys carry the restart count, because an agent's store outlives a restart.
    return PrefixStore(f"async_localsgd/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{call}", store)


def end_all_ranks(host: str, port: int, rank: int, world_size: int, timeout: float, call: int, reason: str) -> None:
    """Let every rank of the run end with the reason for which this rank cannot take part.

    Args:
        host: MASTER_ADDR.
        port: MASTER_PORT.
        rank: this rank.
        world_size: number of ranks.
        timeout: seconds to reach rank 0.
        call: number of the Trainer call in the script.
        reason: text for all ranks, which names this host.

    """
    is_host = rank == 0 and not _agent_hosts_store()
    _log.error("%s", reason)  # At once, because rank 0 may not be there yet.
    try:
        store = _keys_of_call(_open_store(host, port, is_host, min(timeout, _SECONDS_TO_TELL)), call)
        store.compare_set(_CONTRADICTION, "", reason)
        store.add(_READERS, int(rank > 0))
        if is_host:
            _await_readers(store, world_size)
    except RuntimeError as error:
        _log.warning("the other ranks could not be told: %s", error)


def _await_readers(store: PrefixStore, world_size: int) -> None:
    """Wait on rank 0, which hosts the store, until all other ranks have read a contradiction, but not for long."""
    until = time.monotonic() + _SECONDS_FOR_READERS
    while store.add(_READERS, 0) < world_size - 1 and time.monotonic() < until:
        time.sleep(_LONGEST_PAUSE)


def open_group_of_one(backend: str, timeout: timedelta | None, **kwargs: Any) -> bool:
    """Open a default process group of one rank, unless a default group exists. Return whether one was opened."""
    if dist.is_initialized():
        return False
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout, **kwargs)
    return True


class Rendezvous:
    """Collective operations of all ranks in one call of the Trainer. Every rank performs the same ones in order.

    Args:
        host: MASTER_ADDR.
        port: MASTER_PORT.
        rank: this rank.
        world_size: number of ranks.
        timeout: seconds that rank 0 waits for the other ranks, and that the other ranks try to reach rank 0. After
            reaching rank 0, they wait without a limit while rank 0 lives: it may be preparing data.
        watch: called repeatedly while waiting; raises if waiting is pointless because a launched process has ended.
        ended: returns the ranks whose processes have ended, as far as this process knows.
        call: number of the Trainer call in the script, the same on all ranks.
        rejoins: this rank was restarted during training. Its operations before :meth:`begin_after_training` are
            no-ops: barriers do not wait, and a broadcast returns this rank's own object.
        expected_workers: the option of this rank, which must be that of rank 0.
        batch_size: text of the option of this rank, which must be that of rank 0.

    Raises:
        RendezvousError: the store cannot be opened or reached.
        HostsDifferError: the hosts contradict each other about the ranks of the run.

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
        call: int = 1,
        rejoins: bool = False,
        expected_workers: int | None = None,
        batch_size: str = "",
    ) -> None:
        self.host = host
        self.rank = rank
        self.world_size = world_size
        self._timeout = timeout
        self._watch = watch
        self._ended = ended
        self._operations = 0
        self._phase = "before"
        self._skips = rejoins
        self._group = False
        self.survivors: Callable[[], set[int]] | None = None
        """On rank 0, after training: returns the ranks that are still running. Rank 0 waits only for these."""
        self._hosts_store = rank == 0 and not _agent_hosts_store()
        self._store = _keys_of_call(_open_store(host, port, self._hosts_store, timeout), call)
        self.post(_PROCESS, process_identity())
        if not rejoins:
            self._compare_places(expected_workers, batch_size)

    def barrier(self, name: str | None = None) -> None:
        """Wait until all ranks have reached this call.

        Raises:
            RendezvousError: rank 0 waited longer than the timeout; the text names the missing ranks.

        """
        if self._skips:
            return
        key = self._next_key(f"barrier({name or ''})")
        self._store.set(f"{key}/{self.rank}", "here")
        if self.rank == 0:
            self._wait_for_all(key, name)
            self._store.set(f"{key}/go", "go")
        else:
            self._wait_for(f"{key}/go")

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return rank ``src``'s object on every rank. For small objects only: the object is pickled into the store."""
        if self._skips:
            return obj
        key = self._next_key("broadcast")
        if self.rank == src:
            data = pickle.dumps(obj)
            pieces = [data[at : at + _PIECE_BYTES] for at in range(0, len(data), _PIECE_BYTES)]
            for number, piece in enumerate(pieces):
                self._store.set(f"{key}/{number}", piece)  # type: ignore[arg-type] # the stub says str, bytes work
            self._store.set(key, str(len(pieces)))
            return obj
        self._wait_for(key)
        return pickle.loads(b"".join(self._store.get(f"{key}/{n}") for n in range(int(self._store.get(key)))))

    def gather(self, obj: Any) -> list[Any]:
        """Return the objects of all ranks, in order, on every rank. For small objects only."""
        return [self.broadcast(obj, source) for source in range(self.world_size)]

    def post(self, name: str, text: str) -> None:
        """Leave a note for rank 0. May be called at any time, and does not wait."""
        self._store.set(f"notes({name})/{self.rank}", text)

    def posted(self, name: str) -> dict[int, str]:
        """Return the notes with this name that have been left so far, by rank."""
        keys = {rank: f"notes({name})/{rank}" for rank in range(self.world_size)}
        return {rank: self._store.get(key).decode() for rank, key in keys.items() if self._has(key)}

    def processes(self) -> dict[int, str]:
        """Return the :func:`.process_identity` of each rank that has posted one."""
        return self.posted(_PROCESS)

    def on_host_of_rank_0(self) -> dict[int, bool]:
        """Return for every rank whether it is on rank 0's host. A collective operation."""
        key = self._next_key("host")
        self._store.set(f"{key}/{self.rank}", _host_identity())
        if self.rank == 0:
            self._wait_for_all(key, "host names")
            names = [self._store.get(f"{key}/{rank}") for rank in range(self.world_size)]
            return self.broadcast({rank: name == names[0] for rank, name in enumerate(names)})  # type: ignore[no-any-return]
        return self.broadcast(None)  # type: ignore[no-any-return]

    def open_group(self, backend: str, timeout: timedelta | None, **kwargs: Any) -> None:
        """Open the default process group for ``validate``, ``test`` or ``predict``."""
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
        """Destroy the process group, if :meth:`open_group` opened one."""
        if self._group and dist.is_initialized():
            dist.destroy_process_group()
        self._group = False

    def begin_after_training(self) -> None:
        """Begin the operations after training, in which restarted ranks take part.

        Operations are numbered from the beginning again, because a restarted rank has skipped those before training.
        """
        self._phase, self._operations, self._skips = "after", 0, False

    def ignore_ended_processes(self) -> None:
        """Stop watching launched processes: once training has started, other ranks continue without them."""
        self._watch = lambda: None

    def finish(self) -> None:
        """Finish this rank's call of the Trainer. Rank 0, whose process may host the store, waits for the others."""
        key = "finish"  # Without a number: a rank that failed may have performed fewer operations.
        if self.survivors is None:
            self.survivors = lambda: set(range(self.world_size)) - self._ended()
        if self.rank > 0:
            with suppress(RuntimeError, ConnectionError):  # Rank 0 may have ended without waiting.
                self._store.set(f"{key}/{self.rank}", "over")
            return
        self._store.set(f"{key}/0", "over")
        try:
            self._wait_for_all(key, "the end of the run")
        except RuntimeError as error:
            _log.warning("some ranks did not reach the end of the run: %s", error)

    def _compare_places(self, expected_workers: int | None, batch_size: str) -> None:
        """Check that this rank and rank 0 were told the same about the run, and that no rank was started twice."""
        host = socket.gethostname()
        place: dict[str, Any] = {
            "id": uuid.uuid4().hex,
            "host": host,
            "ranks": self.world_size,
            "workers": expected_workers,
        }
        place["batch_size"] = batch_size
        # The first process with this rank writes. Another one reads what the first one has written.
        first = json.loads(self._store.compare_set(f"{_PLACE}/{self.rank}", "", json.dumps(place)))
        of_rank_0 = first
        if self.rank > 0:
            self._wait_for(f"{_PLACE}/0")
            of_rank_0 = json.loads(self._store.get(f"{_PLACE}/0"))
        ranks, workers, host_0 = of_rank_0["ranks"], of_rank_0["workers"], of_rank_0["host"]
        if ranks != self.world_size:
            self.end_all(
                f"host {host} belongs to a run of {self.world_size} ranks, but rank 0 on host {host_0} to a run of "
                f"{ranks} ranks; use the same num_nodes and devices on every host, or, for unequal numbers of devices, "
                "torchrun, SLURM or ASYNC_LOCALSGD_JOIN"
            )
        if first["id"] != place["id"]:
            self.end_all(
                f"rank {self.rank} was started twice, on host {first['host']} and on host {host}; give each host a "
                "NODE_RANK of its own, and the same num_nodes and devices"
            )
        if workers != expected_workers:
            self.end_all(
                f"host {host} has expected_workers={expected_workers}, but rank 0 on host {host_0} has "
                f"expected_workers={workers}; use the same value on every host"
            )
        if batch_size != of_rank_0["batch_size"]:
            self.end_all(
                f"host {host} has {batch_size or 'no batch_size'}, but rank 0 on host {host_0} has "
                f"{of_rank_0['batch_size'] or 'no batch_size'}; use the same option on every host"
            )

    def end_all(self, reason: str) -> NoReturn:
        """Raise an error on this rank, and on all ranks that wait before training or will wait.

        Args:
            reason: text for all ranks, which names this host.

        Raises:
            HostsDifferError: always.

        """
        self._store.compare_set(_CONTRADICTION, "", reason)  # The first reason counts.
        self._raise_contradiction()

    def _raise_contradiction(self) -> NoReturn:
        reason = self._store.get(_CONTRADICTION).decode()
        self._store.add(_READERS, int(self.rank > 0))
        if self._hosts_store:
            _await_readers(self._store, self.world_size)
        raise HostsDifferError(reason)

    def _check_hosts(self) -> None:
        """Raise if a rank has found that the hosts contradict each other. Called while this rank waits."""
        if self._phase == "before" and not self._skips and self._store.check([_CONTRADICTION]):
            self._raise_contradiction()

    def _next_key(self, name: str) -> str:
        self._operations += 1
        return f"{self._phase}/{self._operations}/{name}"

    def _wait_for(self, key: str) -> None:
        """Wait for a key without a limit, while rank 0 lives."""
        pause = _FIRST_PAUSE
        while not self._has(key):
            self._check_hosts()
            self._watch()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _wait_for_all(self, key: str, name: str | None) -> None:
        """Wait on rank 0 until every rank has set its key below ``key``."""
        deadline = time.monotonic() + self._timeout
        pause = _FIRST_PAUSE
        missing = list(range(self.world_size))
        while missing := [rank for rank in missing if not self._has(f"{key}/{rank}")]:
            if self.survivors is None:
                self._check_hosts()
                self._watch()
            else:
                alive = self.survivors()
                processes = self.processes()
                missing = [rank for rank in missing if rank in alive and not has_ended(processes.get(rank, ""))]
            if missing and time.monotonic() > deadline:
                ranks = ", ".join(map(str, missing))
                raise RendezvousError(
                    f"rank(s) {ranks} of {self.world_size} did not arrive at {name or 'a barrier'!r} within "
                    f"start_timeout={self._timeout:g} s; check that they were started and what they printed, or raise "
                    "start_timeout if they need more time"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _has(self, key: str) -> bool:
        try:
            return self._store.check([key])
        except (RuntimeError, ConnectionError) as error:
            raise RendezvousError(
                f"rank {self.rank} lost its connection to the run's store ({error}); rank 0, which hosts the store, "
                "has probably ended: check its output"
            ) from error
