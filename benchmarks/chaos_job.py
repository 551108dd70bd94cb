"""The training in which ``benchmarks/chaos.py`` injects faults: ``python chaos_job.py DIRECTORY JSON``.

Every rank trains a small regression model at the speed of an emulated device, until the directory contains a file
``stop``. See ``main`` for the options.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from step_notes import StepNotes
from torch.utils.data import DataLoader, TensorDataset

from lightning_async_localsgd import AsyncLocalSGDCallback, AsyncLocalSGDStrategy, EmulatedDevices, ExchangeOptions
from lightning_async_localsgd.server import line_file


class Regression(L.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.net(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class StopFile(L.Callback):
    """Stops the run when the file ``stop`` exists, and writes a digest of the final model."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.is_global_zero and trainer.global_step % 10 == 0 and (self.directory / "stop").exists():
            trainer.should_stop = True

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        digest = hashlib.sha256()
        for tensor in pl_module.state_dict().values():
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        path = self.directory / f"final_{trainer.global_rank}.json"
        path.write_text(json.dumps({"worker": trainer.global_rank, "digest": digest.hexdigest()}))


# The benchmark kills rank 0, and looks for every push that was answered before.
line_file.BATCH_SECONDS = 0.0


def main(directory: Path, options: dict[str, Any]) -> None:
    """Train until the file ``stop`` exists.

    Args:
        directory: for notes, the event file and logs.
        options: ``seconds_per_step`` of each rank, ``width`` of the model, and the strategy's ``local_steps``,
            ``silence_timeout`` and ``max_restarts``.

    """
    logging.basicConfig(format="%(message)s")
    L.seed_everything(1, verbose=False)
    torch.set_num_threads(1)
    seconds = options["seconds_per_step"]
    trainer = L.Trainer(
        strategy=AsyncLocalSGDStrategy(
            local_steps=options["local_steps"],
            exchange=ExchangeOptions(silence_timeout=options["silence_timeout"]),
            max_restarts=options["max_restarts"],
        ),
        accelerator="cpu",
        devices=len(seconds),
        callbacks=[
            EmulatedDevices(seconds),
            StepNotes(directory),
            StopFile(directory),
            AsyncLocalSGDCallback(events=directory / "events.jsonl", max_event_megabytes=None),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        default_root_dir=directory,
        max_steps=-1,
        max_epochs=-1,
    )
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64_000, 8, generator=generator)
    data = TensorDataset(inputs, inputs[:, :1].tanh() + 0.5 * inputs[:, 2:3])
    trainer.fit(Regression(options["width"]), DataLoader(data, batch_size=16, shuffle=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
