"""The launcher for the start method ``popen``, which runs the script once per rank."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_async_localsgd.launch.children import (
    Child,
    children,
    exit_with_launcher_until_joined,
    is_running,
    report_joined,
    terminate,
    wait_until,
)
from lightning_async_localsgd.launch.restarts import JoinTicket, MayRestart, RestartSchedule, always
from lightning_async_localsgd.lightning.checkpoints.run_folder import prepare_fit
from lightning_async_localsgd.lightning.launchers.host_ranks import JoiningEnvironment
from lightning_async_localsgd.lightning.trainer_access.launchers import (
    ScriptLauncher,
    hydra_is_installed,
    limit_threads,
)
from lightning_async_localsgd.lightning.trainer_access.strategy import strategy_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.1

_LATE_EXIT_TIMEOUT = 1.0
"""Seconds for a restarted process that has not joined yet to react to SIGTERM."""


class AsyncScriptLauncher(ScriptLauncher):
    """Runs the script once more for every other local rank, and restarts ranks that die during training.

    Lightning's own launcher ends all ranks when one dies, because in synchronous training the others would wait for
    the dead rank forever. Here the other ranks continue. Before training has started, a rank that ends is still an
    error, which waiting ranks notice by :func:`.raise_if_process_ended`.

    Args:
        cluster_environment: cluster environment of this run.
        num_processes: number of ranks on this node.
        num_nodes: number of nodes.
        max_restarts: restarts of each worker.
        check_hosts: checks before anything is started whether the hosts fit together.

    """

    def __init__(
        self,
        cluster_environment: ClusterEnvironment,
        num_processes: int,
        num_nodes: int,
        max_restarts: int = 3,
        check_hosts: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self._max_restarts = max_restarts
        self._check_hosts = check_hosts
        self._watch: _ChildWatch | None = None

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Start the processes of the other ranks, unless something else does, and run ``function`` in this process."""
        exit_with_launcher_until_joined()
        fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        takes_part = trainer is None or strategy_of(trainer).takes_part(fitting)
        if trainer is not None and fitting:
            args = prepare_fit(trainer, args)
        if not takes_part:
            # A script usually looks at the first result: return one data loader without metrics, or no predictions.
            assert trainer is not None
            return {TrainerFn.FITTING: None, TrainerFn.PREDICTING: []}.get(trainer.state.fn, [{}])  # type: ignore[arg-type]
        self._check_hosts()
        # A host that joins a running training does so with a worker for each of its devices.
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            folder = _script_folder()
            for rank, process in enumerate(self.procs, start=1):
                environment = {**os.environ, "LOCAL_RANK": str(rank)}
                children[rank] = Child(process, process.args, environment, folder)  # type: ignore[arg-type]
        limit_threads(self.num_processes)
        return function(*args, **kwargs)

    def mark_started(self, ticket: JoinTicket, may_restart: MayRestart = always) -> None:
        """Start to restart launched processes that die, because training has started on this rank.

        Args:
            ticket: how a process on this host joins the training.
            may_restart: whether the server would accept a worker again.

        """
        report_joined()
        # The server chooses the numbers of workers that join later, so their launcher cannot restart them by number.
        if children and not isinstance(self.cluster_environment, JoiningEnvironment):
            first_worker = self.cluster_environment.node_rank() * self.num_processes
            self._watch = _ChildWatch(ticket, RestartSchedule(self._max_restarts, may_restart), first_worker)
            self._watch.start()

    def mark_ended(self) -> None:
        """Stop restarting processes, because training has ended, and end those that have not rejoined yet.

        May be called at any time, and more than once.
        """
        watch, self._watch = self._watch, None
        if watch is None:
            return
        watch.end()
        late = {rank: child for rank, child in children.items() if child.rejoining and child.process.poll() is None}
        for rank in late:
            _log.warning("local rank %d was restarted too late to rejoin; stopping its process", rank)
        terminate([child.process for child in late.values()], is_running, _LATE_EXIT_TIMEOUT)
        for child in children.values():
            child.close_pipe()

    @override
    def kill(self, signum: int) -> None:
        """Send a signal to all launched processes, which ends the job. Includes processes of earlier Trainers."""
        if self._watch is not None:
            self._watch.stopping = True
        for child in children.values():
            child.process.send_signal(signum)

    def end_processes(self) -> None:
        """End the launched processes after this process has failed. They have some time to end by themselves."""
        processes = [child.process for child in children.values()]
        wait_until(lambda: not any(map(is_running, processes)))
        terminate(processes, is_running)


class _ChildWatch(threading.Thread):
    """Restarts launched processes that die, until training has ended.

    Args:
        ticket: how a restarted process joins the training.
        restarts: decides which processes are restarted, and when.
        first_worker: worker number of local rank 0.

    Attributes:
        stopping: whether the job is being stopped. Processes that end from then on are not restarted.

    """

    def __init__(self, ticket: JoinTicket, restarts: RestartSchedule, first_worker: int) -> None:
        super().__init__(name="async_localsgd-restarts", daemon=True)
        # Not an Event: this is set in a signal handler, which may interrupt a thread that holds the Event's lock.
        self.stopping = False
        self._ticket = ticket
        self._restarts = restarts
        self._first_worker = first_worker
        self._ended = threading.Event()

    def end(self) -> None:
        """End the thread. No process is started after this returns."""
        self._ended.set()
        self.join()

    @override
    def run(self) -> None:
        ended: set[int] = set()
        while not self._ended.wait(_POLL_SECONDS):
            now = time.monotonic()
            for rank, child in children.items():
                code = child.process.poll()
                if code is not None and rank not in ended and not self.stopping:
                    ended.add(rank)
                    self._restarts.on_exit(self._first_worker + rank, code, now)
            for worker, restart_count in self._restarts.pop_due(now).items():
                rank = worker - self._first_worker
                if self.stopping:
                    return
                try:
                    children[rank].restart(self._ticket.variables(worker, restart_count))
                    ended.discard(rank)
                except OSError as error:  # Memory or disk may be available again later.
                    self._restarts.on_failed_start(worker, error, now)


def _script_folder() -> str:
    """Return the directory in which Lightning starts the script, which Hydra may have changed since."""
    if hydra_is_installed():
        from hydra.core.hydra_config import HydraConfig  # type: ignore[import-not-found]
        from hydra.utils import get_original_cwd  # type: ignore[import-not-found]

        if HydraConfig.initialized():
            return str(get_original_cwd())
    return os.getcwd()
