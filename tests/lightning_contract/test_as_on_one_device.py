"""A single rank trains as Lightning does on a single device: when it validates, saves and steps, and on what."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch.utils.data import DataLoader, Sampler, TensorDataset


def loader(batches: int, batch_size: int = 1) -> DataLoader[Any]:
    data = torch.randn(batches * batch_size, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(data), batch_size=batch_size)


class Module(L.LightningModule):
    """Notes the size of each batch, the rate and the global step before it, and where it was validated."""

    def __init__(self, interval: str = "epoch") -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 1)
        self.interval = interval
        self.seen: list[tuple[int, int, float]] = []
        self.validated: list[tuple[int, int]] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.note(batch)
        return self.net(batch[0]).square().mean()

    def note(self, batch: Any) -> None:
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.seen.append((len(batch[0]), self.global_step, rate))

    def validation_step(self, batch: Any, index: int) -> None:
        if index == 0:
            self.validated.append((len(self.seen), self.global_step))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}


class Growing(Module):
    """Its data is reloaded for each epoch, and twice as much."""

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(4 * 2**self.trainer.current_epoch)


class ByHand(Module):
    """Accumulates four batches by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        self.note(batch)
        self.manual_backward(self.net(batch[0]).square().mean())
        if index % 4 == 3:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


class TwoOptimizers(ByHand):
    """Both take a step at every batch, of which Lightning counts two."""

    def training_step(self, batch: Any, index: int) -> None:
        self.note(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.net(batch[0]).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=rate) for rate in (0.1, 0.01)]


class Looking(Module):
    """Its own hook steps the scheduler, and looks at the step that it is for."""

    def __init__(self) -> None:
        super().__init__("step")
        self.stepped_at: list[int] = []

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.stepped_at.append(self.trainer.global_step)
        scheduler.step()


class Yields(Sampler[Any]):
    """Claims a length, and yields what it likes."""

    def __init__(self, length: int, made: Callable[[], Iterator[Any]]) -> None:
        self.length = length
        self.made = made

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return self.made()


def fit(
    strategy: str, module: Module, data: DataLoader[Any] | None = None, ckpt_path: Any = None, **options: Any
) -> Any:
    L.seed_everything(3, verbose=False)
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", devices=1, enable_model_summary=False, num_sanity_val_steps=0,
        **{**settings, **options},
    )  # fmt: skip
    trainer.fit(module, data, loader(2), ckpt_path=ckpt_path)
    return module.seen, module.validated, trainer.global_step, trainer.current_epoch


def alike(made: Callable[[], Module], data: Callable[[], DataLoader[Any] | None], **options: Any) -> list[Any]:
    """What both strategies come to, which is the same."""
    ours, theirs = (fit(one, made(), data(), **options) for one in ("async_localsgd", "auto"))
    assert ours == theirs
    return list(ours)


def test_data_that_grows_from_epoch_to_epoch() -> None:
    seen, _, steps, _ = alike(Growing, lambda: None, max_epochs=4, reload_dataloaders_every_n_epochs=1)
    assert (len(seen), steps) == (60, 60)
    assert [rate for _, _, rate in seen].count(0.0125) == 32, "the schedule follows the epochs as they are"


def test_windows_that_a_callback_changes_and_epochs_of_a_schedule() -> None:
    def run(strategy: str) -> Any:
        return fit(
            strategy, Module(), loader(16), max_epochs=4, callbacks=[GradientAccumulationScheduler({0: 4, 2: 2})]
        )

    assert run("async_localsgd") == run("auto")


@pytest.mark.parametrize(
    "options", [{"val_check_interval": 0.5}, {"val_check_interval": 10, "check_val_every_n_epoch": None}]
)
def test_validations_every_so_many_batches(options: dict[str, Any]) -> None:
    _, validated, _, _ = alike(Module, lambda: loader(5), max_epochs=6, accumulate_grad_batches=2, **options)
    assert len(validated) >= 3
    # With manual optimization a batch need not be a step: what is counted differs by the one that is being taken.
    ours, theirs = (fit(one, ByHand(), loader(20), max_epochs=4, **options)[1] for one in ("async_localsgd", "auto"))
    assert [batches for batches, _ in ours] == [batches for batches, _ in theirs] == [*range(10, 81, 10)]


def test_checkpoints_every_so_many_steps_of_two_optimizers(tmp_path: Path) -> None:
    def run(strategy: str) -> list[str]:
        folder = tmp_path / strategy
        saved = ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1)
        fit(strategy, TwoOptimizers(), loader(12), max_steps=24, enable_checkpointing=True, callbacks=[saved])
        return sorted(path.name for path in folder.iterdir())

    assert run("async_localsgd") == run("auto")
    assert len(run("async_localsgd")) >= 6


def test_a_hook_that_steps_a_scheduler_sees_its_step() -> None:
    for strategy in ("async_localsgd", "auto"):
        module = Looking()
        fit(strategy, module, loader(64), max_steps=12)
        assert module.stepped_at == [*range(1, 13)]


@pytest.mark.parametrize(
    ("batch_size", "accumulate"), [(4, 1), (2, 2), (1, 1)], ids=["larger batches", "longer windows", "smaller batches"]
)
def test_a_run_of_epochs_goes_on_with_other_batches(tmp_path: Path, batch_size: int, accumulate: int) -> None:
    found = []
    for strategy in ("async_localsgd", "auto"):
        folder = tmp_path / strategy
        first = {"enable_checkpointing": True, "callbacks": [ModelCheckpoint(folder, save_last=True)]}
        fit(strategy, Module(), loader(16, 2), max_epochs=2, **first)
        module = Module()
        again = fit(
            strategy, module, loader(32 // batch_size, batch_size), folder / "last.ckpt",
            max_epochs=4, accumulate_grad_batches=accumulate,
        )  # fmt: skip
        found.append(again)
    assert found[0] == found[1]
    seen, _, steps, epochs = found[0]
    assert len(seen) == 2 * 32 // batch_size
    assert steps == 32 + 2 * 32 // batch_size // accumulate, "what is left of the run, as it is now"
    assert epochs == 4


@pytest.mark.parametrize(
    "data",
    [
        lambda pairs: DataLoader(pairs, 2, sampler=Yields(16, lambda: iter(range(13)))),
        lambda pairs: DataLoader(pairs, 2, sampler=Yields(16, lambda: iter(range(13))), drop_last=True),
        lambda pairs: DataLoader(pairs, batch_sampler=Yields(8, lambda: iter([[n] for n in range(6)]))),
        lambda pairs: DataLoader(pairs, batch_sampler=Yields(8, lambda: iter([[n] for n in range(10)]))),
        lambda pairs: DataLoader(pairs, 2, sampler=Yields(16, lambda: itertools.cycle(range(16)))),
    ],
    ids=["fewer", "fewer, whole batches", "fewer batches", "more batches", "without an end"],
)
def test_a_sampler_need_not_yield_as_much_as_its_length(data: Callable[[Any], DataLoader[Any]]) -> None:
    pairs = TensorDataset(torch.randn(16, 4))
    ours, theirs, simulated = (
        fit(strategy, Module(), data(pairs), max_epochs=2)
        for strategy in ("async_localsgd", "auto", "async_localsgd_simulated")
    )
    # (Epochs of a schedule are as long as the sampler has said.)
    sizes = [size for size, _, _ in theirs[0]]
    assert [size for size, _, _ in ours[0]] == sizes
    assert ours[1:] == theirs[1:]
    # So it is with several workers, who share what there is.
    assert sorted(size for size, _, _ in simulated[0]) == sorted(sizes)
