"""A run that a test can compute again: ``python quorum_job.py OUT JSON``, with options of the strategy.

Each rank trains on its own samples, and writes the final model to ``OUT/final_<n>.pt``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_async_localsgd import AsyncLocalSGDCallback, AsyncLocalSGDStrategy, ExchangeOptions
from lightning_async_localsgd.outer import Nesterov
from tests.lightning_models import PacedRegression, inverse_time, network, quiet_trainer

RANKS = 3
ROUNDS = 6
LOCAL_STEPS = 5
BATCH = 8


SECONDS = (0.0, 0.004, 0.008)
"""Minimum seconds of a local step, by rank."""


def seeded_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return network(8, batch_norm=True)


def loss_of(net: nn.Module, inputs: Tensor) -> Tensor:
    return (net(inputs) - inputs[:, :1] * inputs[:, 1:2]).square().mean()


def sample(rank: int, index: int) -> Tensor:
    return torch.randn(8, generator=torch.Generator().manual_seed(1000 * rank + index))


class OwnSamples(Dataset[Tensor]):
    """The samples of one rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __len__(self) -> int:
        return ROUNDS * LOCAL_STEPS * BATCH

    def __getitem__(self, index: int) -> Tensor:
        return sample(self.rank, index)


class Product(PacedRegression):
    """Learns the product of two of its inputs."""

    def __init__(self, seed: int) -> None:
        super().__init__(SECONDS, seeded_network(seed), torch.optim.AdamW, 1e-2, inverse_time)

    def loss(self, batch: Tensor) -> Tensor:
        return loss_of(self.net, batch)


def main(out: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    strategy = AsyncLocalSGDStrategy(
        local_steps=LOCAL_STEPS,
        outer_optimizer=Nesterov(lr=0.7, momentum=0.9),
        dynamic_local_steps=False,
        exchange=ExchangeOptions(start_timeout=60.0),
        **options,
    )
    trainer = quiet_trainer(
        strategy,
        devices=RANKS,
        max_steps=ROUNDS * LOCAL_STEPS,
        use_distributed_sampler=False,
        callbacks=[AsyncLocalSGDCallback(events=out / "events.jsonl", max_event_megabytes=None)],
        default_root_dir=out,
    )
    rank = trainer.global_rank
    module = Product(seed=rank)  # The first dispatch replaces the weights of other ranks.
    trainer.fit(module, DataLoader(OwnSamples(rank), batch_size=BATCH))
    torch.save(module.net.state_dict(), out / f"final_{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
