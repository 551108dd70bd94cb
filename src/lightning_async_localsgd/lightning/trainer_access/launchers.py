"""What the launchers use of Lightning's private names, each behind one plain name."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

from lightning.fabric.strategies.launchers.multiprocessing import _check_bad_cuda_fork, _check_missing_main_guard
from lightning.fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd, _hydra_subprocess_cmd
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.multiprocessing import _GlobalStateSnapshot, _MultiProcessingLauncher
from lightning.pytorch.strategies.launchers.subprocess_script import _HYDRA_AVAILABLE, _SubprocessScriptLauncher
from lightning.pytorch.trainer.call import _interrupt

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

ScriptLauncher = _SubprocessScriptLauncher
"""Lightning's launcher that runs the script once per rank. Its interrupt handler looks for this class."""

ProcessLauncher = _MultiProcessingLauncher
"""Lightning's launcher that starts ranks with :mod:`multiprocessing`, and returns rank 0's results."""


def check_can_start(start_method: str) -> None:
    """Raise if ranks cannot be started.

    Lightning checks that ``spawn`` is called below ``if __name__ == "__main__"``, and that no CUDA context exists for
    the other methods.
    """
    if start_method == "spawn":
        _check_missing_main_guard()
    else:
        _check_bad_cuda_fork()


def limit_threads(processes: int) -> None:
    """Divide the cores among the ranks: Lightning sets torch's number of threads, unless OMP_NUM_THREADS is set."""
    _set_num_threads_if_needed(num_processes=processes)


def hydra_is_installed() -> bool:
    """Return whether Hydra is installed. Lightning then starts the script in the directory before Hydra changed it."""
    return bool(_HYDRA_AVAILABLE)


def script_command() -> tuple[list[str], str]:
    """Return the command that runs this script again, as Lightning does for a local rank, and its directory."""
    if hydra_is_installed():
        from hydra.core.hydra_config import HydraConfig  # type: ignore[import-not-found]

        if HydraConfig.initialized():
            command, folder = _hydra_subprocess_cmd(0)
            return list(command), str(folder)
    return list(_basic_subprocess_cmd()), os.getcwd()


def global_states() -> Any:
    """Return the random states and flags of torch that Lightning restores in a spawned process."""
    return _GlobalStateSnapshot.capture()


def abort(trainer: pl.Trainer, exception: BaseException) -> None:
    """Call the ``on_exception`` hooks and tear the trainer down, as Lightning does in the launching process."""
    _interrupt(trainer, exception)
    trainer._teardown()


def ckpt_path_position(trainer: pl.Trainer) -> int:
    """Return the position of ``ckpt_path`` among the arguments that Lightning passes to a launcher for ``fit``."""
    return list(inspect.signature(trainer._fit_impl).parameters).index("ckpt_path")


def last_checkpoints(callback: ModelCheckpoint, trainer: pl.Trainer) -> set[str]:
    """Return the callback's files among which Lightning chooses for ``ckpt_path="last"``."""
    return callback._find_last_checkpoints(trainer)


def hpc_checkpoint(trainer: pl.Trainer) -> str | None:
    """Return the checkpoint that Lightning saved when SLURM announced the time limit, and from which it resumes."""
    return trainer._checkpoint_connector._hpc_resume_path
