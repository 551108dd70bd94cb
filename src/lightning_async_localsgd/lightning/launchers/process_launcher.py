"""The launcher for the start methods ``spawn``, ``fork`` and ``forkserver``."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.multiprocessing.spawn import ProcessExitedException
from typing_extensions import override

from lightning_async_localsgd.launch.rank_processes import (
    RankPipe,
    RankProcesses,
    RanksStoppedError,
    restore_sigterm_handler,
)
from lightning_async_localsgd.launch.restarts import (
    JoinTicket,
    MayRestart,
    always,
    describe_exit,
    is_stop_signal,
    restart_delay,
)
from lightning_async_localsgd.launch.run_name import RESUME_ENV
from lightning_async_localsgd.launch.uncaught import follows_another, print_line
from lightning_async_localsgd.lightning.checkpoints.run_folder import prepare_fit
from lightning_async_localsgd.lightning.trainer_access.launchers import (
    ProcessLauncher,
    abort,
    check_can_start,
    global_states,
)

if TYPE_CHECKING:
    import lightning.pytorch as pl

_log = logging.getLogger(__name__)


class AsyncProcessLauncher(ProcessLauncher):
    """Starts all ranks with :mod:`multiprocessing`, and restarts ranks that die during training.

    Lightning's own launcher ends all ranks when one dies. Here this holds only before training has started, and at any
    time for an exception of this node's first rank, whose result is the job's result. If rank 0 is killed during
    training, all ranks are restarted and resume from the newest checkpoint.

    Args:
        strategy: the strategy that uses this launcher.
        start_method: start method of :mod:`multiprocessing`.
        max_restarts: restarts of each worker, and of all ranks.

    Attributes:
        has_untrained_model: whether the ranks are running a fit, or failed in one. The model in this process was then
            never trained.

    """

    def __init__(self, strategy: Any, start_method: Any = "spawn", max_restarts: int = 3) -> None:
        super().__init__(strategy, start_method=start_method)
        self._max_restarts = max_restarts
        self._pipe: RankPipe | None = None  # Set only in the processes of ranks.
        self.has_untrained_model = False

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Run ``function`` in one process per rank, and return rank 0's result."""
        check_can_start(self._start_method)
        fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        if self._already_fit and fitting:
            raise NotImplementedError(
                f"start_method={self._start_method!r} does not support calling trainer.fit() twice on the same "
                "Trainer; create a new Trainer and call its fit(ckpt_path=...) to continue"
            )
        environment = self._strategy.cluster_environment
        assert environment is not None
        # A free port is chosen here, so that all ranks use the same one.
        os.environ["MASTER_PORT"] = str(environment.main_port)

        self.has_untrained_model = fitting
        if trainer is not None and fitting:
            args = prepare_fit(trainer, args)
        resume_before = os.environ.get(RESUME_ENV)
        restarts = 0
        try:
            while True:
                states = global_states() if self._start_method == "spawn" else None
                ranks = RankProcesses(
                    self._run_rank,
                    (states, trainer, function, args, kwargs),
                    self._start_method,
                    ranks=self._strategy.num_processes,  # type: ignore[attr-defined]
                    first_worker=environment.node_rank() * self._strategy.num_processes,  # type: ignore[attr-defined]
                    max_restarts=self._max_restarts,
                )
                self.procs = ranks.processes
                try:
                    output = ranks.run()
                    break
                except RanksStoppedError:
                    raise SIGTERMException from None
                except ProcessExitedException as error:
                    if not self._restarts_all(ranks.started, error.exit_code, restarts):
                        raise
                time.sleep(restart_delay(restarts))
                restarts += 1
                os.environ[RESUME_ENV] = "1"
                if trainer is not None:
                    args = prepare_fit(trainer, args, restarted=True)
        finally:
            if resume_before is None:
                os.environ.pop(RESUME_ENV, None)
        self.has_untrained_model = False
        if trainer is None:
            return output
        self._already_fit |= fitting
        self._recover_results_in_main_process(output, trainer)
        return output.trainer_results

    def _restarts_all(self, started: bool, exit_code: int, restarts: int) -> bool:
        """Decide whether to restart all ranks after rank 0 has failed.

        They are restarted if rank 0 was killed during training. An error of the script would only happen again. The
        ranks of other nodes cannot be restarted from here.
        """
        num_nodes = self._strategy.num_nodes  # type: ignore[attr-defined]
        if not started or exit_code >= 0 or is_stop_signal(exit_code) or num_nodes > 1:
            return False
        if restarts >= self._max_restarts:
            _log.error(
                "rank 0 ended with %s; not restarting the ranks again after %d restart(s) (max_restarts=%d)",
                describe_exit(exit_code), restarts, self._max_restarts,
            )  # fmt: skip
            return False
        _log.warning(
            "rank 0 ended with %s; restarting all ranks in %g s from the newest checkpoint of the run "
            "(restart %d of %d)", describe_exit(exit_code), restart_delay(restarts), restarts + 1, self._max_restarts,
        )  # fmt: skip
        return True

    def mark_started(self, ticket: JoinTicket, may_restart: MayRestart = always) -> None:
        """Report to the launching process that training has started on this rank.

        From now on, the death of a rank other than rank 0 does not end the job.

        Args:
            ticket: how a process on this host joins the training.
            may_restart: on rank 0: whether the server would accept a worker again.

        """
        if self._pipe is not None:
            self._pipe.report_joined(ticket, may_restart)

    def mark_ended(self) -> None:
        """Report that training has ended on this rank. May be called at any time, and more than once."""
        if self._pipe is not None:
            self._pipe.report_ended()

    def _run_rank(
        self,
        number: int,
        pipes: list[RankPipe],
        variables: dict[str, str],
        results: Any,
        states: Any,
        trainer: pl.Trainer | None,
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> None:
        """Run a rank in its new process, which is the ``number``-th of those started together."""
        restore_sigterm_handler()
        os.environ.update(variables)
        self.has_untrained_model = False
        self._pipe = pipes[number]
        try:
            self._wrapping_function(self._pipe.rank, trainer, function, args, kwargs, results, states)
        except BaseException as exception:
            # Lightning does this in the launching process, which has neither the trained model nor the connections.
            if trainer is not None:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                abort(trainer, exception)
            rank = self._strategy.global_rank
            if follows_another(exception, rank):
                if self._pipe.has_joined:  # The launcher would log the traceback that torch leaves to it.
                    print_line(exception, f"rank {rank}")
                    sys.exit(1)
                raise exception.with_traceback(None) from None
            raise
