"""What trainer_access does to a Trainer's data."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomIterableDataset
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, DistributedSampler

from lightning_async_localsgd.lightning.trainer_access import data
from tests.unit.lightning.trainer_access.support import Model, at, fit, loader, trainer_with


class WithoutData(Model):
    train_dataloader = L.LightningModule.train_dataloader


def test_training_data_can_be_set_where_none_is_defined() -> None:
    class Provides(SingleDeviceStrategy):
        def connect(self, model: Any) -> None:
            super().connect(model)
            trainer = model.trainer
            defined.append(data.has_training_data(trainer))
            data.set_training_data(trainer, loader(3))
            defined.append(data.has_training_data(trainer))

    defined: list[bool] = []
    trainer = trainer_with(strategy=Provides(torch.device("cpu")))
    trainer.fit(WithoutData())
    assert defined == [False, True]
    assert trainer.global_step == 3
    defined.clear()
    trainer_with(strategy=Provides(torch.device("cpu"))).fit(Model())
    assert defined == [True, True]


def test_combined_loader_is_none_before_lightning_sets_up_the_data() -> None:
    callback, results = at(setup=data.combined_loader, on_train_start=data.combined_loader)
    fit(callback)
    assert results["setup"] == [None]
    [combined] = results["on_train_start"]
    assert isinstance(combined, CombinedLoader)
    assert [len(part) for part in combined.flattened] == [4]


def test_data_fetcher_reports_the_last_batch() -> None:
    callback, results = at(on_train_batch_end=lambda trainer: data.data_fetcher(trainer).done)
    fit(callback, batches=3)
    assert results["on_train_batch_end"] == [False, False, True]


def test_fetchers_are_chosen_by_the_data_and_the_module() -> None:
    class TakesBatches(BoringModel):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            batch, *_ = next(dataloader_iter)
            return self.step(batch)

    callback, results = at(on_train_start=data.data_fetcher)
    fit(callback)
    fit(callback, module=TakesBatches())
    trainer_with(callback, max_steps=2).fit(Model(), DataLoader(RandomIterableDataset(32, 4)))
    usual, of_module, of_iterable = results["on_train_start"]
    assert all(isinstance(fetcher, data.DataFetcher) for fetcher in (usual, of_module, of_iterable))
    assert isinstance(of_module, data.DataLoaderIterDataFetcher)
    assert isinstance(of_iterable, data.PrefetchDataFetcher)
    assert of_iterable.prefetch_batches == 1


def test_training_data_is_set_up_again_when_reloaded() -> None:
    class Counts(Model):
        loaders = 0

        def train_dataloader(self) -> Any:
            self.loaders += 1
            return loader(4)

    module = Counts()

    def reload(trainer: L.Trainer) -> bool:
        before = data.combined_loader(trainer)
        data.reload_training_data(trainer)
        return data.combined_loader(trainer) is not before

    callback, results = at(on_train_start=reload)
    trainer = trainer_with(callback)
    trainer.fit(module)
    assert results["on_train_start"] == [True]
    assert module.loaders == 2
    assert trainer.global_step == 4


class OnFirst(Model):
    """Trains on the first of several loaders."""

    def training_step(self, batches: Any, batch_idx: int) -> Any:
        return super().training_step(batches[0] if batches[0] is not None else batches[1], batch_idx)


def test_loaders_are_combined_in_the_users_mode() -> None:
    for mode, batches in (("min_size", 2), ("max_size", 5)):
        combined = CombinedLoader([loader(2), loader(5)], mode)  # type: ignore[arg-type] # one of the modes
        assert data.loader_mode(combined) == mode
        trainer = trainer_with()
        trainer.fit(OnFirst(), combined)
        assert trainer.num_training_batches == batches


def test_other_loaders_are_combined_in_the_same_way_and_iterated_independently() -> None:
    combined = CombinedLoader({"a": [1, 2, 3], "b": [4, 5]}, "min_size")
    iter(combined)
    assert next(combined)[0] == {"a": 1, "b": 4}
    other = data.with_loaders(combined, [[6, 7], [8, 9]])
    assert [batch for batch, *_ in other] == [{"a": 6, "b": 8}, {"a": 7, "b": 9}]
    assert next(combined)[0] == {"a": 2, "b": 5}


def test_samplers_are_replaced_only_with_the_distributed_sampler_option() -> None:
    trainer = trainer_with(strategy="ddp", devices=2)
    plain = loader(4)
    process = trainer._data_connector._prepare_dataloader
    assert data.set_distributed_sampler(trainer, False)
    assert process(plain, shuffle=True, mode="train") is plain
    assert not data.set_distributed_sampler(trainer, True)
    assert isinstance(process(plain, shuffle=True, mode="train").sampler, DistributedSampler)


def test_loader_can_be_split_among_ranks_without_the_distributed_sampler_option() -> None:
    trainer = trainer_with(strategy="ddp", devices=2, use_distributed_sampler=False)
    split: Any = data.split_among_ranks(trainer, loader(4))
    assert isinstance(split.sampler, DistributedSampler)
    assert (split.sampler.num_replicas, split.sampler.rank) == (2, 0)
    assert len(split) == 2
    assert not data.set_distributed_sampler(trainer, False), "the option is as before"
    numbers = [1, 2, 3]
    assert data.split_among_ranks(trainer, numbers) is numbers


def test_loader_of_a_hook_can_be_asked_for_again() -> None:
    class Asks(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.is_hook = data.data_is_a_hook(trainer)
            before = data.combined_loader(trainer)
            data.forget_data(trainer)
            assert data.combined_loader(trainer) is None
            trainer.fit_loop.setup_data()
            assert data.combined_loader(trainer) is not before

    for given in (None, loader(3)):
        callback = Asks()
        trainer_with(callback, max_steps=1).fit(Model(), given)
        assert callback.is_hook == (given is None)
