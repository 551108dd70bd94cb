"""A run whose ranks have batch sizes of their own: ``python own_batches_job.py OUT JSON``, with options of the run.

Each rank writes to ``OUT/rank_<n>.json`` which samples it has trained on, in which batches, and where it ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_async_localsgd import (
    AsyncLocalSGDCallback,
    AsyncLocalSGDStrategy,
    ExchangeOptions,
    MergeOptions,
    SimulatedAsyncLocalSGDStrategy,
)
from tests.lightning_models import Pace, Regression, cosine, loader, network, quiet_trainer

RANKS = 3
SAMPLES = 600
BATCH = 16
SECONDS = (0.004, 0.008, 0.02)


class Model(Regression):
    """Notes what it trains on. A batch above ``largest`` samples needs more memory than there is."""

    def __init__(self, largest: int | None, batch_size: int, victim: dict[str, int] | None) -> None:
        super().__init__(network(8), torch.optim.AdamW, 1e-2, cosine)
        self.batch_size = batch_size
        self.largest = largest
        self.victim = victim
        self.batches: list[list[int]] = []
        self.steps: list[int] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        if self.largest is not None and len(batch[2]) > self.largest:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
        strategy: Any = self.trainer.strategy
        if strategy.runtime is not None:
            self.batches.append(batch[2].tolist())
            if self.victim == {"rank": self.global_rank, "batch": len(self.batches)}:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, index)

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(self.trainer.global_step)

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(SAMPLES, self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(64, self.batch_size, shuffle=False)


def half_of_it(memory: int) -> int:
    assert memory > 2**28
    return BATCH // 2


def parsed(option: Any) -> Any:
    """Return the strategy's option, of which JSON has another form."""
    if isinstance(option, dict):
        return {int(worker): tuple(size) if isinstance(size, list) else size for worker, size in option.items()}
    return half_of_it if option == "half_of_it" else option


def replay(out: Path, batch_size: Any) -> None:
    strategy = SimulatedAsyncLocalSGDStrategy(
        replay=out / "recording.jsonl", local_steps=5, checkpoint_every=None, batch_size=batch_size
    )
    trainer = quiet_trainer(strategy, max_epochs=2, num_sanity_val_steps=0, default_root_dir=out)
    trainer.fit(Model(None, BATCH, None))


def main(out: Path, options: dict[str, Any]) -> None:
    L.seed_everything(1, verbose=False)
    torch.set_num_threads(1)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    options |= options.get("of_rank", {}).get(str(rank), {})
    callbacks: list[L.Callback] = [
        Pace(SECONDS),
        AsyncLocalSGDCallback(recording=out / "recording.jsonl"),
    ]
    if "save" in options:
        callbacks.append(ModelCheckpoint(dirpath=out, filename="saved", every_n_train_steps=options["save"]))
    given = options.get("strategy", {})
    if options.get("replay"):
        replay(out, parsed(options["batch_size"]))
        return
    strategy = AsyncLocalSGDStrategy(
        **{
            "local_steps": 5,
            "checkpoint_every": None,
            "exchange": ExchangeOptions(start_timeout=60.0, port=options.get("port", 0)),
            "max_restarts": 1,
            **given,
            "merge": MergeOptions(**given.get("merge", {})),
            "batch_size": parsed(options.get("batch_size")),
        }
    )
    trainer = quiet_trainer(
        strategy,
        devices=options.get("ranks", RANKS),
        callbacks=callbacks,
        default_root_dir=out,
        num_sanity_val_steps=0,
        logger=CSVLogger(out, name="", version=""),
        **options.get("trainer", {}),
    )
    module = Model(options.get("largest"), options.get("batch", BATCH), options.get("victim"))
    train = loader(SAMPLES, options.get("batch", BATCH)) if options.get("passes_loader") else None
    trainer.fit(module, train, ckpt_path=options.get("ckpt_path"))
    notes = {
        "batches": module.batches,
        "steps": module.steps,
        "global_step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "rate": trainer.optimizers[0].param_groups[0]["lr"],
        "accumulates": trainer.accumulate_grad_batches,
        "stepping_batches": trainer.estimated_stepping_batches,
        "attribute": module.batch_size,
    }
    with (out / f"rank_{trainer.global_rank}.json").open("w") as file:
        json.dump(notes, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
