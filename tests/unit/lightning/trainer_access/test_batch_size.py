"""Lightning's search for the largest batch size, and what a worker's own accumulation means to a Trainer."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_async_localsgd.lightning.data.batch_sizes import OwnAccumulation
from lightning_async_localsgd.lightning.trainer_access import batch_size
from tests.lightning_models import Regression, loader, quiet_trainer


class Limited(Regression):
    """Has memory for 20 samples."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 8

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if len(batch[0]) > 20:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
        return super().training_step(batch, index)

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(256, self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(16, self.batch_size)


class Search(L.Callback):
    """Searches when Lightning's own callback would."""

    found: int | None = None
    path: Any = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        before = torch.rand(1, generator=torch.Generator().manual_seed(1)), torch.get_rng_state()
        weights = [parameter.clone() for parameter in pl_module.parameters()]
        with batch_size.resuming_later(trainer):
            self.found = batch_size.find_batch_size(trainer, "batch_size")
        self.path = trainer.ckpt_path
        assert torch.equal(torch.get_rng_state(), before[1])
        assert all(torch.equal(one, other) for one, other in zip(weights, pl_module.parameters(), strict=True))


def test_largest_size_that_fits_is_found_and_nothing_else_changes(tmp_path: Path) -> None:
    search, module = Search(), Limited()
    trainer = quiet_trainer("auto", callbacks=[search], max_steps=3, default_root_dir=tmp_path)
    trainer.fit(module)
    assert (search.found, module.batch_size, trainer.global_step) == (16, 16, 3)


def test_run_resumes_from_its_checkpoint_after_a_search(tmp_path: Path) -> None:
    first = quiet_trainer("auto", max_steps=5, default_root_dir=tmp_path)
    first.fit(Limited())
    first.save_checkpoint(tmp_path / "five.ckpt")
    search = Search()
    again = quiet_trainer("auto", callbacks=[search], max_steps=7, default_root_dir=tmp_path)
    steps: list[int] = []
    search.on_train_batch_start = lambda trainer, *_: steps.append(trainer.global_step)  # type: ignore[method-assign]
    again.fit(Limited(), ckpt_path=tmp_path / "five.ckpt")
    assert search.path == tmp_path / "five.ckpt" or str(search.path) == str(tmp_path / "five.ckpt")
    assert steps[-2:] == [5, 6]


def test_own_accumulation_divides_losses_by_itself_and_batches_by_that_of_the_script() -> None:
    own = OwnAccumulation(4, of_script=2)
    assert torch.tensor(8.0) / own == 2.0
    assert 8 / own == 4.0
    assert 5 % own == 1
    again = pickle.loads(pickle.dumps(own))
    assert (again, again.of_script) == (4, 2)


@pytest.mark.parametrize(("own", "steps"), [(1, 16), (4, 4)])
def test_trainer_accumulates_as_many_batches_as_it_is_told_in_training(own: int, steps: int) -> None:
    class Own(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.accumulate_grad_batches = OwnAccumulation(own, of_script=2)
            self.stepping_batches = trainer.estimated_stepping_batches

    callback = Own()
    trainer = quiet_trainer("auto", callbacks=[callback], max_epochs=1, accumulate_grad_batches=2)
    trainer.fit(Regression(), loader(128, 8))
    assert (trainer.global_step, callback.stepping_batches) == (steps, 8)
