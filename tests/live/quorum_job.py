"""A job whose every number can be computed by hand: ``python quorum_job.py OUT JSON``.

Each rank trains on samples of its own, made of its rank and their index. Rank 0 writes the final model to
``OUT/final.pt``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_async_localsgd import AsyncLocalSGDCallback, AsyncLocalSGDStrategy
from lightning_async_localsgd.outer import Nesterov

RANKS = 3
ROUNDS = 6
LOCAL_STEPS = 5
BATCH = 8


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def loss_of(net: nn.Module, inputs: Tensor) -> Tensor:
    return (net(inputs) - inputs[:, :1] * inputs[:, 1:2]).square().mean()


def sample(rank: int, index: int) -> Tensor:
    return torch.randn(4, generator=torch.Generator().manual_seed(1000 * rank + index))


def learning_rate(step: int) -> float:
    """Relative to the first one."""
    return 1.0 / (1.0 + 0.1 * step)


def inner_optimizer(net: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)


class OwnSamples(Dataset[Tensor]):
    """One rank's."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __len__(self) -> int:
        return ROUNDS * LOCAL_STEPS * BATCH

    def __getitem__(self, index: int) -> Tensor:
        return sample(self.rank, index)


class Product(L.LightningModule):
    """Learns the product of two of its inputs."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = network(seed)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        # Ranks are of unequal speed.
        time.sleep(0.004 * self.trainer.global_rank)
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = inner_optimizer(self.net)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main(out: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    strategy = AsyncLocalSGDStrategy(
        local_steps=LOCAL_STEPS,
        outer_optimizer=Nesterov(lr=0.7, momentum=0.9),
        dynamic_local_steps=False,
        start_timeout=60.0,
        **options,
    )
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=RANKS,
        max_steps=ROUNDS * LOCAL_STEPS,
        use_distributed_sampler=False,
        logger=False,
        callbacks=[AsyncLocalSGDCallback(ledger=out / "ledger.jsonl")],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
    )
    rank = trainer.global_rank
    module = Product(seed=rank)  # Others than rank 0's, which the first dispatch replaces.
    trainer.fit(module, DataLoader(OwnSamples(rank), batch_size=BATCH))
    torch.save(module.net.state_dict(), out / f"final_{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
