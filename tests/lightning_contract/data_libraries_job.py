"""Iterable data that splits itself among ranks: ``python data_libraries_job.py OUT LIBRARY STRATEGY WORKERS``.

Each rank writes the samples of its training, and rank 0 those of its validations, to ``OUT/<rank>.json``. The files
of the data are in ``OUT/files``.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tests.lightning_models import quiet_trainer

SAMPLES = 64
SHARDS = 8


class Asking(IterableDataset[int]):
    """Splits itself by what ``torch.distributed`` or the environment tells."""

    def __init__(self, environment: bool) -> None:
        self.environment = environment

    def __iter__(self) -> Iterator[int]:
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if self.environment:
            rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        info = get_worker_info()
        part, parts = (0, 1) if info is None else (info.id, info.num_workers)
        return iter(range(SAMPLES)[rank * parts + part :: ranks * parts])


def write_webdataset(folder: Path) -> None:
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for sample in range(shard, SAMPLES, SHARDS):
                text = str(sample).encode()
                entry = tarfile.TarInfo(f"{sample}.number")
                entry.size = len(text)
                tar.addfile(entry, io.BytesIO(text))


def webdataset(folder: Path, workers: int) -> Any:
    import webdataset as wds

    urls = [str(folder / f"{shard}.tar") for shard in range(SHARDS)]
    data = wds.WebDataset(urls, nodesplitter=wds.split_by_node, shardshuffle=False).map(lambda row: int(row["number"]))
    return DataLoader(data.batched(4, collation_fn=torch.tensor), batch_size=None, num_workers=workers)


def write_litdata(folder: Path) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_size=SHARDS)
    for sample in range(SAMPLES):
        writer[sample] = sample
    writer.done()
    writer.merge()


def litdata(folder: Path, workers: int) -> Any:
    from litdata import StreamingDataLoader, StreamingDataset

    return StreamingDataLoader(StreamingDataset(str(folder), drop_last=False), batch_size=4, num_workers=workers)


def asking(folder: Path, workers: int, environment: bool = False) -> Any:
    return DataLoader(Asking(environment), batch_size=4, num_workers=workers)


LOADERS = {
    "torch.distributed": asking,
    "environment": partial(asking, environment=True),
    "webdataset": webdataset,
    "litdata": litdata,
}
"""Functions that return a loader of all samples, from the files in a folder, by the name of the library."""

WRITERS = {"webdataset": write_webdataset, "litdata": write_litdata}
"""Functions that write the files."""


class Data(L.LightningDataModule):
    """The same samples for training and validation.

    LitData looks for the rank when a dataset is made, so datasets are made in these hooks, as for DDP.
    """

    def __init__(self, library: str, folder: Path, workers: int) -> None:
        super().__init__()
        self.make = partial(LOADERS[library], folder, workers)

    def train_dataloader(self) -> Any:
        return self.make()

    val_dataloader = train_dataloader


class Model(L.LightningModule):
    """Trains on nothing, and writes what it has seen."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.out = out
        self.trained: list[list[int]] = []
        self.validated: list[list[int]] = []

    def on_train_epoch_start(self) -> None:
        self.trained.append([])

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        self.trained[-1] += batch.tolist()
        return self.weight.square().sum()

    def on_validation_epoch_start(self) -> None:
        self.validated.append([])

    def validation_step(self, batch: torch.Tensor) -> None:
        self.validated[-1] += batch.tolist()

    def on_fit_end(self) -> None:
        seen = {"trained": self.trained, "validated": self.validated}
        (self.out / f"{self.global_rank}.json").write_text(json.dumps(seen))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, library, strategy, workers = Path(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4])
    trainer = quiet_trainer(strategy, devices=2, max_steps=64, default_root_dir=out, limit_val_batches=1.0)
    trainer.fit(Model(out), datamodule=Data(library, out / "files", workers))
