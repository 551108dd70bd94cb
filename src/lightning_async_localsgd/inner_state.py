"""The states of workers' inner optimizers on the disk: saved by each worker itself, found again by its number.

A worker above 0 saves them at the end of a round, every so often and when rank 0 has written a checkpoint, into the
run's folder on its own disk, and reports the file's name with its next push. The files that rank 0 can see are kept
beside each checkpoint P, see :mod:`.companions`. Rank 0's own state is in the checkpoint itself.
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

from lightning_async_localsgd.checkpoints import on_host
from lightning_async_localsgd.companions import NAME, beside, files_of, names_in
from lightning_async_localsgd.durable import Writer, link, make_newest, verified, write
from lightning_async_localsgd.exchange import ExchangeError
from lightning_async_localsgd.interval import Interval
from lightning_async_localsgd.run_folder import folder_of, in_order_of_age, newest, runs_of
from lightning_async_localsgd.trainer_parts import callbacks_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.phase_base import Phase
    from lightning_async_localsgd.strategy import AsyncLocalSGDStrategy

_log = logging.getLogger(__name__)

KEPT = 3
"""Files of a worker that stay in the folder: a checkpoint may name one that is not the newest any more."""

_FORMAT = 1
_SECONDS_AT_THE_END = 60.0
_SECONDS_WHEN_INTERRUPTED = 5.0


class InnerStates(Callback):
    """Saves the states of a worker's inner optimizers. The last of the trainer's callbacks until :meth:`release`.

    A worker that takes the place of an earlier process begins with what that one has saved.

    Args:
        trainer: the trainer of a rank above 0.
        phase: the phase that begins.

    """

    def __init__(self, trainer: pl.Trainer, phase: Phase) -> None:
        self._strategy: AsyncLocalSGDStrategy = trainer.strategy  # type: ignore[assignment]
        self._trainer = trainer
        self._phase = phase
        self._number = phase.worker.number
        self._name = ""
        self._answered = 0 if phase.worker.reply is None else phase.worker.reply.asked
        self._writer: Writer | None = None
        folder, every = folder_of(trainer), self._strategy.checkpoint_every
        if folder is not None:
            self._go_on(folder)
        if folder is not None and every is not None:
            self._folder = folder
            self._interval = Interval(every, self._rounds)
            self._writer = Writer(f"the optimizer state of worker {self._number}", folder)
        phase.worker.inner = lambda: self._name
        callbacks_of(trainer).append(self)

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        if self._writer is None or self._phase.stopped or self._phase.worker.round_steps > 0:
            return
        asked = self._phase.worker.reply is not None and self._phase.worker.reply.asked > self._answered
        if (asked or self._interval.over(self._rounds)) and not self._writer.busy:
            self._begin(self._writer)

    def finish(self) -> str:
        """Training is over: saves what belongs to the run's last checkpoints, and returns the file's name, if any."""
        writer = self._writer
        # Where writing takes too long, :meth:`release` says so.
        if writer is not None and self._phase.worker.total_steps > 0 and writer.wait(_SECONDS_AT_THE_END):
            self._begin(writer)
            writer.wait(_SECONDS_AT_THE_END)
        return self._name

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # After an error of this worker's own, its state may be the reason: whoever takes its place goes on from the
        # one before.
        worker, lost = self._phase.worker, isinstance(exception, ExchangeError)
        orderly = lost or isinstance(exception, (KeyboardInterrupt, SIGTERMException))
        if not orderly or worker.diverged or self._phase.stopped:
            return
        if self._writer is not None and worker.total_steps > 0:
            until = time.monotonic() + _SECONDS_WHEN_INTERRUPTED
            if self._writer.wait(_SECONDS_WHEN_INTERRUPTED):
                self._begin(self._writer)
            if not self._writer.wait(max(0.0, until - time.monotonic())):
                _log.warning("there is no time to complete the optimizer state of worker %d", self._number)
            if self._name:
                _log.warning("the optimizer state of worker %d is in %s", self._number, self._folder / self._name)
        if lost:
            _log.error(
                "worker %d has no server any more, and stops. To go on with the run %r, start the script again with "
                'trainer.fit(..., ckpt_path="last"); `python -m lightning_async_localsgd SCRIPT ...` does so by itself',
                self._number, self._strategy.run_name,
            )  # fmt: skip

    def release(self) -> None:
        """The trainer's callbacks are its own again; what is being written is complete."""
        callbacks_of(self._trainer).remove(self)
        if self._writer is not None and not self._writer.wait(_SECONDS_AT_THE_END):
            _log.warning("an optimizer state is still being written to %s; nobody waits for it", self._folder)
        self._writer = None

    # ------------------------------------------------------------------ internal

    @property
    def _rounds(self) -> int:
        reply = self._phase.worker.reply
        return 0 if reply is None else reply.version

    def _go_on(self, folder: Path) -> None:
        """Takes over what an earlier process has left, in this run or in the one that is resumed."""
        found = self._strategy.inner_file
        if self._strategy.joins:
            found = newest(files_of(folder, self._number))
            own = [optimizer.state_dict() for optimizer in self._trainer.optimizers]
            if found is None or not _load(self._trainer, found, own):
                _log.warning("worker %d joins with a fresh optimizer state: none was saved", self._number)
                return
            _log.warning("worker %d joins with its optimizer state of %s", self._number, found)
        if found is not None:
            try:
                # The name goes on being reported, and the file is to be found where this run's are. What was saved
                # after it is of rounds that have not happened.
                kept = link(found, folder)
                make_newest(kept, folder)
                self._name = kept.name
            except OSError as error:
                _log.warning("%s cannot be kept in %s: %s", found, folder, error)

    def _begin(self, writer: Writer) -> None:
        self._interval.begin(self._rounds)
        if self._phase.worker.reply is not None:
            self._answered = self._phase.worker.reply.asked
        try:
            state = {
                "format": _FORMAT,
                "worker": self._number,
                "session": self._phase.worker.session,
                "version": self._rounds,
                "optimizers": on_host([self._strategy.optimizer_state(one) for one in self._trainer.optimizers]),
                "precision": on_host(self._strategy.precision_plugin.state_dict()),
            }
        except Exception as error:
            writer.failed(error)
            return
        finally:
            self._phase.worker.interrupt()
        writer.begin(lambda: self._write(state))

    def _write(self, state: dict[str, Any]) -> None:
        files = in_order_of_age(files_of(self._folder, self._number))
        count = 1 + max((_count(path) for path in files), default=0)
        stem = f"worker-{self._number}-{count:06d}"
        self._name = write(self._folder, stem, ".pt", lambda file: torch.save(state, file)).name
        for old in files[KEPT - 1 :]:
            old.unlink(missing_ok=True)


def _count(path: Path) -> int:
    found = NAME.fullmatch(path.name)
    return int(found[2]) if found else 0


# ---------------------------------------------------------------------------- resuming


def resume(trainer: pl.Trainer, checkpoint: Mapping[str, Any], server: Mapping[str, Any]) -> Path | None:
    """A worker above 0 goes on with its own inner optimizer state; without one it begins with a fresh one.

    Args:
        trainer: the trainer.
        checkpoint: what the run is resumed from.
        server: the server's state in it.

    Returns:
        The file with the state; None if it begins with a fresh one.

    """
    rank, path = trainer.global_rank, trainer.ckpt_path
    states = checkpoint["optimizer_states"]
    name = names_in(server).get(rank)
    for found, belongs in _candidates(trainer, rank, name, server):
        if _load(trainer, found, states):
            if not belongs:
                _log.warning(
                    "worker %d: the optimizer state that belongs to %s is not there; going on with %s, of another "
                    "moment of the same run", rank, path, found,
                )  # fmt: skip
            return found
    _adopt_rates(trainer, states)
    if rank >= int(server["initial_workers"]) and name is None:
        _log.info("worker %d was not there when %s was written: its optimizers' states are fresh", rank, path)
    else:
        _log.warning("worker %d: its optimizer state for %s was not found; it begins with a fresh one", rank, path)
    return None


def _candidates(
    trainer: pl.Trainer, rank: int, name: str | None, server: Mapping[str, Any]
) -> Iterator[tuple[Path, bool]]:
    """Complete files, best first, and whether they belong to the checkpoint."""
    path, runs, run = trainer.ckpt_path, runs_of(trainer), server.get("folder")
    local = path is not None and "://" not in str(path)
    folders = [runs / run] if runs is not None and isinstance(run, str) and Path(run).name == run else []
    if local:
        folders.append(Path(str(path)).parent)
    places = [beside(one) for one in (path, Path(str(path)).resolve())] if local else []
    kept = [one for place in dict.fromkeys(places) if place is not None for one in files_of(place, rank)]
    named = [folder / name for folder in dict.fromkeys(folders) if name is not None and (folder / name).exists()]
    for found in [*in_order_of_age(kept), *named]:
        if verified(found):
            yield found, True
        else:
            _log.warning("%s is damaged: its content is not what its name says; it is passed over", found)
    for folder in dict.fromkeys(folders):
        others = [one for one in files_of(folder, rank) if one.name != name]
        if (other := newest(others)) is not None:
            yield other, False


def _load(trainer: pl.Trainer, path: Path, states: list[Any]) -> bool:
    """Loads a worker's file; learning rates are those of ``states``, which other optimizers of the run have by now."""
    before = [optimizer.state_dict() for optimizer in trainer.optimizers]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for mine, other in zip(state["optimizers"], states, strict=True):
            _copy_rates(other["param_groups"], mine["param_groups"])
        trainer.strategy.load_optimizer_state_dict({"optimizer_states": state["optimizers"]})
        if state["precision"]:
            trainer.strategy.precision_plugin.load_state_dict(state["precision"])
    except Exception as error:
        _log.warning("%s does not fit this worker's optimizers (%s: %s)", path, type(error).__name__, error)
        trainer.strategy.load_optimizer_state_dict({"optimizer_states": before})  # The first of several may have fit.
        return False
    _log.info("optimizer states are those of %s", path)
    return True


def _adopt_rates(trainer: pl.Trainer, states: list[Any]) -> None:
    for optimizer, state in zip(trainer.optimizers, states, strict=False):
        _copy_rates(state["param_groups"], optimizer.param_groups)


def _copy_rates(source: list[dict[str, Any]], target: list[dict[str, Any]]) -> None:
    """Learning rates follow the progress of all workers together, not a worker's own."""
    for one, other in zip(source, target, strict=False):
        other.update({key: one[key] for key in ("lr", "initial_lr") if key in one})
