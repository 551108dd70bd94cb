"""Checkpoints that rank 0 writes by itself, so that little is lost when it dies.

A snapshot is taken on the main thread at the end of one of rank 0's rounds, where nothing of its own is under way, and
written by a thread of its own while training goes on. The file is an ordinary checkpoint of the Trainer.
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

from lightning_async_localsgd.checkpoints import CHECKPOINT_KEY, on_host
from lightning_async_localsgd.companions import keep_beside, remove_beside
from lightning_async_localsgd.durable import Writer, verified, write
from lightning_async_localsgd.interval import Interval
from lightning_async_localsgd.run_folder import CHECKPOINTS, folder_of, in_order_of_age, newest_checkpoint
from lightning_async_localsgd.trainer_parts import callbacks_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.phase_base import Phase
    from lightning_async_localsgd.strategy import AsyncLocalSGDStrategy

_log = logging.getLogger(__name__)

KEPT = 2
"""Checkpoints that stay in the folder: the newest, and the one before."""

_SECONDS_AT_THE_END = 60.0
"""How long the end of training waits for the last one to be written."""

_SECONDS_WHEN_INTERRUPTED = 5.0
"""How long an interruption waits for what is being written, and for the checkpoint that it causes: whoever interrupts
may be waiting, too, and the one before stays valid."""


class PeriodicCheckpoints(Callback):
    """Rank 0's own checkpoints. The last of the trainer's callbacks until :meth:`release`.

    Args:
        trainer: the trainer.
        phase: the phase that begins.

    """

    def __init__(self, trainer: pl.Trainer, phase: Phase) -> None:
        assert phase.server is not None
        self._strategy: AsyncLocalSGDStrategy = trainer.strategy  # type: ignore[assignment]
        self._trainer = trainer
        self._phase = phase
        self._saved = self._version
        self._newest: Path | None = None
        self._writer: Writer | None = None
        folder, every = folder_of(trainer), self._strategy.checkpoint_every
        if folder is None or every is None:
            return
        self._folder = folder
        self._interval = Interval(every, self._version)
        self._writer = Writer("the periodic checkpoint", folder)
        callbacks_of(trainer).append(self)

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        assert self._writer is not None
        phase = self._phase
        # At the end of a round, where a single worker has nothing to hand in, and rank 0's optimizer fits the rest.
        if phase.stopped or phase.worker.round_steps > 0 or phase.in_step:
            return
        if self._interval.over(self._version) and not self._writer.busy:
            self._begin()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        assert self._writer is not None
        until = time.monotonic() + _SECONDS_WHEN_INTERRUPTED
        if not self._writer.wait(_SECONDS_WHEN_INTERRUPTED):
            _log.warning("a checkpoint is still being written to %s; this rank ends without another", self._folder)
            return
        if self._version > self._saved:
            self._begin()
            if not self._writer.wait(max(0.0, until - time.monotonic())):
                _log.warning("there is no time to complete another checkpoint in %s", self._folder)
        if self._newest is not None:
            _log.warning('the run was interrupted; trainer.fit(ckpt_path="last") goes on from %s', self._newest)

    def release(self) -> None:
        """The trainer's callbacks are its own again; what is being written is complete."""
        if self._writer is None:
            return
        callbacks_of(self._trainer).remove(self)
        complete = self._phase.stopped and self._writer.wait(_SECONDS_AT_THE_END)
        if complete and self._newest is not None and self._version > self._saved:
            # Otherwise who starts the script again would train once more what came after the last one.
            self._begin()
        if not self._writer.wait(_SECONDS_AT_THE_END):
            _log.warning("a checkpoint is still being written to %s; nobody waits for it any longer", self._folder)
        self._writer = None

    # ------------------------------------------------------------------ internal

    @property
    def _version(self) -> int:
        assert self._phase.server is not None
        return self._phase.server.view.version

    def _begin(self) -> None:
        assert self._writer is not None
        assert self._phase.server is not None
        self._interval.begin(self._version)
        self._phase.pause()
        try:
            checkpoint = self._trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            self._strategy.add_server_state(checkpoint)
            server = checkpoint.pop(CHECKPOINT_KEY)  # Copies already.
            snapshot = {**on_host(checkpoint), CHECKPOINT_KEY: server}
        except Exception as error:
            # A hook of the user's may fail here that was not asked for; without this it would end the training.
            self._writer.failed(error)
            return
        finally:
            self._phase.resume()
        self._writer.begin(lambda: self._write(snapshot))

    def _write(self, snapshot: dict[str, Any]) -> None:
        self._newest = store(self._folder, snapshot, self._trainer.ckpt_path)
        self._saved = int(snapshot[CHECKPOINT_KEY]["model"]["version"])


def store(folder: Path, checkpoint: dict[str, Any], resumed: Any = None) -> Path:
    """Writes a checkpoint into the run's folder, removes what is too old there, and returns the file.

    Args:
        folder: of the run.
        checkpoint: with the server's state.
        resumed: what this run has been resumed from, if anything; workers that come back begin with it, so it stays.

    """
    server = checkpoint[CHECKPOINT_KEY]
    version = int(server["model"]["version"])
    path = write(folder, f"rounds={version:06d}", ".ckpt", lambda file: torch.save(checkpoint, file))
    keep_beside(path, server, folder)
    found = [one for one in folder.glob(CHECKPOINTS) if resumed is None or not Path(resumed).match(one.name)]
    for old in in_order_of_age(found)[KEPT:]:
        remove_beside(old)
        os.unlink(old)
    return path


def is_periodic(path: object) -> bool:
    """Whether a path is that of such a checkpoint."""
    return isinstance(path, (str, os.PathLike)) and Path(path).match(CHECKPOINTS)


def load_periodic(file: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
    """Loads such a checkpoint, whatever ``CheckpointIO`` plugin writes the others.

    Raises:
        ValueError: its content is not what its name says.

    """
    path = Path(file)
    if path.exists() and not verified(path):
        other = newest_checkpoint(path.parent)
        instead = f"the newest complete one there is {other}" if other else "there is no complete one beside it"
        raise ValueError(f"{path} is damaged: its content is not what its name says; {instead}")
    for name, value in zip(("weights_only",), arguments, strict=False):
        options[name] = value
    checkpoint: dict[str, Any] = TorchCheckpointIO().load_checkpoint(path, **options)
    return checkpoint
