"""What trainer_access does to Lightning's callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_async_localsgd.lightning.trainer_access import callbacks
from tests.lightning_models import EMAWeightAveraging, quiet_trainer
from tests.unit.lightning.trainer_access.support import at, fit


def test_callback_that_is_removed_from_the_list_is_not_called() -> None:
    silent, results = at(on_train_epoch_end=id)
    remover, _ = at(on_train_start=lambda trainer: callbacks.callbacks_of(trainer).remove(silent))
    fit(remover, silent)
    assert results["on_train_epoch_end"] == []


def test_model_checkpoints_are_found_among_the_callbacks(tmp_path: Path) -> None:
    first, second = ModelCheckpoint(tmp_path / "a"), ModelCheckpoint(tmp_path / "b", every_n_train_steps=2)
    callback, results = at(on_train_start=callbacks.model_checkpoints_of)
    fit(callback, first, second, enable_checkpointing=True)
    assert results["on_train_start"] == [[first, second]]


def test_learning_rate_search_is_recognized(tmp_path: Path) -> None:
    class Searched(BoringModel):
        lr = 0.1

        def on_train_start(self) -> None:
            searching.append(callbacks.searches_learning_rate(self.trainer))

    searching: list[bool] = []
    fit(LearningRateFinder(num_training_steps=2), module=Searched(), default_root_dir=tmp_path)
    assert searching == [True, False]


def test_callbacks_that_unfreeze_are_recognized() -> None:
    assert callbacks.may_unfreeze(quiet_trainer("auto", callbacks=[BackboneFinetuning()]))
    assert not callbacks.may_unfreeze(quiet_trainer("auto"))


def test_number_of_steps_between_checkpoints_can_be_read_and_set(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    assert callbacks.steps_between_checkpoints(checkpoint) == 2
    assert callbacks.steps_between_checkpoints(ModelCheckpoint(tmp_path, every_n_epochs=1)) == 0
    callbacks.set_steps_between_checkpoints(checkpoint, 3)
    fit(checkpoint, batches=7, enable_checkpointing=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=3.ckpt", "step=6.ckpt"]


@pytest.mark.skipif(EMAWeightAveraging is None, reason="Lightning has no EMAWeightAveraging")
def test_averaging_callback_updates_its_average_by_steps() -> None:
    averaging = EMAWeightAveraging()
    assert isinstance(averaging, callbacks.WEIGHT_AVERAGING)
    updates: list[Any] = []

    def observe(trainer: L.Trainer) -> None:
        average = callbacks.average_of(averaging)
        update = average.update_parameters
        average.update_parameters = lambda module: (updates.append(module), update(module))

    callback, _ = at(on_train_start=observe)
    trainer = fit(callback, averaging, batches=3)
    assert updates == [trainer.lightning_module] * 3


class Normalized(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.BatchNorm1d(32), torch.nn.Linear(32, 2))


@pytest.mark.parametrize("module", [Normalized, BoringModel])
def test_epoch_for_batch_norm_statistics_can_be_cancelled(module: type[BoringModel]) -> None:
    averaging = StochasticWeightAveraging(0.1, swa_epoch_start=1)

    def cancel(trainer: L.Trainer) -> bool:
        planned = callbacks.cancel_batch_norm_epoch(averaging)
        assert trainer.fit_loop.max_epochs == 2 + planned
        trainer.fit_loop.max_epochs = 2
        return planned

    callback, results = at(on_train_start=cancel, on_train_epoch_end=id)
    fit(callback, averaging, module=module(), max_epochs=2)
    assert results["on_train_start"] == [module is Normalized]
    assert len(results["on_train_epoch_end"]) == 2


@pytest.mark.parametrize(("epoch", "saves"), [(0, False), (1, True), (2, False)])
def test_checkpoint_is_saved_as_in_another_epoch(tmp_path: Path, epoch: int, saves: bool) -> None:
    saved = ModelCheckpoint(tmp_path, every_n_epochs=2, save_on_train_epoch_end=False)

    def save(trainer: L.Trainer) -> None:
        key = saved.state_key
        with callbacks.saving_as_in(saved, epoch), callbacks.saving_as_in(L.Callback(), epoch):
            assert saved.state_key == key
            saved.on_validation_end(trainer, trainer.lightning_module)

    callback, _ = at(on_train_epoch_end=save)
    fit(callback, saved, enable_checkpointing=True)
    assert bool(list(tmp_path.glob("*.ckpt"))) == saves


def test_checkpoint_of_another_step_is_saved_beside_that_of_the_same_step(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=False)

    def save(trainer: L.Trainer) -> None:
        for _ in range(2):
            saved.on_validation_end(trainer, trainer.lightning_module)
        with callbacks.saving_as_in(saved, 0):
            for _ in range(2):
                saved.on_validation_end(trainer, trainer.lightning_module)
        saved.on_validation_end(trainer, trainer.lightning_module)

    callback, results = at(on_train_epoch_end=save, on_save_checkpoint=lambda trainer: trainer.global_step)
    fit(callback, saved, enable_checkpointing=True)
    assert results["on_save_checkpoint"] == [4, 4]
