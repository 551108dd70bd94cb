"""Lightning's launchers, without the part that ends every process when one of them dies.

In ordinary data-parallel training one dead rank leaves the others waiting for ever, so Lightning kills them all. Here a
dead worker costs its own round and the others go on. Before training has started a rank that ends is an error still,
which waiting code notices by :func:`.children.raise_if_process_ended`.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from multiprocessing import connection
from typing import TYPE_CHECKING, Any

from lightning.fabric.strategies.launchers.multiprocessing import _check_bad_cuda_fork, _check_missing_main_guard
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.multiprocessing import _GlobalStateSnapshot, _MultiProcessingLauncher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn
from torch.multiprocessing.spawn import ProcessContext, start_processes
from typing_extensions import override

from lightning_async_localsgd.children import children

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

    import lightning.pytorch as pl

_log = logging.getLogger(__name__)

_PATIENCE = 4.0
"""Seconds that launched processes get to notice that rank 0 has failed, and again to react to SIGTERM."""


class AsyncScriptLauncher(_SubprocessScriptLauncher):
    """Starts the script once more for every other local rank, and lets each process live and die by itself."""

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Launches the other ranks' processes, unless something else has, and runs ``function`` in this one."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            children.update(enumerate(self.procs, start=1))
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def mark_started(self) -> None:
        """Nothing to tell anybody: this process is rank 0 and knows."""

    def end_processes(self) -> None:
        """This process has failed, and with it the job: what it has launched ends by itself soon, or is ended."""
        _await(lambda: all(process.poll() is not None for process in children.values()))
        _end([process for process in children.values() if process.poll() is None], lambda one: one.poll() is None)


class AsyncProcessLauncher(_MultiProcessingLauncher):
    """Starts all ranks with :mod:`multiprocessing`; the job is what rank 0 makes of it.

    A rank above 0 that ends badly after training has started is reported and nothing more. Before that, and for rank 0
    at any time, it ends the job with that rank's exception.
    """

    _started: Event | None = None

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Runs ``function`` in one process per rank and returns rank 0's result."""
        if self._start_method == "spawn":
            _check_missing_main_guard()
        else:
            _check_bad_cuda_fork()
        if self._already_fit and trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            raise NotImplementedError(
                "Calling trainer.fit() twice on the same Trainer is not supported when processes are started with "
                f"{self._start_method!r}; make a new Trainer and pass it fit(ckpt_path=...) to go on"
            )
        environment = self._strategy.cluster_environment
        assert environment is not None
        # Chosen here, so that all ranks agree on it.
        os.environ["MASTER_PORT"] = str(environment.main_port)

        context = multiprocessing.get_context(self._start_method)
        results = context.SimpleQueue()
        started = context.Event()
        states = _GlobalStateSnapshot.capture() if self._start_method == "spawn" else None
        processes = start_processes(  # type: ignore[no-untyped-call]
            self._run_rank,
            args=(started, trainer, function, args, kwargs, results, states),
            nprocs=self._strategy.num_processes,  # type: ignore[attr-defined]
            start_method=self._start_method,
            join=False,
        )
        self.procs = processes.processes
        try:
            self._join(processes, started)
        except BaseException:
            # An interrupt of this process alone; the ranks would go on, and it would wait for them when it exits.
            _end(processes.processes, lambda process: process.is_alive())
            raise
        output = results.get()
        if trainer is None:
            return output
        self._already_fit |= trainer.state.fn == TrainerFn.FITTING
        self._recover_results_in_main_process(output, trainer)
        return output.trainer_results

    def mark_started(self) -> None:
        """Training has started: from now on the death of a rank above 0 does not end the job. Called in rank 0."""
        if self._started is not None:
            self._started.set()

    def _run_rank(self, rank: int, started: Event, *args: Any) -> None:
        self._started = started
        self._wrapping_function(rank, *args)

    def _join(self, processes: ProcessContext, started: Event) -> None:
        """Waits for all processes.

        Raises:
            ProcessRaisedException, ProcessExitedException: from torch, for the rank that ends the job.

        """
        while processes.sentinels:
            for sentinel in connection.wait(list(processes.sentinels)):
                rank = processes.sentinels[sentinel]
                process = processes.processes[rank]
                process.join()
                if process.exitcode == 0 or (rank > 0 and started.is_set()):
                    del processes.sentinels[sentinel]
                    if process.exitcode != 0:
                        _report(rank, process.exitcode, processes.error_files[rank])
                else:
                    processes.join()  # Ends the others and raises this one's exception.


def _await(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + _PATIENCE
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)


def _end(processes: list[Any], is_alive: Callable[[Any], bool]) -> None:
    """Asks the processes to end, waits a while, and ends those that do not."""
    try:
        for process in filter(is_alive, processes):
            process.terminate()
        _await(lambda: not any(map(is_alive, processes)))
    finally:
        for process in filter(is_alive, processes):
            process.kill()


def _report(rank: int, exit_code: int, error_file: str) -> None:
    reason = f"exit code {exit_code}"
    if os.access(error_file, os.R_OK):
        with open(error_file, "rb") as file:
            reason = f"this error:\n{pickle.load(file)}"
    _log.error("the process of local rank %d ended with %s", rank, reason)
