"""Simulated workers with their own training data."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_async_localsgd import (
    Arrival,
)
from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy as Simulated
from tests.unit.lightning.simulated.support import Model, NoSchedule, fit, loader


def test_each_worker_trains_on_its_own_loader() -> None:
    shards = [loader(6, seed=n) for n in range(2)]
    batches: dict[int, set[int]] = {0: set(), 1: set()}

    class RecordBatches(Model):
        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            batches[self.trainer.strategy.runtime.worker.number].add(round(float(batch[0].sum()), 3))
            return super().training_step(batch, index)

    L.seed_everything(1, verbose=False)
    numbers: list[int] = []

    def data_of(worker: int) -> DataLoader[Any]:
        numbers.append(worker)
        return DataLoader(shards[worker].dataset, batch_size=8)

    strategy = Simulated([0.1, 0.2], worker_data=data_of, local_steps=4)
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", max_steps=20, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(RecordBatches())  # The trainer has no other training data.
    assert len(batches[0]) == len(batches[1]) == 6
    assert not batches[0] & batches[1]
    assert numbers == [0, 1]


def test_missing_loader_is_an_error_before_training() -> None:
    shards = [loader(6, seed=n) for n in range(3)]
    numbers: list[int] = []

    def data_of(worker: int) -> Any:
        numbers.append(worker)
        return shards[worker]

    schedule = [Arrival(1.0, 0.1), Arrival(2.0, 0.1)]
    module = Model()
    options = {"schedule": schedule, "worker_data": data_of, "local_steps": 4}
    with pytest.raises(ValueError, match=r"worker_data\(3\) failed with IndexError: .* later: 0, 1, 2, 3") as caught:
        fit(Simulated([0.1, 0.2], **options), module=lambda: module)
    assert isinstance(caught.value.__cause__, IndexError)
    assert not module.samples
    shards.append(loader(6, seed=3))
    numbers.clear()
    with pytest.warns(UserWarning, match=r"own training data only defines the length of an epoch"):
        fit(Simulated([0.1, 0.2], **options), module=lambda: module, max_steps=40)
    assert numbers == [0, 1, 2, 3]
    assert sorted(module.rates) == [0, 1, 2, 3]


class Items(IterableDataset[Any]):
    """A dataset without a length, whose batches contain their worker and number."""

    def __init__(self, worker: int, batches: int) -> None:
        self.worker = worker
        self.batches = batches

    def __iter__(self) -> Any:
        for number in range(self.batches):
            for sign in (-1.0, 1.0):  # Two samples for each batch, because BatchNorm needs at least two.
                inputs = torch.full((8,), 0.1 * sign * number)
                yield inputs, inputs[:1], torch.tensor([self.worker, number])


class BatchRecorder(L.Callback):
    """Records the batches of each worker, and the number of validations."""

    def __init__(self) -> None:
        self.batches: dict[int, list[int]] = {}
        self.validations = 0

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
        worker, number = batch[2][0].tolist()
        self.batches.setdefault(worker, []).append(number)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.validations += not trainer.sanity_checking


def test_loaders_without_length_are_read_to_their_end() -> None:
    recorder = BatchRecorder()
    strategy = Simulated([0.1, 0.1], local_steps=3, worker_data=lambda n: DataLoader(Items(n, 6 if n == 0 else 10), 2))
    L.seed_everything(5, verbose=False)
    trainer = L.Trainer(
        strategy=strategy, max_steps=18, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, accelerator="cpu", devices=1, callbacks=[recorder],
    )  # fmt: skip
    trainer.fit(NoSchedule(), val_dataloaders=loader(2, 9))
    assert recorder.batches[0] == list(range(6)) * 3
    assert recorder.batches[1] == [*range(10), *range(8)]
    assert recorder.validations == 3


def test_loader_may_be_longer_than_that_of_worker_0() -> None:
    recorder = BatchRecorder()

    def own(worker: int) -> Any:
        batches = list(Items(worker, 2 if worker == 0 else 10))
        return DataLoader(batches, 2)

    fit(
        Simulated([0.1, 0.1], local_steps=3, worker_data=own),
        module=NoSchedule,
        max_steps=12,
        data=None,
        callbacks=[recorder],
    )
    assert recorder.batches[0] == [0, 1] * 6
    assert recorder.batches[1] == [*range(10), 0, 1]


def test_iterable_dataset_needs_worker_data() -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from loader(4).dataset

    with pytest.raises(ValueError, match=r"a DataLoader whose items cannot be leased.*worker_data=function"):
        fit(Simulated([0.1, 0.2]), data=DataLoader(Stream(), batch_size=8))
    fit(Simulated([0.1, 0.2], worker_data=lambda n: DataLoader(Stream(), batch_size=8)), data=loader(4), max_steps=9)
