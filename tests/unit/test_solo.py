"""A world of one: plain training with the outer optimizer, in this process, with no thread and no socket."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader, TensorDataset

from lightning_async_localsgd import AsyncLocalSGDCallback, AsyncLocalSGDStrategy, DelayedNesterov
from lightning_async_localsgd.exchange import ExchangeError


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
        )
        self.rates: list[float] = []
        self.threads: set[str] = set()
        self.overflow_at: set[int] = set()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        self.threads |= {thread.name for thread in threading.enumerate()}
        loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
        return loss * float("inf") if index in self.overflow_at else loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=200)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(shuffle: bool = True) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(96, 8, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs[:, :1].sin()), batch_size=8, shuffle=shuffle)


def fit(strategy: Any, ckpt_path: Any = None, **options: Any) -> tuple[Model, L.Trainer]:
    L.seed_everything(5, verbose=False)
    module = options.pop("module", None) or Model()
    settings = {"max_steps": 30, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=1, **{**settings, **options})
    trainer.fit(module, loader(), loader(False), ckpt_path=ckpt_path)
    return module, trainer


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("local_steps", [1, 7])
def test_outer_sgd_with_lr_1_is_plain_training_bit_for_bit(local_steps: int) -> None:
    plain, _ = fit("auto", enable_checkpointing=False)
    strategy = AsyncLocalSGDStrategy(local_steps=local_steps, outer_optimizer=partial(torch.optim.SGD, lr=1.0))
    ours, trainer = fit(strategy, enable_checkpointing=False)
    assert equal(plain, ours)
    assert plain.rates == ours.rates
    assert trainer.global_step == 30
    assert not any(name.startswith("async_localsgd") for name in ours.threads)


def test_delayed_nesterov_of_one_worker_is_torch_nesterov_over_rounds() -> None:
    ours, _ = fit(AsyncLocalSGDStrategy(local_steps=6), enable_checkpointing=False)
    other = AsyncLocalSGDStrategy(
        local_steps=6, outer_optimizer=partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
    )
    theirs, _ = fit(other, enable_checkpointing=False)
    assert equal(ours, theirs)


def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path: Any) -> None:
    def strategy() -> AsyncLocalSGDStrategy:
        return AsyncLocalSGDStrategy(local_steps=6, outer_optimizer=DelayedNesterov(lr=0.5))

    whole, _ = fit(strategy(), max_steps=24, enable_checkpointing=False)
    _, trainer = fit(strategy(), max_steps=12, default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    # The first 12 steps are one epoch, so the second begins with the same shuffle in both.
    rest, _ = fit(strategy(), tmp_path / "half.ckpt", max_steps=24, default_root_dir=tmp_path)
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["async_localsgd"]
    assert saved["budget"]["done"] == 12
    assert saved["model"]["version"] == 2
    assert len(rest.rates) == 12
    assert rest.rates == whole.rates[12:]


def test_a_resumed_schedule_ends_where_the_budget_ends(tmp_path: Any) -> None:
    class Exact(Model):
        def configure_optimizers(self) -> Any:
            found = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.OneCycleLR(found["optimizer"], max_lr=1e-2, total_steps=20)
            return {**found, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    steps = {"max_steps": 20, "enable_checkpointing": False, "limit_val_batches": 0}
    whole, _ = fit(AsyncLocalSGDStrategy(local_steps=5), module=Exact(), callbacks=[Save()], **steps)
    # Saved in mid-round, which ended the round: nothing is taken twice.
    rest, _ = fit(AsyncLocalSGDStrategy(local_steps=5), tmp_path / "mid.ckpt", module=Exact(), **steps)
    assert rest.rates == whole.rates[8:]


def test_a_run_interrupted_anywhere_goes_on_as_if_it_had_not_been(tmp_path: Any) -> None:
    """In the middle of an epoch and of a round, with shuffled data and dropout."""

    class Dropping(Model):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = torch.nn.Dropout(0.3)
            self.trained_on: list[float] = []

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            self.trained_on += batch[0][:, 0].tolist()
            return super().training_step([self.dropout(batch[0]), batch[1]], index)

    def strategy() -> AsyncLocalSGDStrategy:
        return AsyncLocalSGDStrategy(local_steps=6, outer_optimizer=DelayedNesterov(lr=0.5))

    def save(path: Any) -> L.Callback:
        return ModelCheckpoint(dirpath=path, filename="{step}", every_n_train_steps=16, save_top_k=-1)

    def run(folder: Any, ckpt_path: Any = None) -> Dropping:
        # A save ends the round, so all of them save.
        options = {"max_steps": 40, "limit_val_batches": 0, "callbacks": [save(folder)]}
        module, _ = fit(strategy(), ckpt_path, module=Dropping(), **options)
        assert isinstance(module, Dropping)
        return module

    whole = run(tmp_path)
    assert len(set(whole.trained_on)) < len(whole.trained_on)  # More than an epoch.
    for at in (16, 32):
        rest = run(tmp_path / str(at), tmp_path / f"step={at}.ckpt")
        assert rest.trained_on == whole.trained_on[8 * at :]
        assert equal(whole, rest)


def test_evaluating_a_checkpoint_does_not_touch_a_later_fit(tmp_path: Any) -> None:
    _, trainer = fit(AsyncLocalSGDStrategy(local_steps=5), max_steps=10, enable_checkpointing=False)
    trainer.save_checkpoint(tmp_path / "ten.ckpt")
    module = Model()
    other = L.Trainer(
        strategy="async_localsgd", accelerator="cpu", devices=1, max_steps=10, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    other.validate(module, loader(False), ckpt_path=tmp_path / "ten.ckpt", verbose=False)
    other.fit(module, loader())
    assert other.global_step == 10


def test_a_stop_waits_for_the_epochs_that_are_asked_for() -> None:
    class Stop(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
            trainer.should_stop = True

    options = {"max_steps": -1, "max_epochs": 9, "min_epochs": 3, "num_sanity_val_steps": 0, "callbacks": [Stop()]}
    _, trainer = fit(AsyncLocalSGDStrategy(local_steps=5), enable_checkpointing=False, **options)
    assert trainer.global_step == 3 * 12


def test_data_that_runs_dry_ends_with_a_clear_error() -> None:
    class Once(torch.utils.data.IterableDataset[Any]):
        def __init__(self) -> None:
            self.left = iter(range(40))

        def __iter__(self) -> Any:
            for _ in self.left:
                yield torch.randn(8), torch.randn(1)

    trainer = L.Trainer(
        strategy="async_localsgd", accelerator="cpu", devices=1, max_steps=100, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="gave no batch in epoch"):
        trainer.fit(Model(), DataLoader(Once(), batch_size=8))


def test_a_step_that_the_gradient_scaler_skips_does_not_count() -> None:
    module = Model()
    module.overflow_at = {2, 5}
    callback = AsyncLocalSGDCallback(table=False)
    seen: dict[str, Any] = {}

    class Look(L.Callback):
        def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            seen["totals"] = trainer.strategy.phase.totals()[0]

    fit(
        AsyncLocalSGDStrategy(local_steps=5), module=module, max_steps=20, enable_checkpointing=False,
        callbacks=[Look(), callback],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))],
    )  # fmt: skip
    # 20 real steps are the budget: the skipped ones (two in each epoch of 12 batches) came on top.
    assert seen["totals"].steps == 20
    assert len(module.rates) == 24


def test_one_batch_that_is_not_finite_costs_its_round() -> None:
    module = Model()
    module.overflow_at = {3}
    fitted, trainer = fit(AsyncLocalSGDStrategy(local_steps=4), module=module, max_steps=12, enable_checkpointing=False)
    assert all(torch.isfinite(tensor).all() for tensor in fitted.state_dict().values())
    assert trainer.global_step == 12


def test_a_worker_that_diverges_ends_with_a_clear_error() -> None:
    module = Model()
    module.overflow_at = set(range(100))
    with pytest.raises(ExchangeError, match=r"worker 0 is quarantined.*5 of its last 5 pushes were refused.*NaN"):
        fit(AsyncLocalSGDStrategy(local_steps=2), module=module, max_steps=100, enable_checkpointing=False)


def test_a_single_worker_hands_in_what_it_has_learned_before_a_validation() -> None:
    states: list[tuple[str, torch.Tensor]] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            states.append(("local", module.net[0].weight.detach().clone()))

        def on_validation_epoch_start(self, trainer: L.Trainer, module: Any) -> None:
            states.append(("shown", module.net[0].weight.detach().clone()))

        def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            states.append(("next", module.net[0].weight.detach().clone()))

    fit(
        AsyncLocalSGDStrategy(local_steps=10), max_steps=20, val_check_interval=5, num_sanity_val_steps=0,
        enable_checkpointing=False, callbacks=[Look()],
    )  # fmt: skip
    start = states[0][1]
    at = next(n for n, (kind, _) in enumerate(states) if kind == "shown")
    # In mid-round, at step 5 of 10: the outer step is taken then, and training goes on from its outcome.
    assert not torch.equal(states[at][1], start)
    assert not torch.equal(states[at][1], states[at - 1][1])
    assert torch.equal(states[at + 1][1], states[at][1])


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_the_progress_bar_shows_the_whole_budget(bar: type[ProgressBar]) -> None:
    seen: list[tuple[float, float]] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            shown = trainer.progress_bar_callback
            if isinstance(shown, TQDMProgressBar):
                seen.append((shown.train_progress_bar.total, shown.train_progress_bar.n))
            else:
                task = shown.progress.tasks[shown.train_progress_bar_id]
                seen.append((task.total, task.completed))

    mine = bar()
    fit(
        AsyncLocalSGDStrategy(local_steps=5), max_steps=30, enable_checkpointing=False, enable_progress_bar=True,
        callbacks=[mine, Look()],
    )  # fmt: skip
    # Twelve batches are an epoch: neither total nor position begins anew with one.
    assert {total for total, _ in seen} == {30}
    positions = [position for _, position in seen]
    assert positions == sorted(positions)
    assert positions[-1] == 30
    assert type(mine) is bar
