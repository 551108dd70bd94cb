"""Processes of data loaders that die: when their error is raised."""

from __future__ import annotations

import multiprocessing.util
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from lightning_async_localsgd import AsyncLocalSGDStrategy
from lightning_async_localsgd.lightning.loop.loader_deaths import LoaderDeaths
from tests.lightning_models import Regression, loader, quiet_trainer

KILLED = "is killed by signal: Terminated"


@pytest.fixture(autouse=True)
def torch_reports_deaths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch install its signal handler again, because Lightning removes it after each fit."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)


@pytest.fixture(autouse=True)
def processes_leave_no_sockets() -> None:
    """Own the folder of the processes' sockets. A process that is killed removes no folder of its own."""
    multiprocessing.util.get_temp_dir()


def kill_loader_processes() -> None:
    """Kill the processes of data loaders as a signal to the whole group does. Torch's handler has run at the end."""
    for process in multiprocessing.active_children():
        assert process.pid is not None
        # Not by their parent, from which a loader's process takes SIGTERM as a wish to end.
        if os.fork() == 0:
            os.kill(process.pid, signal.SIGTERM)
            os._exit(0)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


class Killer(L.Callback):
    """Kills the loader's processes in the third batch.

    Args:
        at: hook in which to kill them.
        asked: whether this process gets SIGTERM first.

    """

    def __init__(self, at: str, asked: bool = False) -> None:
        self.at = at
        self.asked = asked
        self.completed = 0
        self.interrupted: BaseException | None = None
        self.saves_completely = False

    def kill(self, batch_idx: int, at: str) -> None:
        if batch_idx == 2 and at == self.at:
            if self.asked:
                signal.raise_signal(signal.SIGTERM)
            kill_loader_processes()
            self.completed += 1

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.kill(batch_idx, "start")

    def on_before_zero_grad(self, trainer: L.Trainer, *_: Any) -> None:
        self.kill(trainer.fit_loop.batch_idx, "step")

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self.interrupted = exception
        if self.at == "exception":
            kill_loader_processes()
        self.saves_completely = True

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.at == "exception" and batch_idx == 2:
            raise KeyboardInterrupt


def workers_loader() -> DataLoader[Any]:
    plain = loader(64)
    return DataLoader(plain.dataset, batch_size=4, num_workers=2)


def fit(tmp_path: Path, killer: Killer) -> type[BaseException]:
    """Train with one rank; return the type of the exception that ends training."""
    handler = signal.getsignal(signal.SIGTERM)
    trainer = quiet_trainer(
        AsyncLocalSGDStrategy(local_steps=2), callbacks=[killer], max_steps=10, default_root_dir=tmp_path
    )
    try:
        with pytest.raises(BaseException) as raised:  # noqa: PT011 # SystemExit, too
            trainer.fit(Regression(), workers_loader())
    finally:
        signal.signal(signal.SIGTERM, handler)
    return raised.type


def checkpoints(tmp_path: Path) -> list[Path]:
    return list(tmp_path.glob("async_localsgd/*/rounds=*.ckpt"))


@pytest.mark.parametrize("at", ["start", "step"])
def test_error_is_raised_at_the_end_of_the_batch(tmp_path: Path, at: str) -> None:
    killer = Killer(at)
    assert fit(tmp_path, killer) is RuntimeError
    assert killer.completed == 1, "the hook in which the processes died was not interrupted"
    assert KILLED in str(killer.interrupted)
    [path] = checkpoints(tmp_path)
    assert torch.load(path, weights_only=True)["global_step"] == 3, "the batch was completed"


def test_job_that_was_asked_to_end_saves_and_ends_as_asked(tmp_path: Path) -> None:
    killer = Killer("start", asked=True)
    assert fit(tmp_path, killer) is SIGTERMException
    assert killer.completed == 1
    assert len(checkpoints(tmp_path)) == 1


def test_save_after_an_interruption_is_not_interrupted(tmp_path: Path) -> None:
    killer = Killer("exception")
    assert fit(tmp_path, killer) is SystemExit, "as Lightning ends after Ctrl+C"
    assert isinstance(killer.interrupted, KeyboardInterrupt)
    assert killer.saves_completely
    assert len(checkpoints(tmp_path)) == 1


@pytest.mark.parametrize(("asked", "raised"), [(False, RuntimeError), (True, SIGTERMException)])
def test_error_is_raised_at_once_if_the_rank_waits_for_data(asked: bool, raised: type[BaseException]) -> None:
    def report(*_: Any) -> None:
        raise RuntimeError(KILLED)

    # As the next batch of a data loader of torch.
    loader_module: dict[str, Any] = {"__name__": "torch.utils.data.dataloader", "die": die}
    exec("def __next__(): die()", loader_module)
    before = signal.signal(signal.SIGCHLD, report)
    deaths = LoaderDeaths()
    try:
        deaths.watch(cast("L.Trainer", SimpleNamespace(received_sigterm=asked)))
        die()
        with pytest.raises(raised):
            loader_module["__next__"]()
        deaths.end()
        die()
    finally:
        signal.signal(signal.SIGCHLD, before)


def die() -> None:
    signal.raise_signal(signal.SIGCHLD)


def test_handlers_are_restored_after_training(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGCHLD)
    trainer = quiet_trainer(AsyncLocalSGDStrategy(local_steps=2), max_steps=3, default_root_dir=tmp_path)
    trainer.fit(Regression(), workers_loader())
    assert signal.getsignal(signal.SIGCHLD) is before
