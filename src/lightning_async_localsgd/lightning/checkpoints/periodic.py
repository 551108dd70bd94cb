"""Checkpoints that rank 0 writes on its own schedule, so that little work is lost if rank 0 dies.

A snapshot is made on the main thread at the end of one of rank 0's rounds, when rank 0 has no unfinished work. Another
thread writes it while training goes on. The file is an ordinary checkpoint of the Trainer.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_async_localsgd.lightning.checkpoints.contents import CHECKPOINT_KEY, copy_to_host
from lightning_async_localsgd.lightning.checkpoints.interval import Interval
from lightning_async_localsgd.lightning.checkpoints.run_folder import (
    CHECKPOINTS,
    folder_of,
    newest_checkpoint,
)
from lightning_async_localsgd.lightning.checkpoints.worker_files import (
    folder_beside,
    keep_worker_files,
    remove_worker_files,
)
from lightning_async_localsgd.lightning.trainer_access.callbacks import callbacks_of
from lightning_async_localsgd.lightning.trainer_access.checkpoints import dump_checkpoint
from lightning_async_localsgd.lightning.trainer_access.strategy import strategy_of
from lightning_async_localsgd.protocol.exchange import TooFewWorkersError
from lightning_async_localsgd.runtime.durable import BackgroundWriter, newest_first, verified, write

if TYPE_CHECKING:
    from datetime import timedelta

    import lightning.pytorch as pl

    from lightning_async_localsgd.runtime.base import Runtime

_log = logging.getLogger(__name__)

KEPT = 2
"""Number of checkpoints that stay in the folder."""

_SECONDS_AT_THE_END = 60.0
"""Time that the end of training waits for the last checkpoint to be written."""

_SECONDS_WHEN_INTERRUPTED = 5.0
"""Time that an interruption waits for a checkpoint that is being written, and for the one that it causes. It is short,
because the user or a scheduler may be waiting, and the previous checkpoint stays valid."""


class PeriodicCheckpoints(Callback):
    """Write rank 0's own checkpoints. The last callback of the trainer until :meth:`close`.

    Args:
        trainer: the trainer.
        runtime: rank 0's part in asynchronous training.
        checkpoint_every: interval between two checkpoints; None writes none.

    """

    def __init__(self, trainer: pl.Trainer, runtime: Runtime, checkpoint_every: int | timedelta | None) -> None:
        assert runtime.server is not None
        self._trainer = trainer
        self._runtime = runtime
        self._saved_version = self._version
        self._newest: Path | None = None
        self._writer: BackgroundWriter | None = None
        folder = folder_of(trainer)
        if folder is None or checkpoint_every is None:
            return
        self._folder = folder
        self._interval = Interval(checkpoint_every, self._version)
        self._writer = BackgroundWriter("the periodic checkpoint", folder)
        callbacks_of(trainer).append(self)

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        assert self._writer is not None
        runtime = self._runtime
        # At the end of a round a single worker has pushed all its work, and rank 0's optimizer matches the model.
        if runtime.stopped or runtime.worker.round_steps > 0 or runtime.in_step:
            return
        if self._interval.is_over(self._version) and not self._writer.busy:
            self._save()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        assert self._writer is not None
        # Nothing waits for the end of a run that was paused.
        seconds = _SECONDS_AT_THE_END if isinstance(exception, TooFewWorkersError) else _SECONDS_WHEN_INTERRUPTED
        until = time.monotonic() + seconds
        if not self._writer.wait(seconds):
            _log.warning("a checkpoint is still being written to %s; this rank ends without another", self._folder)
            return
        if self._version > self._saved_version:
            self._save()
            if not self._writer.wait(max(0.0, until - time.monotonic())):
                _log.warning("another checkpoint in %s could not be completed in time", self._folder)
        if self._newest is not None:
            _log.warning('the run was interrupted; trainer.fit(ckpt_path="last") resumes from %s', self._newest)

    def close(self) -> None:
        """Remove the callback, and wait until checkpoints are written."""
        if self._writer is None:
            return
        callbacks_of(self._trainer).remove(self)
        is_complete = self._runtime.stopped and self._writer.wait(_SECONDS_AT_THE_END)
        if is_complete and self._newest is not None and self._version > self._saved_version:
            # Without this checkpoint, starting the script again would repeat the steps after the last one.
            self._save()
        if not self._writer.wait(_SECONDS_AT_THE_END):
            _log.warning(
                "a checkpoint is still being written to %s; training ends without waiting for it", self._folder
            )
        self._writer = None

    # ------------------------------------------------------------------ internal

    @property
    def _version(self) -> int:
        assert self._runtime.server is not None
        return self._runtime.server.snapshot.version

    def _save(self) -> None:
        """Make a snapshot, and begin to write it."""
        assert self._writer is not None
        assert self._runtime.server is not None
        self._interval.restart(self._version)
        self._runtime.interrupt()
        try:
            checkpoint = dump_checkpoint(self._trainer)
            strategy_of(self._trainer).add_server_state(checkpoint)
            server = checkpoint.pop(CHECKPOINT_KEY)  # Its tensors are copies already.
            snapshot = {**copy_to_host(checkpoint), CHECKPOINT_KEY: server}
        except Exception as error:
            # One of the user's hooks may fail. The user has not asked for this checkpoint, so training goes on.
            self._writer.failed(error)
            return
        finally:
            self._runtime.continue_round()
        self._writer.begin(lambda: self._write(snapshot))

    def _write(self, snapshot: dict[str, Any]) -> None:
        self._newest = store(self._folder, snapshot, self._trainer.ckpt_path)
        self._saved_version = int(snapshot[CHECKPOINT_KEY]["model"]["version"])


def store(folder: Path, checkpoint: dict[str, Any], resumed_from: Any = None) -> Path:
    """Write a checkpoint into the run's folder, remove old ones, and return the file.

    Args:
        folder: folder of the run.
        checkpoint: checkpoint with the server's state.
        resumed_from: checkpoint that this run was resumed from, if any. It stays, because workers that restart load it.

    """
    server = checkpoint[CHECKPOINT_KEY]
    version = int(server["model"]["version"])
    path = write(folder, f"rounds={version:06d}", ".ckpt", lambda file: torch.save(checkpoint, file))
    workers = folder_beside(path)
    assert workers is not None
    keep_worker_files(workers, server, folder)
    removable = [
        file for file in folder.glob(CHECKPOINTS) if resumed_from is None or not Path(resumed_from).match(file.name)
    ]
    for old in newest_first(removable)[KEPT:]:
        remove_worker_files(old)
        os.unlink(old)
    return path


def is_periodic(path: object) -> bool:
    """Return whether a path is that of a periodic checkpoint."""
    return isinstance(path, (str, os.PathLike)) and Path(path).match(CHECKPOINTS)


def load_periodic(file: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
    """Load a periodic checkpoint, whatever ``CheckpointIO`` plugin the trainer has.

    Raises:
        ValueError: The file's content does not match the hash in its name.

    """
    path = Path(file)
    if path.exists() and not verified(path):
        other = newest_checkpoint(path.parent)
        instead = (
            f"the newest intact checkpoint there is {other}" if other else "there is no intact checkpoint beside it"
        )
        raise ValueError(f"{path} is damaged: its content does not match the hash in its name; {instead}")
    for name, value in zip(("weights_only",), arguments, strict=False):
        options[name] = value
    checkpoint: dict[str, Any] = TorchCheckpointIO().load_checkpoint(path, **options)
    return checkpoint
