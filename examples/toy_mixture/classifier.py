"""A small multi-layer perceptron as a LightningModule.

This file does not depend on how the model is trained.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(pl.LightningModule):
    """Two hidden layers, trained with SGD at a constant learning rate.

    Args:
        width: size of the hidden layers, >= 1.
        lr: learning rate.
        dimensions: number of features of a point.
        classes: number of classes.

    Raises:
        ValueError: ``width`` is less than 1.

    """

    def __init__(self, width: int = 32, lr: float = 0.1, dimensions: int = 512, classes: int = 4) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width={width} must be at least 1")
        self.lr = lr
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

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)
