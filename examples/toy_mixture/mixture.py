"""Synthetic data: classes that are mixtures of Gaussian clusters, and a LightningDataModule that draws from them."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Mixture:
    """Classes that are mixtures of Gaussian clusters with unit variance. All clusters are equally likely.

    Args:
        dimensions: number of features of a point.
        classes: number of classes, >= 2.
        clusters: number of clusters in each class.
        spread: standard deviation of the cluster centers in each dimension, > 0. Classes overlap more with a smaller
            value.
        seed: seed of the centers and of the points.

    Raises:
        ValueError: a value is too small.

    """

    def __init__(
        self, dimensions: int = 512, classes: int = 4, clusters: int = 8, spread: float = 0.2, seed: int = 0
    ) -> None:
        for name, value, least in (("dimensions", dimensions, 1), ("classes", classes, 2), ("clusters", clusters, 1)):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if not spread > 0.0:
            raise ValueError(f"spread={spread} must be > 0, because classes with equal centers cannot be separated")
        self.classes = classes
        self.clusters = clusters
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self.centers = spread * torch.randn(classes * clusters, dimensions, generator=generator)

    def draw(self, count: int, number: int) -> tuple[Tensor, Tensor]:
        """Return points ``[count, dimensions]`` and their classes ``[count]``, which depend only on ``number``."""
        generator = torch.Generator().manual_seed((self.seed << 32) + number)
        cluster = torch.randint(len(self.centers), (count,), generator=generator)
        noise = torch.randn(count, self.centers.size(1), generator=generator)
        return self.centers[cluster] + noise, cluster // self.clusters

    def best_loss(self, points: Tensor, classes: Tensor) -> float:
        """Return the cross-entropy of the optimal classifier, which knows the centers."""
        densities = -0.5 * torch.cdist(points, self.centers).square()
        logits = densities.view(len(points), self.classes, self.clusters).logsumexp(2)
        return float(F.cross_entropy(logits, classes))


class MixtureBatches(Dataset[tuple[Tensor, Tensor]]):
    """Batches of a mixture, each drawn on access, so that a long run does not keep them in memory.

    Args:
        mixture: mixture to draw from.
        batches: number of batches.
        batch_size: number of points in a batch.
        first: number of the first batch. Batches with different numbers have different points.

    """

    def __init__(self, mixture: Mixture, batches: int, batch_size: int, first: int = 0) -> None:
        self.mixture = mixture
        self.batches = batches
        self.batch_size = batch_size
        self.first = first

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.batches:
            raise IndexError(f"batch {index} of {self.batches}")
        return self.mixture.draw(self.batch_size, self.first + index)


class MixtureData(pl.LightningDataModule):
    """Batches of one mixture for training and validation.

    The strategy leases the batches of an epoch to the workers. Each batch is trained on by one worker, and the batches
    of every worker are a sample of the whole mixture.

    Args:
        train_batches: number of batches in an epoch. If it is the number of local steps in the run, no point is used
            twice.
        batch_size: number of points in a batch.
        validation_points: number of points for validation.
        spread: see :class:`Mixture`.
        seed: seed of the mixture.

    Raises:
        ValueError: a value is too small.

    """

    def __init__(
        self,
        train_batches: int = 4800,
        batch_size: int = 64,
        validation_points: int = 4096,
        spread: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        counts = {"train_batches": train_batches, "batch_size": batch_size, "validation_points": validation_points}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        mixture = Mixture(spread=spread, seed=seed)
        self.train_data = MixtureBatches(mixture, train_batches, batch_size)
        self.validation_data = MixtureBatches(mixture, 1, validation_points, first=train_batches)
        self.best_loss = mixture.best_loss(*self.validation_data[0])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self.train_data, batch_size=None, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self.validation_data, batch_size=None)
