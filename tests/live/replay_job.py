"""The run that is logged and replayed: ``python replay_job.py live|replay OUT JSON``.

``live`` runs three unequal ranks and writes ``OUT/events.jsonl``; ``replay`` plays that file in one process. Both leave
the digest of the final model in a file of their name. In ``JSON`` are options of the trainer and of the strategy; where
the latter takes an object, there are the arguments that it is made from.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_async_localsgd import (
    AsyncLocalSGDCallback,
    AsyncLocalSGDStrategy,
    EmulatedDevices,
    MergeOptions,
    SimulatedAsyncLocalSGDStrategy,
)
from lightning_async_localsgd.staleness import Polynomial

RANKS = 3

OBJECTS = {"staleness": Polynomial, "merge": MergeOptions}


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 32), torch.nn.BatchNorm1d(32), torch.nn.Tanh(), torch.nn.Linear(32, 1)
        )

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(samples: int, shuffle: bool) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, 8, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs[:, :1].sin()), batch_size=8, shuffle=shuffle)


def main(kind: str, out: Path, options: dict[str, Any]) -> None:
    L.seed_everything(3, verbose=False)
    torch.set_num_threads(1)
    given = options.get("strategy", {})
    policies = {name: OBJECTS[name](**value) if name in OBJECTS else value for name, value in given.items()}
    policies = {"local_steps": 6, **policies}
    events = out / "events.jsonl"
    if kind == "live":
        strategy = AsyncLocalSGDStrategy(**policies)
        callbacks = [EmulatedDevices([0.01, 0.015, 0.04]), AsyncLocalSGDCallback(table=False, events=events)]
    else:
        strategy = SimulatedAsyncLocalSGDStrategy(replay=events, **policies)
        callbacks = [AsyncLocalSGDCallback(table=False)]
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=RANKS if kind == "live" else 1,
        callbacks=callbacks,
        default_root_dir=out,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        **{"max_steps": 40, **options.get("trainer", {})},
    )
    module = Model()
    trainer.fit(module, loader(480, True), loader(64, False))
    if trainer.is_global_zero:
        bits = b"".join(
            tensor.numpy().tobytes() for tensor in module.state_dict().values() if tensor.is_floating_point()
        )
        (out / kind).write_text(hashlib.sha256(bits).hexdigest())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
