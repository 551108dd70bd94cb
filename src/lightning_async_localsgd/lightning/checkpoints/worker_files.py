"""The workers' inner optimizer states that belong to a checkpoint of rank 0.

Each checkpoint has a folder for them. It is in the run's folder, because programs may list the files beside a user's
checkpoint, and the checkpoint holds the folder's path. A periodic checkpoint P is in the run's folder itself, and its
workers' files are in ``P.workers/``.

When the checkpoint is written, its folder gets each worker's latest file. Rank 0 then asks the workers to save, and
their new files replace the older ones. A new file is of the end of the worker's current round. This is as close to the
checkpoint as possible without a worker waiting.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.runtime.durable import link

if TYPE_CHECKING:
    from lightning_async_localsgd.server.server import Server

_log = logging.getLogger(__name__)

FILE_NAME = re.compile(r"worker-(\d+)-(\d{6,})-[0-9a-f]{64}\.pt")
"""Name of a worker's file: the worker's number, a count, and the hash of the content."""

WORKER_FOLDER = "worker_folder"
"""Key of a server's state in a checkpoint: path of the folder of the workers' files."""

_FOLDERS = "workers"
"""Folder of these folders, in the run's folder."""

_MAX_PENDING = 8
"""Number of checkpoints for which newer files are collected at the same time."""


def files_of(folder: Path, worker: int) -> list[Path]:
    """Return the worker's files in a folder."""
    return [path for path in folder.glob(f"worker-{worker}-*.pt") if FILE_NAME.fullmatch(path.name)]


def file_names(state: Mapping[str, Any]) -> dict[int, str]:
    """Return the names of the workers' files that belong to a server's state, by worker."""
    # The names came over the network. A name of any other form, such as a path, is ignored.
    names = ((int(worker), str(name)) for worker, name in state.get("optimizer_files", {}).items())
    return {worker: name for worker, name in names if (match := FILE_NAME.fullmatch(name)) and int(match[1]) == worker}


def folder_beside(checkpoint: Any) -> Path | None:
    """Return the folder ``P.workers/`` of a checkpoint P, or None if its path is not local.

    Periodic checkpoints have such a folder. Earlier versions had one for each checkpoint.
    """
    path = Path(str(checkpoint))
    return None if "://" in str(checkpoint) else path.with_name(f"{path.name}.workers")


def name_folder(checkpoint: Any, state: dict[str, Any], run_folder: Path | None) -> None:
    """Add the path of the folder of the workers' files to a checkpoint that is about to be written.

    Args:
        checkpoint: path of the checkpoint. The same path may be written again, for example ``last.ckpt``.
        state: the server's state in the checkpoint.
        run_folder: folder of the run; None if the run has no folder, so that workers' files are not kept.

    """
    if run_folder is not None:
        name = f"{_key(checkpoint)}-{int(state['model']['version']):06d}"
        state[WORKER_FOLDER] = str(run_folder / _FOLDERS / name)


def keep_files(checkpoint: Any, state: Mapping[str, Any]) -> None:
    """Keep the workers' files of a checkpoint that has been written, and no files of an earlier one at its path.

    Args:
        checkpoint: path of the checkpoint.
        state: the server's state in the checkpoint.

    """
    if WORKER_FOLDER in state:
        folder = Path(state[WORKER_FOLDER])
        run_folder = folder.parent.parent
        keep_worker_files(folder, state, run_folder)
        remove_worker_files(checkpoint, run_folder.parent, kept=folder)


def folders_in(state: Mapping[str, Any], run_folders: Iterable[Path]) -> list[Path]:
    """Return where the folder of the workers' files may be that a checkpoint's server state names.

    Args:
        state: the server's state.
        run_folders: places where the run's folder may be. It may have moved since the checkpoint was written.

    """
    stored = state.get(WORKER_FOLDER)
    if not isinstance(stored, str):
        return []
    return [*(folder / _FOLDERS / Path(stored).name for folder in run_folders), Path(stored)]


def keep_worker_files(folder: Path, state: Mapping[str, Any], run_folder: Path) -> None:
    """Link the workers' files that belong to a checkpoint into its folder, if they are on this disk.

    Args:
        folder: folder of the checkpoint's files.
        state: the server's state in the checkpoint.
        run_folder: folder of the run.

    """
    names = set(file_names(state).values())
    for name in names:
        if (run_folder / name).exists():
            try:
                link(run_folder / name, folder)
            except OSError as error:
                _log.warning("the optimizer state %s cannot be kept in %s: %s", name, folder, error)
    for old in folder.glob("worker-*.pt"):
        if old.name not in names:
            old.unlink(missing_ok=True)


def remove_worker_files(checkpoint: Any, runs: Path | None = None, kept: Path | None = None) -> None:
    """Remove the workers' files of a checkpoint, and their folders.

    Args:
        checkpoint: path of the checkpoint.
        runs: folder of all runs. An earlier run may have written the checkpoint.
        kept: folder that stays, because the checkpoint was written again.

    """
    folders = [] if runs is None else list(runs.glob(f"*/{_FOLDERS}/{_key(checkpoint)}-*"))
    beside = folder_beside(checkpoint)
    for folder in folders if beside is None else [*folders, beside]:
        if folder != kept:
            for path in folder.glob("worker-*.pt"):
                path.unlink(missing_ok=True)
            with suppress(OSError):  # The folder does not exist, or contains other files.
                folder.rmdir()


def _key(checkpoint: Any) -> str:
    """Return a name for the path of a checkpoint, which may be long or a URL."""
    path = str(checkpoint)
    absolute = path if "://" in path else os.path.abspath(path)
    return hashlib.sha256(absolute.encode()).hexdigest()[:16]


class WorkerStateCollector:
    """Ask workers to save their optimizer states for each checkpoint, and keep the new files with it, on rank 0.

    Args:
        server: the server.

    Attributes:
        requests: number of requests to the workers.

    """

    def __init__(self, server: Server) -> None:
        self.requests = 0
        self._server = server
        # Path of a checkpoint, its folder, names of the files when it was written, and names of newer files.
        self._pending: list[tuple[Any, Path, dict[int, str], dict[int, str]]] = []

    def request(self, checkpoint: Any, state: Mapping[str, Any]) -> None:
        """Ask workers to save for a checkpoint that has been written.

        Args:
            checkpoint: path of the checkpoint.
            state: the server's state in the checkpoint.

        """
        if WORKER_FOLDER not in state:  # The run has no folder.
            return
        self.requests += 1
        self._server.request_saves()
        self.discard(checkpoint)
        self._pending = self._pending[1 - _MAX_PENDING :]
        self._pending.append((checkpoint, Path(state[WORKER_FOLDER]), file_names(state), {}))

    def discard(self, checkpoint: Any) -> None:
        """Collect no more files for a checkpoint that has been removed."""
        self._pending = [pending for pending in self._pending if str(pending[0]) != str(checkpoint)]

    def collect(self) -> None:
        """Keep the files that workers have reported. Called at the ends of rank 0's rounds."""
        if self._pending:
            # Read before the live workers, so that a worker that leaves in between is not waited for.
            names = self._server.optimizer_files
            self._keep(names, set(self._server.live) - {0})

    def finish(self, names: Mapping[int, str]) -> None:
        """Keep the files that workers have saved after training, and end."""
        self._keep(names, names)
        self._pending = []

    def _keep(self, names: Mapping[int, str], workers: Iterable[int]) -> None:
        """Keep new files, and end collecting for a checkpoint when all ``workers`` have a new file."""
        for checkpoint, folder, before, newer in list(self._pending):
            new = {
                worker: name
                for worker, name in names.items()
                if worker not in newer and name and name != before.get(worker)
            }
            if new:
                newer.update(new)
                keep_worker_files(folder, {"optimizer_files": {**before, **newer}}, folder.parent.parent)
            if newer.keys() >= set(workers):
                self._pending.remove((checkpoint, folder, before, newer))
