"""A run whose epochs are shorter than its rounds: ``python short_epochs_job.py OUT VALIDATION_INTERVAL``.

Rank 0 writes what early stopping, checkpoints and a plateau scheduler have made of its validations to ``OUT``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_async_localsgd import AsyncLocalSGDStrategy
from lightning_async_localsgd.outer import SGD
from tests.lightning_models import loader, quiet_trainer
from tests.short_epochs import Model

EPOCHS = 12


def main(out: Path, interval: float) -> None:
    L.seed_everything(3, verbose=False)
    checkpoint = ModelCheckpoint(dirpath=out / "checkpoints", monitor="val_loss")
    trainer = quiet_trainer(
        AsyncLocalSGDStrategy(local_steps=1000, outer_optimizer=SGD(lr=0.5)),
        devices=2,
        max_epochs=EPOCHS,
        val_check_interval=interval,
        callbacks=[EarlyStopping("val_loss", patience=1), checkpoint],
    )
    module = Model()
    trainer.fit(module, loader(64), loader(64, shuffle=False))
    if trainer.is_global_zero:
        found = {
            "epochs": trainer.current_epoch,
            "versions": module.versions,
            "losses": module.losses,
            "best": float(checkpoint.best_model_score or 0.0),
            "rate": trainer.optimizers[0].param_groups[0]["lr"],
        }
        (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
