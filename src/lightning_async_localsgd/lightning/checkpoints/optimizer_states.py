"""Inner optimizer states of workers above 0: each worker saves its own, and loads it when the run is resumed.

A worker saves at the end of a round, periodically and when rank 0 has written a checkpoint. The file is in the run's
folder on the worker's disk, and its name is reported with the next push. Files that rank 0 can read are also kept with
each checkpoint, see :mod:`.worker_files`. Rank 0's own state is in the checkpoint itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_async_localsgd.lightning.checkpoints.contents import copy_to_host
from lightning_async_localsgd.lightning.checkpoints.interval import Interval
from lightning_async_localsgd.lightning.checkpoints.run_folder import folder_of, runs_of
from lightning_async_localsgd.lightning.checkpoints.worker_files import (
    FILE_NAME,
    file_names,
    files_of,
    folder_beside,
    folders_in,
)
from lightning_async_localsgd.lightning.trainer_access.callbacks import callbacks_of
from lightning_async_localsgd.lightning.trainer_access.strategy import strategy_of
from lightning_async_localsgd.protocol.exchange import ExchangeError
from lightning_async_localsgd.runtime.base import RESIDUAL
from lightning_async_localsgd.runtime.durable import (
    BackgroundWriter,
    link,
    make_newest,
    newest,
    newest_first,
    verified,
    write,
)

if TYPE_CHECKING:
    from datetime import timedelta

    import lightning.pytorch as pl

    from lightning_async_localsgd.runtime.base import Runtime

_log = logging.getLogger(__name__)

KEPT = 3
"""Number of a worker's files that stay in the folder. A checkpoint may name a file that is no longer the newest."""

_FORMAT = 1
_SECONDS_AT_THE_END = 60.0
_SECONDS_WHEN_INTERRUPTED = 5.0


class OptimizerStateSaver(Callback):
    """Save the states of a worker's inner optimizers. The last callback of the trainer until :meth:`close`.

    A worker that replaces an earlier process begins with the state that this process has saved. What rounding has left
    over of its pushes, see :class:`.Uplink`, is saved as well, and is loaded when the run is resumed. A worker that
    replaces an earlier process begins without it, because that process may have sent it since.

    Args:
        trainer: the trainer of a rank above 0.
        runtime: this rank's part in asynchronous training.
        checkpoint_every: interval between two saves; None saves nothing.
        joins: whether this worker joins a running training.
        resumed_file: file that the inner optimizer states were loaded from when the run was resumed.

    """

    def __init__(
        self,
        trainer: pl.Trainer,
        runtime: Runtime,
        checkpoint_every: int | timedelta | None,
        joins: bool = False,
        resumed_file: Path | None = None,
    ) -> None:
        self._trainer = trainer
        self._runtime = runtime
        self._number = runtime.worker.number
        self._file_name = ""
        self._answered_request = self._save_request
        self._writer: BackgroundWriter | None = None
        folder = folder_of(trainer)
        if folder is not None:
            if joins:
                resumed_file = self._load_newest(folder)
            else:
                _restore_residual(runtime, resumed_file)
            if resumed_file is not None:
                self._keep_resumed_file(resumed_file, folder)
        if folder is not None and checkpoint_every is not None:
            self._folder = folder
            self._interval = Interval(checkpoint_every, self._version)
            self._writer = BackgroundWriter(f"the optimizer state of worker {self._number}", folder)
        runtime.worker.optimizer_file = lambda: self._file_name
        callbacks_of(trainer).append(self)

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        if self._writer is None or self._runtime.stopped or self._runtime.worker.round_steps > 0:
            return
        is_requested = self._save_request > self._answered_request
        if (is_requested or self._interval.is_over(self._version)) and not self._writer.busy:
            self._save(self._writer)

    def finish(self) -> str:
        """Save the state that belongs to the run's last checkpoints, and return the file's name, if any."""
        writer = self._writer
        # If writing takes too long, close() logs it.
        if writer is not None and self._runtime.worker.total_steps > 0 and writer.wait(_SECONDS_AT_THE_END):
            self._save(writer)
            writer.wait(_SECONDS_AT_THE_END)
        return self._file_name

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # If the error is this worker's own, its state may be the cause. The worker that replaces it then begins with
        # the state before.
        worker, lost_server = self._runtime.worker, isinstance(exception, ExchangeError)
        is_asked_to_end = isinstance(exception, (KeyboardInterrupt, SIGTERMException)) or trainer.received_sigterm
        is_orderly = lost_server or is_asked_to_end
        if not is_orderly or worker.diverged or self._runtime.stopped:
            return
        if self._writer is not None and worker.total_steps > 0:
            until = time.monotonic() + _SECONDS_WHEN_INTERRUPTED
            if self._writer.wait(_SECONDS_WHEN_INTERRUPTED):
                self._save(self._writer)
            if not self._writer.wait(max(0.0, until - time.monotonic())):
                _log.warning("the optimizer state of worker %d could not be completed in time", self._number)
            if self._file_name:
                _log.warning("the optimizer state of worker %d is in %s", self._number, self._folder / self._file_name)
        if lost_server:
            _log.error(
                "worker %d has lost the server and stops. To resume the run %r, start the script again with "
                'trainer.fit(..., ckpt_path="last"). `python -m lightning_async_localsgd SCRIPT ...` restarts it by '
                "itself.",
                self._number, strategy_of(self._trainer).run_name,
            )  # fmt: skip

    def close(self) -> None:
        """Remove the callback, and wait until the state is written."""
        callbacks_of(self._trainer).remove(self)
        if self._writer is not None and not self._writer.wait(_SECONDS_AT_THE_END):
            _log.warning(
                "an optimizer state is still being written to %s; training ends without waiting for it", self._folder
            )
        self._writer = None

    # ------------------------------------------------------------------ internal

    @property
    def _version(self) -> int:
        """Version of the global model in the latest reply: the number of merged rounds."""
        reply = self._runtime.worker.reply
        return 0 if reply is None else reply.version

    @property
    def _save_request(self) -> int:
        """Number of rank 0's latest request to save."""
        reply = self._runtime.worker.reply
        return 0 if reply is None else reply.save_request

    def _load_newest(self, folder: Path) -> Path | None:
        """Load the newest state that an earlier process of this worker has saved, and return its file."""
        file = newest(files_of(folder, self._number))
        own = [optimizer.state_dict() for optimizer in self._trainer.optimizers]
        if file is None or not _load(self._trainer, file, own):
            _log.warning("worker %d joins with a fresh optimizer state: none was saved", self._number)
            return None
        _log.warning("worker %d joins with its optimizer state of %s", self._number, file)
        return file

    def _keep_resumed_file(self, file: Path, folder: Path) -> None:
        """Link the loaded file into the run's folder, because its name is reported until there is a newer file.

        It becomes the newest file there: states that were saved after it belong to rounds that are lost.
        """
        try:
            kept = link(file, folder)
            make_newest(kept, folder)
            self._file_name = kept.name
        except OSError as error:
            _log.warning("%s cannot be kept in %s: %s", file, folder, error)

    def _save(self, writer: BackgroundWriter) -> None:
        """Copy the state, and begin to write it."""
        self._interval.restart(self._version)
        if self._runtime.worker.reply is not None:
            self._answered_request = self._save_request
        try:
            strategy, uplink = self._trainer.strategy, self._runtime.worker.uplink
            state = {
                "format": _FORMAT,
                "worker": self._number,
                "session": self._runtime.worker.session,
                "version": self._version,
                "optimizers": copy_to_host([strategy.optimizer_state(each) for each in self._trainer.optimizers]),
                "precision": copy_to_host(strategy.precision_plugin.state_dict()),
                RESIDUAL: None if uplink is None else uplink.copy_residual(),
            }
        except Exception as error:
            writer.failed(error)
            return
        finally:
            self._runtime.worker.leave_out_step()
        writer.begin(lambda: self._write(state))

    def _write(self, state: dict[str, Any]) -> None:
        files = newest_first(files_of(self._folder, self._number))
        count = 1 + max((_count_of(path) for path in files), default=0)
        stem = f"worker-{self._number}-{count:06d}"
        self._file_name = write(self._folder, stem, ".pt", lambda file: torch.save(state, file)).name
        for old in files[KEPT - 1 :]:
            old.unlink(missing_ok=True)


def _restore_residual(runtime: Runtime, file: Path | None) -> None:
    """Let a worker continue from the residual in its file."""
    uplink = runtime.worker.uplink
    if uplink is None or file is None:
        return
    saved = torch.load(file, map_location="cpu", weights_only=True).get(RESIDUAL)
    if not uplink.restore(saved):
        _log.info("worker %d begins without a residual: %s has none that fits", runtime.worker.number, file)


def _count_of(path: Path) -> int:
    match = FILE_NAME.fullmatch(path.name)
    return int(match[2]) if match else 0


# ---------------------------------------------------------------------------- resuming


def resume_optimizers(trainer: pl.Trainer, checkpoint: Mapping[str, Any], state: Mapping[str, Any]) -> Path | None:
    """Load the inner optimizer states of a worker above 0 when the run is resumed.

    Args:
        trainer: the trainer.
        checkpoint: checkpoint that the run is resumed from.
        state: the server's state in the checkpoint.

    Returns:
        The file that was loaded; None if no file fits, so that the states are fresh.

    """
    rank, path = trainer.global_rank, trainer.ckpt_path
    states = checkpoint["optimizer_states"]
    name = file_names(state).get(rank)
    for file, belongs in _candidates(trainer, rank, name, state):
        if _load(trainer, file, states):
            if not belongs:
                _log.warning(
                    "worker %d: the optimizer state that belongs to %s is missing; continuing with %s, which is of "
                    "another moment of the same run", rank, path, file,
                )  # fmt: skip
            return file
    _load_learning_rates(trainer, states)
    if rank >= int(state["initial_workers"]) and name is None:
        _log.info("worker %d was not in the run when %s was written: its optimizer state is fresh", rank, path)
    else:
        _log.warning("worker %d: its optimizer state for %s was not found; it begins with a fresh one", rank, path)
    return None


def _candidates(
    trainer: pl.Trainer, rank: int, name: str | None, state: Mapping[str, Any]
) -> Iterator[tuple[Path, bool]]:
    """Yield intact files, best first, and whether they belong to the checkpoint."""
    path, runs, run = trainer.ckpt_path, runs_of(trainer), state.get("run_name")
    is_local = path is not None and "://" not in str(path)
    folders = [runs / run] if runs is not None and isinstance(run, str) and Path(run).name == run else []
    if is_local:
        folders.append(Path(str(path)).parent)
    # The run's folder may have moved with the checkpoint, or this run may have another default_root_dir.
    folders_of_checkpoint = folders_in(state, folders)
    folders += [folder.parent.parent for folder in folders_of_checkpoint]
    folders = list(dict.fromkeys(folders))
    beside = [folder_beside(checkpoint) for checkpoint in (path, Path(str(path)).resolve())] if is_local else []
    holding = dict.fromkeys([*folders_of_checkpoint, *(folder for folder in beside if folder is not None)])
    kept = [file for folder in holding for file in newest_first(files_of(folder, rank))]
    named = [folder / name for folder in folders if name is not None and (folder / name).exists()]
    for file in [*kept, *named]:
        if verified(file):
            yield file, True
        else:
            _log.warning("%s is damaged: its content does not match the hash in its name; it is skipped", file)
    for folder in folders:
        other = newest(file for file in files_of(folder, rank) if file.name != name)
        if other is not None:
            yield other, False


def _load(trainer: pl.Trainer, path: Path, states: list[Any]) -> bool:
    """Load a worker's file with the current learning rates in ``states``; return whether the file fits."""
    before = [optimizer.state_dict() for optimizer in trainer.optimizers]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for loaded, current in zip(state["optimizers"], states, strict=True):
            _copy_learning_rates(current["param_groups"], loaded["param_groups"])
        trainer.strategy.load_optimizer_state_dict({"optimizer_states": state["optimizers"]})
        if state["precision"]:
            trainer.strategy.precision_plugin.load_state_dict(state["precision"])
    except Exception as error:
        _log.warning("%s does not fit this worker's optimizers (%s: %s)", path, type(error).__name__, error)
        # The states of the first of several optimizers may have been loaded.
        trainer.strategy.load_optimizer_state_dict({"optimizer_states": before})
        return False
    _log.info("optimizer states are loaded from %s", path)
    return True


def _load_learning_rates(trainer: pl.Trainer, states: list[Any]) -> None:
    for optimizer, state in zip(trainer.optimizers, states, strict=False):
        _copy_learning_rates(state["param_groups"], optimizer.param_groups)


def _copy_learning_rates(source: list[dict[str, Any]], target: list[dict[str, Any]]) -> None:
    """Copy learning rates, which follow the progress of all workers and not a worker's own."""
    for old, new in zip(source, target, strict=False):
        new.update({key: old[key] for key in ("lr", "initial_lr") if key in old})
