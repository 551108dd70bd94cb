"""Ordinary short runs: six small models, each with generated data and the optimizer that a user would pick.

They have 6 epochs of 64 batches in all, and are as short as a first try with a new library.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.lightning_models import quiet_trainer

EPOCHS = 6
BATCH = 32
SAMPLES = 2048
HELD_OUT = 512


class ShortRun(L.LightningModule):
    """A model with its loss and optimizer. Records the validation loss of each epoch.

    Args:
        net: the network.
        loss: loss of outputs and targets.
        optimizer: makes the optimizer from parameters.

    """

    def __init__(
        self, net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], optimizer: Callable[..., torch.optim.Optimizer]
    ) -> None:
        super().__init__()
        self.net = net
        self.loss = loss
        self.make_optimizer = optimizer
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val", self.loss(self.net(batch[0]), batch[1]), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.losses.append(float(self.trainer.callback_metrics["val"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


@dataclass(frozen=True)
class Task:
    """A short run.

    Args:
        net: makes the network.
        loss: loss of outputs and targets.
        optimizer: makes the optimizer from parameters.
        data: makes inputs and targets from a number of samples.

    """

    net: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[..., torch.optim.Optimizer]
    data: Callable[[int], tuple[Tensor, Tensor]]

    def fit(self, seed: int, batch_size: int = BATCH, **trainer: Any) -> list[float]:
        """Train, and return the validation loss of each epoch."""
        L.seed_everything(seed, verbose=False)
        inputs, targets = self.data(SAMPLES + HELD_OUT)
        train = TensorDataset(inputs[:SAMPLES], targets[:SAMPLES])
        held_out = TensorDataset(inputs[SAMPLES:], targets[SAMPLES:])
        module = ShortRun(self.net(), self.loss, self.optimizer)
        quiet_trainer(max_epochs=EPOCHS, num_sanity_val_steps=0, **trainer).fit(
            module, DataLoader(train, batch_size, shuffle=True), DataLoader(held_out, HELD_OUT)
        )
        return module.losses


class Delayed(nn.Module):
    """A GRU that names, at each place of a sequence, the symbol two places before."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 8)
        self.gru = nn.GRU(8, 16, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, symbols: Tensor) -> Tensor:
        return self.head(self.gru(self.embedding(symbols))[0]).flatten(0, 1)


def _regression(samples: int) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(samples, 8)
    return inputs, inputs.sum(1, keepdim=True)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1))


def _images(samples: int) -> tuple[Tensor, Tensor]:
    """Return noisy images with a bright spot in one quadrant, and the number of the quadrant."""
    quadrants = torch.randint(4, (samples,))
    images = torch.randn(samples, 1, 8, 8)
    for number in range(4):
        row, column = 4 * (number // 2) + 1, 4 * (number % 2) + 1
        images[quadrants == number, 0, row : row + 2, column : column + 2] += 1.5
    return images, quadrants


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 4)
    )


def _classes(samples: int) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(samples, 16)
    noisy = inputs @ torch.linspace(-1.0, 1.0, 16) + 0.5 * torch.randn(samples)
    return inputs, (noisy > 0.0).float().unsqueeze(1)


def _sequences(samples: int) -> tuple[Tensor, Tensor]:
    symbols = torch.randint(4, (samples, 12))
    return symbols, symbols.roll(2, dims=1).index_fill(1, torch.tensor([0, 1]), -100)


def _sequence_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets.flatten())


def _low_rank(samples: int) -> tuple[Tensor, Tensor]:
    inputs = torch.tanh(torch.randn(samples, 4) @ torch.linspace(-1.0, 1.0, 64).sin().view(4, 16) * 2.0)
    return inputs, inputs


def _autoencoder() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4), nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 16))


_partial = functools.partial
_squares = nn.functional.mse_loss

TASKS = {
    "regression": Task(_mlp, _squares, _partial(torch.optim.Adam, lr=0.01), _regression),
    "sgd": Task(_mlp, _squares, _partial(torch.optim.SGD, lr=0.005, momentum=0.9), _regression),
    "cnn": Task(_cnn, nn.functional.cross_entropy, _partial(torch.optim.AdamW, lr=3e-3), _images),
    "logistic": Task(
        lambda: nn.Linear(16, 1),
        nn.functional.binary_cross_entropy_with_logits,
        _partial(torch.optim.SGD, lr=0.5),
        _classes,
    ),
    "gru": Task(Delayed, _sequence_loss, _partial(torch.optim.Adam, lr=0.01), _sequences),
    "autoencoder": Task(_autoencoder, _squares, _partial(torch.optim.Adam, lr=3e-3), _low_rank),
}
