"""A small multi-layer perceptron that tells the classes apart, as LightningModule.

Nothing in this file knows how the model is trained.
"""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


class Classifier(pl.LightningModule):
    """Two hidden layers, trained with SGD and a learning rate that falls as a cosine.

    Args:
        width: of the hidden layers.
        lr: learning rate at the beginning.
        final_lr_share: share of ``lr`` at the end of the run.
        dimensions: of a point.
        classes: how many there are.

    Raises:
        ValueError: ``width`` is no size.

    """

    def __init__(
        self, width: int = 64, lr: float = 0.1, final_lr_share: float = 0.1, dimensions: int = 512, classes: int = 4
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width={width} must be at least 1")
        self.lr = lr
        self.final_lr_share = final_lr_share
        self.network = nn.Sequential(
            nn.Linear(dimensions, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
        )

    def forward(self, points: Tensor) -> Tensor:
        logits: Tensor = self.network(points)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        points, classes = batch
        return F.cross_entropy(self(points), classes)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        points, classes = batch
        logits = self(points)
        self.log("val/loss", F.cross_entropy(logits, classes), batch_size=len(classes))
        self.log("val/accuracy", (logits.argmax(1) == classes).float().mean(), batch_size=len(classes))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        total = self.trainer.estimated_stepping_batches
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)

        def share(step: int) -> float:
            cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / total)))
            return self.final_lr_share + (1.0 - self.final_lr_share) * cosine

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, share), "interval": "step"}}
