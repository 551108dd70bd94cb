"""Runs that save, resume and sample in ways that others have reported as broken: ``python continuing_job.py OUT``.

Each of the two ranks writes what it noted to ``OUT/rank_<n>.json``, by case.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler

from lightning_async_localsgd import AsyncLocalSGDStrategy
from tests.lightning_models import quiet_trainer

SECONDS = (0.002, 0.006)
"""Minimum seconds of a local step, by rank."""

SAMPLES = 64
BATCH = 2

CASES: dict[str, Callable[[Path], dict[str, Any]]] = {}


def case(function: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    """Register a case under the name of its function."""
    CASES[function.__name__] = function
    return function


class Numbers(Dataset[Tensor]):
    """A dataset whose samples are numbers."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(float(index))


class Model(L.LightningModule):
    """Notes epoch, index, global step, samples and learning rate of each batch. The learning rate shows its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[list[Any]] = []
        self.validated: list[list[float]] = []

    def loss(self, batch: Tensor) -> Tensor:
        return self.layer(batch[:, None] / SAMPLES).square().mean()

    def note(self, batch: Tensor, batch_idx: int) -> None:
        time.sleep(SECONDS[self.global_rank])
        schedules = self.trainer.lr_scheduler_configs
        steps = schedules[0].scheduler.last_epoch if schedules else 0
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        assert not schedules or rate == 1 / (1 + steps)
        self.seen.append([self.current_epoch, batch_idx, self.trainer.global_step, batch.tolist(), steps])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.note(batch, batch_idx)
        self.log("number", batch.mean(), on_step=False, on_epoch=True, batch_size=len(batch))
        self.log("samples", float(len(batch)), on_step=False, on_epoch=True, reduce_fx="sum")
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(batch.tolist())
        self.log("validated", float(self.trainer.global_step))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda steps: 1 / (1 + steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Numbers(), batch_size=BATCH, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Numbers(8), batch_size=BATCH)


class TwoOptimizers(Model):
    """Steps two optimizers for each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        self.note(batch, batch_idx)
        for optimizer, layer in zip(self.optimizers(), (self.layer, self.other), strict=True):  # type: ignore[arg-type]
            optimizer.zero_grad()
            self.manual_backward(layer(batch[:, None] / SAMPLES).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.layer, self.other)]


class Epochs(Sampler[int]):
    """A sampler with an order of its own in each epoch, inside of a wrapper."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(order_of(self.epoch))

    def __len__(self) -> int:
        return SAMPLES


def order_of(epoch: int) -> list[int]:
    """Return the order of the sampler :class:`Epochs`."""
    return torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(100 + epoch)).tolist()


class BatchesOfBatches:
    """A batch sampler that is none for Lightning: its class does not derive from torch's."""

    def __init__(self, inner: BatchSampler, times: int) -> None:
        self.inner = inner
        self.times = times

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(self.inner)
        for first in range(0, len(batches), self.times):
            yield [index for batch in batches[first : first + self.times] for index in batch]

    def __len__(self) -> int:
        return len(self.inner) // self.times


class Groups(BatchSampler):
    """A batch sampler that cannot be made again from a sampler, a batch size and ``drop_last``."""

    def __init__(self, groups: list[list[int]], seed: int) -> None:
        self.groups = groups
        self.seed = seed

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.groups

    def __len__(self) -> int:
        return len(self.groups)


def fit(out: Path, module: Model, *callbacks: L.Callback, **options: Any) -> dict[str, Any]:
    """Train, and return what this rank has noted."""
    given = {name: options.pop(name) for name in ("ckpt_path", "train_dataloaders") if name in options}
    strategy = options.pop("strategy", None) or AsyncLocalSGDStrategy(local_steps=2)
    trainer = quiet_trainer(
        strategy, devices=2, callbacks=list(callbacks), default_root_dir=out, num_sanity_val_steps=0, **options
    )
    trainer.fit(module, **given)
    return {"seen": module.seen, "validated": module.validated, "global_step": trainer.global_step}


def every(out: Path, steps: int) -> ModelCheckpoint:
    return ModelCheckpoint(out, filename="{step}", every_n_train_steps=steps, save_top_k=-1)


@case
def within_an_epoch(out: Path) -> dict[str, Any]:
    L.seed_everything(3, verbose=False)
    options: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 2, "val_check_interval": 0.5}
    whole = fit(out, Model(), every(out / "whole", 1), **options)
    resumed = fit(out, Model(), every(out / "resumed", 1), ckpt_path=out / "whole" / "step=3.ckpt", **options)
    return {"whole": whole, "resumed": resumed}


@case
def last(out: Path) -> dict[str, Any]:
    noted: list[Any] = []
    for epochs in (1, 2, 3):
        keep = ModelCheckpoint(out / "kept", filename="{epoch}", monitor="validated", save_last=True, save_top_k=1)
        found = fit(out, Model(), keep, max_epochs=epochs, ckpt_path=None if epochs == 1 else "last")
        paths = [Path(path).name for path in (keep.best_model_path, keep.last_model_path)]
        noted.append({**found, "files": sorted(path.name for path in (out / "kept").iterdir()), "paths": paths})
    return {"fits": noted}


@case
def best_written_later(out: Path) -> dict[str, Any]:
    keep = ModelCheckpoint(
        out / "kept", filename="{step}", monitor="step", mode="max", save_last=True, save_top_k=2, every_n_train_steps=1
    )
    strategy = AsyncLocalSGDStrategy(local_steps=2, checkpoint_every=1)
    fit(out, Model(), keep, strategy=strategy, max_epochs=1, plugins=[AsyncCheckpointIO()])
    return {"best": sorted(Path(path).name for path in keep.best_k_models)}


@case
def two_optimizers(out: Path) -> dict[str, Any]:
    return fit(out, TwoOptimizers(), every(out / "kept", 8), max_epochs=2)


@case
def epoch_means(out: Path) -> dict[str, Any]:
    logger = CSVLogger(out, name="", version="")
    return fit(out, Model(), max_epochs=3, logger=logger, enable_checkpointing=False, limit_val_batches=0)


@case
def set_epoch(out: Path) -> dict[str, Any]:
    noted: dict[str, Any] = {}
    for name, path in (("whole", None), ("resumed", out / "whole" / "epoch=0.ckpt")):
        keep = ModelCheckpoint(out / name, filename="{epoch}", save_top_k=-1)
        loader = DataLoader(Numbers(), batch_size=BATCH, sampler=Epochs(), num_workers=1)
        options: dict[str, Any] = {"max_epochs": 3, "limit_val_batches": 0, "train_dataloaders": loader}
        noted[name] = fit(out, Model(), keep, ckpt_path=path, **options)
    return noted


@case
def batch_samplers(out: Path) -> dict[str, Any]:
    pairs = BatchSampler(SequentialSampler(range(SAMPLES)), BATCH, False)
    samplers: dict[str, Any] = {
        "batches of batches": BatchesOfBatches(pairs, 2),
        "groups": Groups([[index, index + 1] for index in range(0, SAMPLES, 2)], seed=1),
    }
    return {
        name: fit(
            out, Model(), max_epochs=2, limit_val_batches=0, enable_checkpointing=False,
            train_dataloaders=DataLoader(Numbers(), batch_sampler=sampler),
        )
        for name, sampler in samplers.items()
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    noted = {name: run(folder / name) for name, run in CASES.items()}
    (folder / f"rank_{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(noted))
