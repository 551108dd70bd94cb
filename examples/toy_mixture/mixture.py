"""A mixture of mixtures of Gaussians: the classes, their clusters, and the LightningDataModule that draws from them."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Mixture:
    """Classes that are mixtures of Gaussian clusters of unit variance, all equally likely.

    Args:
        dimensions: of a point.
        classes: how many there are.
        clusters: Gaussians that a class is made of.
        spread: standard deviation of the clusters' centres in each dimension. The smaller it is, the more the classes
            overlap.
        seed: of the centres.

    Raises:
        ValueError: a number is too small.

    """

    def __init__(
        self, dimensions: int = 512, classes: int = 4, clusters: int = 8, spread: float = 0.2, seed: int = 0
    ) -> None:
        for name, value, least in (("dimensions", dimensions, 1), ("classes", classes, 2), ("clusters", clusters, 1)):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if not spread > 0.0:
            raise ValueError(f"spread={spread} must be above 0: classes that lie on each other cannot be told apart")
        self.classes = classes
        self.clusters = clusters
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self.centres = spread * torch.randn(classes * clusters, dimensions, generator=generator)

    def draw(self, count: int, number: int) -> tuple[Tensor, Tensor]:
        """Points ``[count, dimensions]`` and their classes ``[count]``: the same ones for the same ``number``."""
        generator = torch.Generator().manual_seed((self.seed << 32) + number)
        cluster = torch.randint(len(self.centres), (count,), generator=generator)
        noise = torch.randn(count, self.centres.size(1), generator=generator)
        return self.centres[cluster] + noise, cluster // self.clusters

    def best_loss(self, points: Tensor, classes: Tensor) -> float:
        """Cross-entropy of who knows the centres: no classifier does better on average."""
        densities = -0.5 * torch.cdist(points, self.centres).square()
        logits = densities.view(len(points), self.classes, self.clusters).logsumexp(2)
        return float(F.cross_entropy(logits, classes))


class MixtureBatches(Dataset[tuple[Tensor, Tensor]]):
    """Batches of a mixture, drawn when they are asked for, so that a long run needs no memory for them.

    Args:
        mixture: what to draw from.
        batches: how many there are.
        batch_size: points in each.
        first: number of the first batch; batches of other numbers hold other points.

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
    """Batches of one mixture, for training and for validation.

    An epoch is ``train_batches`` batches, which the strategy leases to the workers: each is trained on by one of them,
    and what a worker gets is as good a sample of the whole as what any other does.

    Args:
        train_batches: batches in an epoch. With as many as there are local steps in a run no point is seen twice.
        batch_size: points in a batch.
        validation_points: points to validate on.
        spread: see :class:`Mixture`.
        seed: of the mixture.

    Raises:
        ValueError: a number is too small.

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
