"""A single rank trains like Lightning on a single device: data, validations, checkpoints and schedules."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader, Sampler

from lightning_async_localsgd import AsyncLocalSGDStrategy
from tests.lightning_models import Regression, loader, quiet_trainer, regression_data


class Module(Regression):
    """Records the size of each batch, the global step and the rate before it, and where it was validated.

    Args:
        interval: interval of the schedule, which halves the rate.

    """

    def __init__(self, interval: str = "epoch") -> None:
        super().__init__(torch.nn.Linear(8, 1), lr=0.1)
        self.interval = interval
        self.seen: list[tuple[int, int, float]] = []
        self.validated: list[tuple[int, int]] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.record(batch)
        return self.loss(batch)

    def record(self, batch: Any) -> None:
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.seen.append((len(batch[0]), self.global_step, rate))

    def validation_step(self, batch: Any, index: int) -> None:
        if index == 0:
            self.validated.append((len(self.seen), self.global_step))

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}


def batches_of(count: int, batch_size: int = 1) -> DataLoader[Any]:
    return loader(count * batch_size, batch_size, shuffle=False)


class Growing(Module):
    """Has twice as much data in each epoch as in the one before."""

    def train_dataloader(self) -> DataLoader[Any]:
        return batches_of(4 * 2**self.trainer.current_epoch)


class ByHand(Module):
    """Accumulates four batches with manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        self.record(batch)
        self.manual_backward(self.loss(batch))
        if index % 4 == 3:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


class TwoOptimizers(ByHand):
    """Steps both of its optimizers in each batch. Lightning counts two steps."""

    def training_step(self, batch: Any, index: int) -> None:
        self.record(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=rate) for rate in (0.1, 0.01)]


class SteppingItsScheduler(Module):
    """Steps its scheduler in the hook for this, and records the global step there."""

    def __init__(self) -> None:
        super().__init__("step")
        self.stepped_at: list[int] = []

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.stepped_at.append(self.trainer.global_step)
        scheduler.step()


class Yields(Sampler[Any]):
    """A sampler whose items need not match its length."""

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
    trainer = quiet_trainer(strategy, num_sanity_val_steps=0, **options)
    trainer.fit(module, data, batches_of(2), ckpt_path=ckpt_path)
    return module.seen, module.validated, trainer.global_step, trainer.current_epoch


def fit_both(made: Callable[[], Module], data: Callable[[], DataLoader[Any] | None], **options: Any) -> list[Any]:
    """Train with this strategy and with that of a single device. Return the result, which must be the same."""
    ours, theirs = (fit(strategy, made(), data(), **options) for strategy in ("async_localsgd", "auto"))
    assert ours == theirs
    return list(ours)


def test_data_may_grow_from_epoch_to_epoch() -> None:
    seen, _, steps, _ = fit_both(Growing, lambda: None, max_epochs=4, reload_dataloaders_every_n_epochs=1)
    assert (len(seen), steps) == (60, 60)
    assert [rate for _, _, rate in seen].count(0.0125) == 32, "the schedule follows the actual epochs"


def test_callback_may_change_the_number_of_accumulated_batches() -> None:
    def run(strategy: str) -> Any:
        return fit(
            strategy, Module(), batches_of(16), max_epochs=4, callbacks=[GradientAccumulationScheduler({0: 4, 2: 2})]
        )

    assert run("async_localsgd") == run("auto")


@pytest.mark.parametrize(
    "options", [{"val_check_interval": 0.5}, {"val_check_interval": 10, "check_val_every_n_epoch": None}]
)
def test_validation_after_a_number_of_batches(options: dict[str, Any]) -> None:
    _, validated, _, _ = fit_both(Module, lambda: batches_of(5), max_epochs=6, accumulate_grad_batches=2, **options)
    assert len(validated) >= 3
    # With manual optimization, the recorded global steps differ by the current step, because a batch need not be one.
    strategies = ("async_localsgd", "auto")
    ours, theirs = (fit(name, ByHand(), batches_of(20), max_epochs=4, **options)[1] for name in strategies)
    assert [batches for batches, _ in ours] == [batches for batches, _ in theirs] == [*range(10, 81, 10)]


def test_checkpoints_after_a_number_of_steps_of_two_optimizers(tmp_path: Path) -> None:
    def run(strategy: str) -> list[str]:
        folder = tmp_path / strategy
        saved = ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1)
        fit(strategy, TwoOptimizers(), batches_of(12), max_steps=24, callbacks=[saved])
        return sorted(path.name for path in folder.iterdir())

    assert run("async_localsgd") == run("auto")
    assert len(run("async_localsgd")) >= 6


def test_hook_that_steps_a_scheduler_sees_the_new_global_step() -> None:
    for strategy in ("async_localsgd", "auto"):
        module = SteppingItsScheduler()
        fit(strategy, module, batches_of(64), max_steps=12)
        assert module.stepped_at == [*range(1, 13)]


@pytest.mark.parametrize(
    ("batch_size", "accumulate"), [(4, 1), (2, 2), (1, 1)], ids=["larger batches", "longer windows", "smaller batches"]
)
def test_run_of_epochs_resumes_with_other_batches(tmp_path: Path, batch_size: int, accumulate: int) -> None:
    found = []
    for strategy in ("async_localsgd", "auto"):
        folder = tmp_path / strategy
        first = {"callbacks": [ModelCheckpoint(folder, save_last=True)]}
        fit(strategy, Module(), batches_of(16, 2), max_epochs=2, **first)
        module = Module()
        again = fit(
            strategy, module, batches_of(32 // batch_size, batch_size), folder / "last.ckpt",
            max_epochs=4, accumulate_grad_batches=accumulate,
        )  # fmt: skip
        found.append(again)
    assert found[0] == found[1]
    seen, _, steps, epochs = found[0]
    assert len(seen) == 2 * 32 // batch_size
    assert steps == 32 + 2 * 32 // batch_size // accumulate, "the remaining epochs have the new number of steps"
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
def test_sampler_may_yield_another_number_of_items_than_its_length(data: Callable[[Any], DataLoader[Any]]) -> None:
    pairs = regression_data(16)
    ours, theirs, simulated = (
        fit(strategy, Module(), data(pairs), max_epochs=2)
        for strategy in ("async_localsgd", "auto", "async_localsgd_simulated")
    )
    # Rates are not compared, because the length of the sampler defines the epochs of a schedule.
    sizes = [size for size, _, _ in theirs[0]]
    assert [size for size, _, _ in ours[0]] == sizes
    assert ours[1:] == theirs[1:]
    # Several workers share the same items.
    assert sorted(size for size, _, _ in simulated[0]) == sorted(sizes)


class BufferModel(BoringModel):
    """Changes a buffer in validation, and uses the buffer in training afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.inference: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.inference += [tensor.is_inference() for tensor in (*self.parameters(), *self.buffers())]
        return {"loss": (self(batch) * self.scale).sum()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        # In fit, and with a gloo process group, Lightning uses no_grad instead of inference mode.
        assert not torch.is_inference_mode_enabled()
        self(batch)
        self.scale.mul_(0.5)


@pytest.mark.parametrize("inference_mode", [True, False])
def test_validation_in_fit_leaves_no_inference_tensors(tmp_path: Path, inference_mode: bool) -> None:
    trainer = quiet_trainer(
        AsyncLocalSGDStrategy(local_steps=3),
        inference_mode=inference_mode,
        max_steps=20,
        val_check_interval=2,
        limit_train_batches=8,
        limit_val_batches=1,
        num_sanity_val_steps=1,
        enable_checkpointing=True,
        default_root_dir=tmp_path,
    )
    module = BufferModel()
    trainer.fit(module)
    assert trainer.global_step == 20
    trainer.validate(module, verbose=False)
    assert not any(module.inference)
    # Saved tensors must be usable outside of inference mode, too.
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    for name, tensor in saved["state_dict"].items():
        assert not tensor.is_inference(), name
    trainer.fit_loop.epoch_loop.max_steps = 30
    trainer.fit(module)
    assert trainer.global_step == 30
