"""Simulated epochs that are shorter than rounds: validations decide only about models that have learned."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy as Simulated
from lightning_async_localsgd.outer import SGD
from tests.lightning_models import loader, quiet_trainer
from tests.short_epochs import Model

EPOCHS = 8


def fit(out: Path, **options: Any) -> tuple[Model, Any, ModelCheckpoint]:
    checkpoint = ModelCheckpoint(dirpath=out, monitor="val_loss")
    trainer = quiet_trainer(
        Simulated([0.1, 0.2], outer_optimizer=SGD(lr=0.5), **options),
        max_epochs=EPOCHS,
        callbacks=[EarlyStopping("val_loss", patience=1), checkpoint],
    )
    torch.manual_seed(0)
    module = Model()
    trainer.fit(module, loader(64), loader(64, shuffle=False))
    return module, trainer, checkpoint


@pytest.mark.parametrize("local_steps", [3, 10, 1000])
def test_callbacks_that_decide_see_the_model_improve(tmp_path: Path, local_steps: int) -> None:
    module, trainer, checkpoint = fit(tmp_path, local_steps=local_steps)
    assert trainer.current_epoch == EPOCHS
    assert module.versions == sorted(set(module.versions))
    assert module.losses == sorted(set(module.losses), reverse=True)
    assert float(checkpoint.best_model_score or 0.0) == pytest.approx(module.losses[-1])
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.01


def test_validation_of_an_unchanged_model_decides_nothing_and_says_so(tmp_path: Path) -> None:
    """With a quorum, the first push of a group changes nothing before the others have pushed."""
    with pytest.warns(UserWarning, match="has not changed since the last validation") as caught:
        module, trainer, checkpoint = fit(tmp_path, local_steps=1000, quorum="all")
    assert sum("has not changed" in str(warning.message) for warning in caught) == 1
    assert len(set(module.versions)) < len(module.versions)
    assert trainer.current_epoch == EPOCHS
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.01
    assert float(checkpoint.best_model_score or 0.0) == pytest.approx(min(module.losses))


def test_rare_validations_leave_rounds_as_they_are(tmp_path: Path) -> None:
    versions = {}
    for validates in (True, False):
        torch.manual_seed(0)
        trainer = quiet_trainer(
            Simulated([0.1, 0.2], local_steps=4), max_epochs=2, limit_val_batches=1.0 if validates else 0
        )
        module = Model()
        module.configure_optimizers = lambda module=module: torch.optim.SGD(module.parameters(), lr=0.01)  # type: ignore[method-assign]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, loader(320), loader(64, shuffle=False))
        versions[validates] = [parameter.tolist() for parameter in module.parameters()]
    assert versions[True] == versions[False]
