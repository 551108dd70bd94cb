"""Lightning's launchers, without the part that ends every process when one of them dies.

In ordinary data-parallel training one dead rank leaves the others waiting for ever, so Lightning kills them all. Here a
dead worker costs its own round, the others go on, and the process that has launched it starts it again. Before training
has started a rank that ends is an error still, which waiting code notices by :func:`.children.raise_if_process_ended`.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.strategies.launchers.multiprocessing import _check_bad_cuda_fork, _check_missing_main_guard
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.strategies.launchers.subprocess_script import _HYDRA_AVAILABLE, _SubprocessScriptLauncher
from lightning.pytorch.trainer.call import _interrupt
from lightning.pytorch.trainer.states import TrainerFn
from torch.multiprocessing.spawn import ProcessExitedException
from typing_extensions import override

from lightning_async_localsgd.children import (
    Child,
    await_for,
    children,
    end,
    end_with_parent_until_joined,
    is_running,
    tell_joined,
)
from lightning_async_localsgd.joining import JOIN
from lightning_async_localsgd.process_job import Job, RankLine, handle_sigterm_as_before
from lightning_async_localsgd.restarts import (
    RESUME,
    JoinTicket,
    MayRestart,
    Restarts,
    always,
    in_words,
    is_wish_to_end,
    pause_before,
)
from lightning_async_localsgd.run_folder import prepare_fit

if TYPE_CHECKING:
    import lightning.pytorch as pl

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.1
"""Between two looks at the launched processes."""

_SECONDS_FOR_THE_LATE = 1.0
"""For a process that was started again and has not done anything yet to react to SIGTERM."""


class AsyncScriptLauncher(_SubprocessScriptLauncher):
    """Starts the script once more for every other local rank, and again for each of them that dies in training.

    Args:
        cluster_environment: of this run.
        num_processes: ranks of this node.
        num_nodes: nodes.
        max_restarts: of each worker.

    """

    def __init__(
        self, cluster_environment: ClusterEnvironment, num_processes: int, num_nodes: int, max_restarts: int = 3
    ) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self._max_restarts = max_restarts
        self._watch: _ChildWatch | None = None

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Launches the other ranks' processes, unless something else has, and runs ``function`` in this one."""
        end_with_parent_until_joined()
        fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        takes_part = trainer is None or trainer.strategy.takes_part(fitting)  # type: ignore[attr-defined] # ours
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            args = prepare_fit(trainer, args)
        if not takes_part:
            # What a script looks at first is there: one data loader without metrics, no predictions.
            assert trainer is not None
            return {TrainerFn.FITTING: None, TrainerFn.PREDICTING: []}.get(trainer.state.fn, [{}])  # type: ignore[arg-type]
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        # Whoever joins a running training is one worker.
        if not self.cluster_environment.creates_processes_externally and JOIN not in os.environ:
            self._call_children_scripts()
            folder = _working_directory()
            for rank, process in enumerate(self.procs, start=1):
                environment = {**os.environ, "LOCAL_RANK": str(rank)}
                children[rank] = Child(process, process.args, environment, folder)  # type: ignore[arg-type]
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def mark_started(self, ticket: JoinTicket, may_restart: MayRestart = always) -> None:
        """Training has started on this rank: from now on the processes that it has launched are started again.

        Args:
            ticket: how a process of this host joins.
            may_restart: see there.

        """
        tell_joined()
        if children:
            first = self.cluster_environment.node_rank() * self.num_processes
            self._watch = _ChildWatch(ticket, Restarts(self._max_restarts, may_restart), first)
            self._watch.start()

    def mark_ended(self) -> None:
        """Training has ended: nobody is started again, and who was and has not joined yet is ended.

        May be called at any time, and more than once.
        """
        watch, self._watch = self._watch, None
        if watch is None:
            return
        watch.end()
        late = {rank: child for rank, child in children.items() if child.booting and child.process.poll() is None}
        for rank in late:
            _log.warning("the process of local rank %d was started again too late to join; it is ended", rank)
        end([child.process for child in late.values()], is_running, _SECONDS_FOR_THE_LATE)
        for child in children.values():
            child.forget_pipe()

    @override
    def kill(self, signum: int) -> None:
        """Sends a signal to all launched processes, those of an earlier Trainer included. The job ends."""
        if self._watch is not None:
            self._watch.stopping = True
        for child in children.values():
            child.process.send_signal(signum)

    def end_processes(self) -> None:
        """This process has failed, and with it the job: what it has launched ends by itself soon, or is ended."""
        processes = [child.process for child in children.values()]
        await_for(lambda: not any(map(is_running, processes)))
        end(processes, is_running)


class _ChildWatch(threading.Thread):
    """Starts launched processes again when they die, until it is told that training has ended.

    Args:
        ticket: how they join.
        restarts: which of them, and when.
        first: number of the worker of local rank 0.

    Attributes:
        stopping: set where the job is about to end: what dies now was meant to.

    """

    def __init__(self, ticket: JoinTicket, restarts: Restarts, first: int) -> None:
        super().__init__(name="async_localsgd-restarts", daemon=True)
        self.stopping = False  # No event: it is set in a signal handler, which may interrupt anything.
        self._ticket = ticket
        self._restarts = restarts
        self._first = first
        self._ended = threading.Event()

    def end(self) -> None:
        """Returns when nothing is started any more."""
        self._ended.set()
        self.join()

    @override
    def run(self) -> None:
        down: set[int] = set()
        while not self._ended.wait(_LOOK_SECONDS):
            now = time.monotonic()
            for rank, child in children.items():
                code = child.process.poll()
                if code is not None and rank not in down and not self.stopping:
                    down.add(rank)
                    self._restarts.died(self._first + rank, code, now)
            for worker, life in self._restarts.take_due(now).items():
                rank = worker - self._first
                if self.stopping:
                    return
                try:
                    children[rank].start_again(self._ticket.variables(worker, life))
                    down.discard(rank)
                except OSError as error:  # Of memory or disk there may be more in a while.
                    self._restarts.died(worker, 1, now, f"it could not be started: {error}")


class AsyncProcessLauncher(_MultiProcessingLauncher):
    """Starts all ranks with :mod:`multiprocessing`, and again those that die in training.

    Before training has started the first rank that ends badly ends the job with its exception, and so does at any time
    an exception of this node's first rank, whose result is the job's. If rank 0 is killed, all ranks are started again
    and go on from the newest checkpoint.

    Args:
        strategy: that it launches for.
        start_method: see :mod:`multiprocessing`.
        max_restarts: of each worker, and of the job.

    Attributes:
        apart: the ranks fit, or did without a result: what this process has of the model was never trained.

    """

    def __init__(self, strategy: Any, start_method: Any = "spawn", max_restarts: int = 3) -> None:
        super().__init__(strategy, start_method=start_method)
        self._max_restarts = max_restarts
        self._line: RankLine | None = None  # In a rank's process.
        self.apart = False

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

        self.apart = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        if trainer is not None and self.apart:
            args = prepare_fit(trainer, args)
        before = os.environ.get(RESUME)
        restarts = 0
        try:
            while True:
                job = Job(
                    self._run_rank,
                    (trainer, function, args, kwargs),
                    self._start_method,
                    ranks=self._strategy.num_processes,  # type: ignore[attr-defined]
                    first=environment.node_rank() * self._strategy.num_processes,  # type: ignore[attr-defined]
                    max_restarts=self._max_restarts,
                )
                self.procs = job.processes
                try:
                    output = job.run()
                    break
                except ProcessExitedException as error:
                    if not self._may_start_all_again(job, error.exit_code, restarts):
                        raise
                time.sleep(pause_before(restarts))
                restarts += 1
                os.environ[RESUME] = "1"
                if trainer is not None:
                    args = prepare_fit(trainer, args, again=True)
        finally:
            if before is None:
                os.environ.pop(RESUME, None)
        self.apart = False
        if trainer is None:
            return output
        self._already_fit |= trainer.state.fn == TrainerFn.FITTING
        self._recover_results_in_main_process(output, trainer)
        return output.trainer_results

    def _may_start_all_again(self, job: Job, code: int, restarts: int) -> bool:
        """Rank 0 has ended before its time: an error would come again, but not everything that kills a process."""
        # The ranks of other nodes would have to start again, too.
        if not job.started or code >= 0 or is_wish_to_end(code) or self._strategy.num_nodes > 1:  # type: ignore[attr-defined]
            return False
        if restarts >= self._max_restarts:
            _log.error("rank 0 ended with %s; all ranks have been started again %d times (max_restarts=%d)",
                       in_words(code), restarts, self._max_restarts)  # fmt: skip
            return False
        _log.warning(
            "rank 0 ended with %s; all ranks are started again in %g s and go on from the run's newest checkpoint "
            "(restart %d of %d)", in_words(code), pause_before(restarts), restarts + 1, self._max_restarts,
        )  # fmt: skip
        return True

    def mark_started(self, ticket: JoinTicket, may_restart: MayRestart = always) -> None:
        """Training has started on this rank. From now on the death of a rank above 0 does not end the job.

        Args:
            ticket: how a process of this host joins.
            may_restart: see there; of rank 0.

        """
        if self._line is not None:
            self._line.started(ticket, may_restart)

    def mark_ended(self) -> None:
        """Training has ended on this rank. May be called at any time, and more than once."""
        if self._line is not None:
            self._line.ended()

    def _run_rank(
        self, number: int, lines: list[RankLine], variables: dict[str, str], trainer: pl.Trainer | None, *args: Any
    ) -> None:
        """In a new process, the ``number``-th of those that were started together."""
        handle_sigterm_as_before()
        os.environ.update(variables)
        self.apart = False
        self._line = lines[number]
        try:
            self._wrapping_function(self._line.rank, trainer, *args)
        except BaseException as exception:
            # Lightning does this in the launching process only, which has neither the model nor the connections.
            if trainer is not None:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                _interrupt(trainer, exception)
                trainer._teardown()
            raise


def _working_directory() -> str:
    """Where Lightning starts the script again: Hydra may have changed the directory since."""
    if _HYDRA_AVAILABLE:
        from hydra.core.hydra_config import HydraConfig  # type: ignore[import-not-found]
        from hydra.utils import get_original_cwd  # type: ignore[import-not-found]

        if HydraConfig.initialized():
            return str(get_original_cwd())
    return os.getcwd()
