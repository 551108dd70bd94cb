"""The name of a run, which stays the same when the run's processes are restarted.

The run's folder has the same name, see :mod:`.lightning.checkpoints.run_folder`.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

RUN_ENV = "ASYNC_LOCALSGD_RUN"
"""Environment variable with the name of the run. All processes of the run inherit it."""

RESUME_ENV = "ASYNC_LOCALSGD_RESUME"
"""Environment variable that is 1 in a restarted job, which resumes from the newest checkpoint of its run."""

_ARRAY_TASK = re.compile(r"slurm-\d+_(\d+)(?:\.\d+)?")
"""Name of a fit in a task of a SLURM job array."""

_fits = 0
"""Fits that this process has launched. Kept here because modules below ``lightning/`` exist twice in a process."""


def run_name() -> str:
    """Return the name of this script's run, and set it for all processes that this one starts.

    Raises:
        ValueError: ``ASYNC_LOCALSGD_RUN`` is a path instead of a name.

    """
    name = os.environ.get(RUN_ENV)
    if not name:
        name = os.environ[RUN_ENV] = new_run_name()
    if Path(name).name != name or name == "..":
        raise ValueError(
            f"{RUN_ENV}={name!r} must be a folder name, not a path; use a plain name or unset the variable"
        )
    return name


def fit_name(restarted: bool = False) -> str:
    """Return the name of the fit that is being launched, so that each fit of a script has its own folder.

    The first fit has the name of the run. Later fits have a number appended.

    Args:
        restarted: the launcher restarts all ranks of the current fit, which keeps its name.

    """
    global _fits
    _fits += not restarted
    return run_name() if _fits == 1 else f"{run_name()}.{_fits}"


def new_run_name() -> str:
    """Return a name for a new run.

    Under torchrun and SLURM the name derives from the job, so that a restarted job gets the same name. Otherwise the
    name is the time and the process number.
    """
    torchrun_id, slurm_id = os.environ.get("TORCHELASTIC_RUN_ID"), os.environ.get("SLURM_JOB_ID")
    if torchrun_id is not None:
        return f"torchrun-{torchrun_id}-{os.getppid()}"
    # Many runs may be started in one interactive job, so its number does not identify a run.
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if slurm_id is not None and "SLURM_PROCID" in os.environ and not interactive:
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        return f"slurm-{slurm_id}" if array is None or task is None else f"slurm-{array}_{task}"
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def belongs_to_another_task(name: str) -> bool:
    """Return whether a run is that of another task of a SLURM job array, if this process belongs to such a task.

    The tasks of an array are runs of their own with the same script, for example with other hyperparameters.
    """
    task, match = os.environ.get("SLURM_ARRAY_TASK_ID"), _ARRAY_TASK.fullmatch(name)
    return task is not None and match is not None and match[1] != task


def is_restarted() -> bool:
    """Return whether the whole job was restarted and is to resume its interrupted run."""
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("SLURM_RESTART_COUNT", "0")
    return os.environ.get(RESUME_ENV) == "1" or any(count.isdigit() and int(count) > 0 for count in restarts)
