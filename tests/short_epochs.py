"""The module of the tests of epochs that are shorter than rounds."""

from __future__ import annotations

from typing import Any

import torch

from tests.lightning_models import Regression


class Model(Regression):
    """Notes the version of the global model and the loss of each validation."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(8, 1), lr=0.01)
        self.versions: list[int] = []
        self.losses: list[float] = []

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            runtime = self.trainer.strategy.runtime  # type: ignore[attr-defined]
            self.versions.append(runtime.server.snapshot.version)
            self.losses.append(float(self.trainer.callback_metrics["val_loss"]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
