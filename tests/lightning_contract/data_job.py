"""Records the training data of each rank: ``python data_job.py OUT JSON``.

The option ``cases`` names the cases to run, one after the other in the same processes; by default all of ``CASES``.
Each rank writes ``OUT/<case>_<rank>.json``. The other options are those of :func:`run`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    WeightedRandomSampler,
)

from lightning_async_localsgd import AsyncLocalSGDStrategy
from tests.lightning_models import PacedRegression, quiet_trainer

SECONDS = (0.004, 0.02)
"""Minimum seconds of a batch, by rank."""


class Numbers(Dataset[torch.Tensor]):
    """A dataset whose samples are numbers."""

    def __init__(self, samples: int, first: int = 0) -> None:
        self.samples = samples
        self.first = first

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(float(self.first + index))


class Stream(IterableDataset[torch.Tensor]):
    """An iterable dataset with the same samples on all ranks."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(64.0))


class Backwards(SequentialSampler):
    """A sampler written by a user."""

    def __iter__(self) -> Iterator[int]:
        return iter(reversed(range(len(self.data_source))))


class Pairs(BatchSampler):
    """A batch sampler written by a user: the sample at i from the start, and the one at i from the end."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[list[int]]:
        return ([i, self.samples - 1 - i] for i in range(self.samples // 2))

    def __len__(self) -> int:
        return self.samples // 2


class Model(PacedRegression):
    """Records the training data by epoch. The loss does not depend on it."""

    def __init__(self, dies_at: int = 0, out: Path = Path()) -> None:
        super().__init__(SECONDS, torch.nn.Linear(1, 1), lr=0.01)
        self.dies_at = dies_at
        self.out = out
        self.seen: list[list[Any]] = []
        self.epochs: list[int] = []

    def loss(self, batch: Any) -> torch.Tensor:
        if not self.seen:
            self.seen.append([])  # Lightning does not call on_train_epoch_start if it resumes within an epoch.
        self.seen[-1].append(
            {key: value.tolist() for key, value in batch.items()} if isinstance(batch, dict) else batch.tolist()
        )
        if self.global_rank == 1 and sum(map(len, self.seen)) == self.dies_at:
            (self.out / "dead_1.json").write_text(json.dumps({"seen": self.seen}))
            os.kill(os.getpid(), signal.SIGKILL)
        return self.net(torch.ones(1)).square().sum()

    def on_train_epoch_start(self) -> None:
        self.seen.append([])
        self.epochs.append(self.current_epoch)


class Module(L.LightningDataModule):
    """Has another dataset in each epoch, and records its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.hooks: list[str] = []

    def prepare_data(self) -> None:
        self.hooks.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.hooks.append("setup " + stage)

    def train_dataloader(self) -> DataLoader[Any]:
        self.hooks.append("train_dataloader")
        assert self.trainer is not None
        return DataLoader(Numbers(20, first=100 * self.trainer.current_epoch), batch_size=2, shuffle=True)

    def teardown(self, stage: str) -> None:
        self.hooks.append("teardown " + stage)


class Save(L.Callback):
    """Saves a checkpoint within the first epoch."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 0 and trainer.global_step == 6:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "middle.ckpt")


class Streamed(L.LightningDataModule):
    """The recipe of docs/lightning.md, with a stream that needs no network."""

    def train_dataloader(self) -> DataLoader[Any]:
        from datasets import Dataset as Table
        from datasets.distributed import split_dataset_by_node

        assert self.trainer is not None
        stream = Table.from_dict({"number": [float(n) for n in range(96)]}).to_iterable_dataset(num_shards=4)
        mine = split_dataset_by_node(stream, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
        return DataLoader(mine, batch_size=4, collate_fn=lambda rows: torch.tensor([row["number"] for row in rows]))


def shuffled(**options: Any) -> DataLoader[Any]:
    return DataLoader(Numbers(103), batch_size=4, shuffle=True, **options)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "shuffled": (shuffled, {"max_epochs": 3}),
    "shuffled_again": (shuffled, {"max_epochs": 1}),
    "drop_last": (lambda: shuffled(drop_last=True), {"max_epochs": 2}),
    "workers": (lambda: shuffled(num_workers=2, prefetch_factor=2), {"max_epochs": 2}),
    "long": (lambda: shuffled(num_workers=2), {"max_epochs": 6}),
    "persistent": (
        lambda: shuffled(num_workers=1, persistent_workers=True, drop_last=True),
        {"max_epochs": 3},
    ),
    "in_order": (lambda: DataLoader(Numbers(40), batch_size=2), {"max_epochs": 1}),
    "unbatched": (lambda: DataLoader(Numbers(31), batch_size=None, shuffle=True), {"max_epochs": 2}),
    "own_sampler": (lambda: DataLoader(Numbers(40), batch_size=2, sampler=Backwards(range(40))), {"max_epochs": 1}),
    "own_batch_sampler": (lambda: DataLoader(Numbers(40), batch_sampler=Pairs(40)), {"max_epochs": 2}),
    "weighted": (
        lambda: DataLoader(Numbers(40), batch_size=2, sampler=WeightedRandomSampler([1.0] * 40, 60)),
        {"max_epochs": 1},
    ),
    "saved": (shuffled, {"max_epochs": 2, "enable_checkpointing": True, "callbacks": [Save()]}),
    "limited": (shuffled, {"max_epochs": 2, "limit_train_batches": 5}),
    "limited_share": (shuffled, {"max_epochs": 1, "limit_train_batches": 0.5}),
    "overfit": (shuffled, {"max_epochs": 2, "overfit_batches": 3}),
    "fast_dev_run": (shuffled, {"fast_dev_run": 3}),
    "accumulated": (lambda: DataLoader(Numbers(98), batch_size=4), {"max_epochs": 2, "accumulate_grad_batches": 3}),
    "cycled": (
        lambda: {"long": DataLoader(Numbers(60), batch_size=3), "short": DataLoader(Numbers(8), batch_size=2)},
        {"max_epochs": 2},
    ),
    "shortest": (
        lambda: CombinedLoader(
            {"long": DataLoader(Numbers(60), batch_size=2), "short": DataLoader(Numbers(20), batch_size=2)}, "min_size"
        ),
        {"max_epochs": 2},
    ),
    "by_steps": (shuffled, {"max_steps": 30}),
    "left_alone": (lambda: DataLoader(Numbers(20), batch_size=2), {"max_steps": 10, "use_distributed_sampler": False}),
    "stream": (lambda: DataLoader(Stream(), batch_size=4), {"max_steps": 12}),
    "streamed": (Streamed, {"max_steps": 20}),
    "reloaded": (Module, {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}),
}
REJECTED: dict[str, tuple[Any, dict[str, Any]]] = {
    "one_batch": (lambda: DataLoader(Numbers(4), batch_size=4), {"max_steps": 30}),
    "one_step": (lambda: DataLoader(Numbers(10), batch_size=4), {"max_steps": 30, "accumulate_grad_batches": 3}),
}


def run(case: str, out: Path, dies_at: int = 0, ckpt_path: str | None = None, devices: int = 2) -> None:
    """Run a case.

    Args:
        case: its name.
        out: folder of the notes.
        dies_at: the batch at which rank 1 writes its notes and kills itself; 0 means never.
        ckpt_path: checkpoint to resume from.
        devices: number of ranks.

    """
    make, options = (CASES | REJECTED)[case]
    L.seed_everything(7, verbose=False)
    trainer = quiet_trainer(
        AsyncLocalSGDStrategy(local_steps=4, max_restarts=0),
        devices=devices,
        logger=CSVLogger(out, name="", version="") if dies_at else False,
        default_root_dir=out,
        **options,
    )
    model, data = Model(dies_at, out), make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = {"datamodule": data} if isinstance(data, L.LightningDataModule) else {"train_dataloaders": data}
        trainer.fit(model, **given, ckpt_path=ckpt_path)
    (out / f"{case}_{trainer.global_rank}.json").write_text(
        json.dumps(
            {
                "seen": model.seen,
                "epochs": model.epochs,
                "hooks": getattr(data, "hooks", []),
                "global_step": trainer.global_step,
                "current_epoch": trainer.current_epoch,
                "warnings": [str(warning.message) for warning in caught],
            }
        )
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = json.loads(sys.argv[2])
    for name in given.get("cases", CASES):
        more = {option: given[option] for option in ("dies_at", "ckpt_path", "devices") if option in given}
        run(name, Path(sys.argv[1]), **more)
