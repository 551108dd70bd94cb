"""The folder of a run, ``<default_root_dir>/async_localsgd/<run>/``, and the checkpoint from which a run resumes.

All ranks of a run have a folder of the same name, each on its own disk. The name stays the same when processes are
restarted, so a restarted run finds the files of its predecessor there.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_async_localsgd.launch.run_name import belongs_to_another_task, fit_name, is_restarted
from lightning_async_localsgd.lightning.trainer_access.callbacks import model_checkpoints_of
from lightning_async_localsgd.lightning.trainer_access.launchers import (
    ckpt_path_position,
    hpc_checkpoint,
    last_checkpoints,
)
from lightning_async_localsgd.lightning.trainer_access.strategy import strategy_of
from lightning_async_localsgd.runtime.durable import modification_time, newest

if TYPE_CHECKING:
    import lightning.pytorch as pl

_log = logging.getLogger(__name__)

FOLDER = "async_localsgd"
"""Folder of all runs, in the trainer's ``default_root_dir``."""

CHECKPOINTS = "rounds=*.ckpt"
"""File name pattern of a run's checkpoints."""

_NO_FILE = (0, "")
"""The modification time that stands for no file, less than that of any file."""


def runs_of(trainer: pl.Trainer) -> Path | None:
    """Return the folder of all runs, or None if ``default_root_dir`` is not on a local disk."""
    root = str(trainer.default_root_dir)
    return None if "://" in root else Path(root).absolute() / FOLDER


def newest_checkpoint(*folders: Path) -> Path | None:
    """Return the newest intact checkpoint in the folders, which are folders of runs or contain folders of runs."""
    patterns = (CHECKPOINTS, f"*/{CHECKPOINTS}")
    return newest(path for folder in folders for pattern in patterns for path in folder.glob(pattern))


def folder_of(trainer: pl.Trainer) -> Path | None:
    """Return the folder of this trainer's run, which need not exist yet, or None if nothing is to be written."""
    runs = runs_of(trainer)
    if runs is None:
        rank_zero_warn(
            f"default_root_dir={str(trainer.default_root_dir)!r} is not a local folder, so the strategy writes neither "
            "periodic checkpoints nor optimizer states of workers. Give the Trainer a local default_root_dir; "
            "ModelCheckpoint(dirpath=...) may write elsewhere."
        )
    if runs is None or trainer.fast_dev_run:  # type: ignore[attr-defined] # set by one of its connectors
        return None
    return runs / Path(strategy_of(trainer).run_name).name


def prepare_fit(trainer: pl.Trainer, arguments: tuple[Any, ...], restarted: bool = False) -> tuple[Any, ...]:
    """Name the run's folder and choose the checkpoint to resume from. The launchers call this for a ``fit``.

    With ``ckpt_path="last"`` the run resumes from the newest checkpoint, either a periodic one of any run or one that
    Lightning would choose. Runs of other tasks of a SLURM job array do not count. A restarted script resumes from the
    newest checkpoint of its interrupted run, whatever its ``ckpt_path``.

    Args:
        trainer: the trainer.
        arguments: arguments of the trainer's function that fits.
        restarted: the launcher restarts all ranks of the current fit.

    Returns:
        The arguments, with ``ckpt_path`` replaced if needed.

    """
    name = fit_name(restarted)
    strategy_of(trainer).run_name = name
    position = ckpt_path_position(trainer)
    requested = arguments[position] if position < len(arguments) else None
    runs, resumes = runs_of(trainer), restarted or is_restarted()
    if runs is None or not (resumes or requested == "last"):
        return arguments
    candidates = _folders_of_run(runs, name) if resumes else _folders_of_task(runs)
    ours = newest_checkpoint(*candidates)
    theirs = _newest_of_lightning(trainer, requested)
    if ours is None and resumes and theirs == _NO_FILE and trainer.is_global_zero:
        beginning = f"with ckpt_path={requested!r}, as the script requests" if requested else "from the beginning"
        _log.warning(
            "the restarted run %s has no checkpoint in %s yet (checkpoint_every=%s); training begins %s",
            name, runs, strategy_of(trainer).checkpoint_every, beginning,
        )  # fmt: skip
    if ours is None or modification_time(ours) < theirs:
        return arguments
    if trainer.is_global_zero:
        _log.warning("resuming the run from %s", ours)
    return (*arguments[:position], str(ours), *arguments[position + 1 :])


def _folders_of_run(runs: Path, name: str) -> list[Path]:
    """Return the folders that a run may have had: under torchrun one per node, named after the node's agent."""
    run, agent = os.environ.get("TORCHELASTIC_RUN_ID"), str(os.getppid())
    one_node = int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1
    if run is None or one_node or not name.startswith(f"torchrun-{run}-{agent}"):
        return [runs / name]
    if run == "none":
        rank_zero_warn(
            "torchrun has restarted this job on several nodes, but without a job name the run's checkpoints cannot be "
            'found. Give torchrun --rdzv-id=NAME, or use trainer.fit(ckpt_path="last").'
        )
        return []
    before, after = (re.escape(part) for part in name.split(f"-{agent}", 1))
    return [path for path in runs.glob("*") if re.fullmatch(rf"{before}-\d+{after}", path.name)]


def _folders_of_task(runs: Path) -> list[Path]:
    """Return the folders of all runs, but in a task of a SLURM job array not those of the array's other tasks."""
    return [folder for folder in runs.glob("*") if not belongs_to_another_task(folder.name)]


def _newest_of_lightning(trainer: pl.Trainer, requested: Any) -> tuple[int, str]:
    """Return the modification time of the newest checkpoint that Lightning itself would choose to resume from.

    For an explicit path Lightning has no choice, so no file counts.
    """
    candidates: set[Any] = set()
    if requested in ("last", None):
        candidates |= {getattr(callback, "ckpt_path", None) for callback in trainer.checkpoint_callbacks}
    if requested == "last":
        for callback in model_checkpoints_of(trainer):
            candidates |= last_checkpoints(callback, trainer)
    if requested in ("hpc", None):
        candidates.add(hpc_checkpoint(trainer))
    times = [modification_time(Path(path)) for path in candidates if path and "://" not in str(path)]
    return max(times, default=_NO_FILE)
