"""The folder of a run, ``<default_root_dir>/async_localsgd/<run>/``, and what a run goes on from.

All ranks of a run have a folder of the same name, each on its own disk. The name outlives processes: whoever starts the
same run again finds there what the one before has left.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_async_localsgd.durable import verified
from lightning_async_localsgd.joining import RUN
from lightning_async_localsgd.restarts import RESUME, new_name
from lightning_async_localsgd.trainer_parts import model_checkpoints_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    import lightning.pytorch as pl

_log = logging.getLogger(__name__)

FOLDER = "async_localsgd"
"""Where, in the trainer's ``default_root_dir``, the folders of all runs are."""

CHECKPOINTS = "rounds=*.ckpt"
"""How the checkpoints of a run are named."""

_NONE = (0, "")
"""The age of no file."""

_fits = 0


def settle_name() -> str:
    """The name of this script's run, the same for all processes that this one starts."""
    name = os.environ.get(RUN)
    if not name:
        name = os.environ[RUN] = new_name()
    if Path(name).name != name or name == "..":
        raise ValueError(f"{RUN}={name!r} is to be the name of a folder, not a path; unset it, or give a plain name")
    return name


def goes_on() -> bool:
    """Whether this script was started again to go on with a run that has broken off."""
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("SLURM_RESTART_COUNT", "0")
    return os.environ.get(RESUME) == "1" or any(count.isdigit() and int(count) > 0 for count in restarts)


def runs_of(trainer: pl.Trainer) -> Path | None:
    """Where the folders of all runs are; None if ``default_root_dir`` is on no disk of this machine."""
    root = str(trainer.default_root_dir)
    return None if "://" in root else Path(root).absolute() / FOLDER


def newest_checkpoint(*folders: Path) -> Path | None:
    """The newest complete checkpoint in the folders of runs, or in folders of such folders."""
    patterns = (CHECKPOINTS, f"*/{CHECKPOINTS}")
    return newest(path for folder in folders for pattern in patterns for path in folder.glob(pattern))


def folder_of(trainer: pl.Trainer) -> Path | None:
    """The folder of this trainer's run, which need not be there; None where nothing is to be written."""
    runs = runs_of(trainer)
    if runs is None:
        rank_zero_warn(
            f"default_root_dir={str(trainer.default_root_dir)!r} is on no disk of this machine: no periodic "
            "checkpoints and no optimizer states of workers are written. Give the Trainer a local default_root_dir; "
            "ModelCheckpoint(dirpath=...) may write elsewhere."
        )
    if runs is None or trainer.fast_dev_run:  # type: ignore[attr-defined] # set by one of its connectors
        return None
    return runs / Path(trainer.strategy.run_name).name  # type: ignore[attr-defined] # our own strategy


def in_order_of_age(paths: Iterable[Path]) -> list[Path]:
    """The files, newest first."""
    return sorted(paths, key=_age, reverse=True)


def newest(paths: Iterable[Path]) -> Path | None:
    """The newest of the files whose content is what their names say. The others are named in a warning."""
    for path in in_order_of_age(paths):
        if verified(path):
            return path
        _log.warning("%s is damaged: its content is not what its name says; it is passed over", path)
    return None


def _age(path: Path) -> tuple[int, str]:
    try:
        return path.stat().st_mtime_ns, path.name
    except OSError:
        return 0, path.name


def prepare_fit(trainer: pl.Trainer, arguments: tuple[Any, ...], again: bool = False) -> tuple[Any, ...]:
    """Called by the launchers for a ``fit``: settles the name of the run's folder, and what the run goes on from.

    ``ckpt_path="last"`` means the newest of what the periodic checkpoints and Lightning's own callbacks have left. A
    script that was started again after its run broke off goes on from what that run has left, whatever it asks for.

    Args:
        trainer: the trainer.
        arguments: of its function that fits.
        again: this very fit is started again by the process that has started it before.

    Returns:
        The arguments, with another ``ckpt_path`` where that is wanted.

    """
    global _fits
    _fits += not again
    # One script may fit several times, each with a folder of its own.
    name = settle_name() if _fits == 1 else f"{settle_name()}.{_fits}"
    trainer.strategy.run_name = name  # type: ignore[attr-defined] # our own strategy
    position = list(inspect.signature(trainer._fit_impl).parameters).index("ckpt_path")
    asked = arguments[position] if position < len(arguments) else None
    runs, resumes = runs_of(trainer), again or goes_on()
    if runs is None or not (resumes or asked == "last"):
        return arguments
    ours = newest_checkpoint(*_lives_of(runs, name)) if resumes else newest_checkpoint(runs)
    others = _newest_of_lightning(trainer, asked)
    if ours is None and resumes and others == _NONE and trainer.is_global_zero:
        every: Any = trainer.strategy.checkpoint_every  # type: ignore[attr-defined] # our own strategy
        _log.warning(
            "the run %s was started again, and had not saved itself in %s before it broke off (checkpoint_every=%s): "
            "training begins %s",
            name, runs, every, f"with ckpt_path={asked!r}, as the script says" if asked else "from the beginning",
        )  # fmt: skip
    if ours is None or _age(ours) < others:
        return arguments
    if trainer.is_global_zero:
        _log.warning("the run goes on from %s", ours)
    return (*arguments[:position], str(ours), *arguments[position + 1 :])


def _lives_of(runs: Path, name: str) -> list[Path]:
    """The folders that the run of this name has had: those of all its nodes, where each has its own agent."""
    run, agent = os.environ.get("TORCHELASTIC_RUN_ID"), str(os.getppid())
    one_node = int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1
    if run is None or one_node or not name.startswith(f"torchrun-{run}-{agent}"):
        return [runs / name]
    if run == "none":
        rank_zero_warn(
            "torchrun has started this job again, but its nodes have no name in common to find the run's checkpoints "
            'by; give torchrun --rdzv-id, or pass trainer.fit(ckpt_path="last")'
        )
        return []
    before, after = (re.escape(part) for part in name.split(f"-{agent}", 1))
    return [path for path in runs.glob("*") if re.fullmatch(rf"{before}-\d+{after}", path.name)]


def _newest_of_lightning(trainer: pl.Trainer, asked: Any) -> tuple[int, str]:
    """The age of the newest checkpoint that Lightning itself would go on from, which an explicit path never is."""
    candidates: set[Any] = set()
    if asked in ("last", None):
        candidates |= {getattr(callback, "ckpt_path", None) for callback in trainer.checkpoint_callbacks}
    if asked == "last":
        for callback in model_checkpoints_of(trainer):
            candidates |= callback._find_last_checkpoints(trainer)
    if asked in ("hpc", None):
        candidates.add(trainer._checkpoint_connector._hpc_resume_path)
    ages = [_age(Path(path)) for path in candidates if path and "://" not in str(path)]
    return max(ages, default=_NONE)
