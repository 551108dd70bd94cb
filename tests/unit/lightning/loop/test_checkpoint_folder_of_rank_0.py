"""Callbacks that rest on ranks above 0, and their states there after training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_async_localsgd import AsyncLocalSGDStrategy
from lightning_async_localsgd.lightning.loop.rank_zero_callbacks import (
    RestingCallbacks,
    callback_states,
    load_callback_states,
)
from lightning_async_localsgd.lightning.trainer_access.callbacks import callbacks_of
from tests.lightning_models import Regression, loader, quiet_trainer


class Counting(L.Callback):
    """Counts its hooks."""

    calls = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.calls += 1

    def on_validation_end(self, *_: Any) -> None:
        self.calls += 1

    def on_exception(self, *_: Any) -> None:
        self.calls += 1


class CountingCheckpoint(Counting, ModelCheckpoint):
    """A user's own class."""


class CountingStopping(Counting, EarlyStopping):
    """Another one."""


HOOKS = [name for name in vars(L.Callback) if name.startswith("on_")]


@pytest.fixture
def trainer(tmp_path: Path) -> L.Trainer:
    callbacks = [Counting(), CountingCheckpoint(tmp_path / "saved"), CountingStopping("loss", patience=7)]
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", callbacks=callbacks, default_root_dir=tmp_path, **options)


def call(trainer: L.Trainer, *hooks: str) -> list[int]:
    """Call hooks of all callbacks, and return how many calls each has counted."""
    counting = [callback for callback in callbacks_of(trainer) if isinstance(callback, Counting)]
    for callback in counting:
        for hook in hooks:
            getattr(callback, hook)(trainer, None)
    return [callback.calls for callback in counting]


def test_resting_callbacks_stay_where_they_are(trainer: L.Trainer, tmp_path: Path) -> None:
    before = list(callbacks_of(trainer))
    keys = [callback.state_key for callback in before]
    resting = RestingCallbacks(trainer)
    assert callbacks_of(trainer) == before
    checkpoint, stopping = trainer.checkpoint_callback, trainer.early_stopping_callback
    assert type(checkpoint).__name__ == "CountingCheckpoint"
    assert isinstance(checkpoint, CountingCheckpoint)
    assert isinstance(stopping, CountingStopping)
    assert (Path(str(checkpoint.dirpath)), stopping.patience) == (tmp_path / "saved", 7)
    assert [callback.state_key for callback in before] == keys
    assert checkpoint.state_dict()["dirpath"] == str(checkpoint.dirpath)
    resting.restore()
    assert callbacks_of(trainer) == before
    assert [type(callback) for callback in (checkpoint, stopping)] == [CountingCheckpoint, CountingStopping]


def test_no_hook_of_a_resting_callback_runs(trainer: L.Trainer) -> None:
    resting = RestingCallbacks(trainer)
    assert call(trainer, "on_train_batch_end", "on_validation_end", "on_exception") == [3, 0, 0]
    for callback in (trainer.checkpoint_callback, trainer.early_stopping_callback):
        for hook in HOOKS:
            getattr(callback, hook)(trainer, None, None, None, 0)
    resting.restore()
    resting.restore()
    assert call(trainer, "on_train_batch_end") == [4, 1, 1]


def test_rank_that_has_chosen_another_folder_takes_that_of_rank_0(tmp_path: Path) -> None:
    """Lightning #17115, #18294: a restarted worker's logger begins a new version, in whose folder nothing is saved."""
    keep = ModelCheckpoint(tmp_path / "version_0" / "checkpoints", save_last=True)
    trainer = quiet_trainer(AsyncLocalSGDStrategy(), callbacks=[keep], max_steps=3, default_root_dir=tmp_path)
    trainer.fit(Regression(), loader(64))
    restarted = ModelCheckpoint(tmp_path / "version_1" / "checkpoints", save_last=True)
    other = quiet_trainer(AsyncLocalSGDStrategy(), callbacks=[restarted], default_root_dir=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_callback_states(other, callback_states(trainer))
    assert restarted.dirpath == keep.dirpath
    assert restarted.last_model_path == keep.last_model_path
    assert restarted.best_model_path == keep.best_model_path
    assert restarted.best_k_models == keep.best_k_models
