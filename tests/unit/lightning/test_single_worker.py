"""A single worker: training with the outer optimizer in one process, without threads and sockets."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

from lightning_async_localsgd import AsyncLocalSGDCallback, AsyncLocalSGDStrategy, DelayedNesterov
from lightning_async_localsgd.protocol.exchange import ExchangeError
from tests.lightning_models import Regression, loader, network, quiet_trainer, same_weights, sine


class Model(Regression):
    """A regression with BatchNorm. Records learning rates and threads, and returns infinite losses if requested."""

    def __init__(self) -> None:
        super().__init__(network(batch_norm=True), torch.optim.AdamW, lr=1e-2)
        self.rates: list[float] = []
        self.threads: set[str] = set()
        self.overflow_at: set[int] = set()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        self.threads |= {thread.name for thread in threading.enumerate()}
        loss = super().training_step(batch, index)
        return loss * float("inf") if index in self.overflow_at else loss

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.lr, total_steps=200)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def data(shuffle: bool = True) -> DataLoader[Any]:
    return loader(96, shuffle=shuffle, target=sine)


def fit(strategy: Any, ckpt_path: Any = None, **options: Any) -> tuple[Model, L.Trainer]:
    L.seed_everything(5, verbose=False)
    module = options.pop("module", None) or Model()
    trainer = quiet_trainer(strategy, **{"max_steps": 30, "enable_checkpointing": True, **options})
    trainer.fit(module, data(), data(False), ckpt_path=ckpt_path)
    return module, trainer


@pytest.mark.parametrize(
    "strategy",
    [
        AsyncLocalSGDStrategy(),
        AsyncLocalSGDStrategy(local_steps=7),
        AsyncLocalSGDStrategy(local_steps=1, outer_optimizer=partial(torch.optim.SGD, lr=1.0)),
        AsyncLocalSGDStrategy(local_steps=7, outer_optimizer=partial(torch.optim.SGD, lr=1.0)),
    ],
)
def test_single_worker_is_plain_training_bit_for_bit(strategy: AsyncLocalSGDStrategy) -> None:
    plain, _ = fit("auto", enable_checkpointing=False)
    ours, trainer = fit(strategy, enable_checkpointing=False)
    assert same_weights(plain, ours)
    assert plain.rates == ours.rates
    assert trainer.global_step == 30
    assert not any(name.startswith("async_localsgd") for name in ours.threads)


def test_delayed_nesterov_of_one_worker_is_torch_nesterov_over_rounds() -> None:
    ours, _ = fit(AsyncLocalSGDStrategy(6, DelayedNesterov()), enable_checkpointing=False)
    other = AsyncLocalSGDStrategy(
        local_steps=6, outer_optimizer=partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
    )
    theirs, _ = fit(other, enable_checkpointing=False)
    assert same_weights(ours, theirs)


def test_resumed_run_has_the_learning_rates_of_an_uninterrupted_run(tmp_path: Any) -> None:
    def strategy() -> AsyncLocalSGDStrategy:
        return AsyncLocalSGDStrategy(local_steps=6, outer_optimizer=DelayedNesterov(lr=0.5))

    whole, _ = fit(strategy(), max_steps=24, enable_checkpointing=False)
    _, trainer = fit(strategy(), max_steps=12, default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest, _ = fit(strategy(), tmp_path / "half.ckpt", max_steps=24, default_root_dir=tmp_path)
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["async_localsgd"]
    assert saved["budget"]["done"] == 12
    assert saved["model"]["version"] == 2
    assert len(rest.rates) == 12
    assert rest.rates == whole.rates[12:]


def test_resumed_schedule_ends_where_the_budget_ends(tmp_path: Any) -> None:
    class Exact(Model):
        def configure_optimizers(self) -> Any:
            configured = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.OneCycleLR(configured["optimizer"], max_lr=1e-2, total_steps=20)
            return {**configured, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    steps = {"max_steps": 20, "enable_checkpointing": False, "limit_val_batches": 0}
    whole, _ = fit(AsyncLocalSGDStrategy(local_steps=5), module=Exact(), callbacks=[Save()], **steps)
    # The save in the middle of a round has ended the round, so no step is repeated.
    rest, _ = fit(AsyncLocalSGDStrategy(local_steps=5), tmp_path / "mid.ckpt", module=Exact(), **steps)
    assert rest.rates == whole.rates[8:]


def test_run_resumed_anywhere_equals_an_uninterrupted_run(tmp_path: Any) -> None:
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
        # Because a save ends the round, all runs save.
        options = {"max_steps": 40, "limit_val_batches": 0, "callbacks": [save(folder)]}
        module, _ = fit(strategy(), ckpt_path, module=Dropping(), **options)
        assert isinstance(module, Dropping)
        return module

    whole = run(tmp_path)
    assert len(set(whole.trained_on)) < len(whole.trained_on)  # It was more than one epoch.
    for at in (16, 32):
        rest = run(tmp_path / str(at), tmp_path / f"step={at}.ckpt")
        assert rest.trained_on == whole.trained_on[8 * at :]
        assert same_weights(whole, rest)


def test_evaluating_a_checkpoint_does_not_change_a_later_fit(tmp_path: Any) -> None:
    _, trainer = fit(AsyncLocalSGDStrategy(local_steps=5), max_steps=10, enable_checkpointing=False)
    trainer.save_checkpoint(tmp_path / "ten.ckpt")
    module = Model()
    other = quiet_trainer(max_steps=10)
    other.validate(module, data(False), ckpt_path=tmp_path / "ten.ckpt", verbose=False)
    other.fit(module, data())
    assert other.global_step == 10


def test_should_stop_takes_effect_after_min_epochs() -> None:
    class Stop(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
            trainer.should_stop = True

    options = {"max_steps": -1, "max_epochs": 9, "min_epochs": 3, "num_sanity_val_steps": 0, "callbacks": [Stop()]}
    _, trainer = fit(AsyncLocalSGDStrategy(local_steps=5), enable_checkpointing=False, **options)
    assert trainer.global_step == 3 * 12


def test_data_that_can_be_read_only_once_is_an_error() -> None:
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


def test_step_that_the_gradient_scaler_skips_does_not_count() -> None:
    module = Model()
    module.overflow_at = {2, 5}
    callback = AsyncLocalSGDCallback(table=False)
    seen: dict[str, Any] = {}

    class Observe(L.Callback):
        def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            seen["totals"] = trainer.strategy.runtime.totals()[0]

    fit(
        AsyncLocalSGDStrategy(local_steps=5), module=module, max_steps=20, enable_checkpointing=False,
        callbacks=[Observe(), callback],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))],
    )  # fmt: skip
    # The budget is 20 steps. Skipped steps, two in each epoch of 12 batches, do not count.
    assert seen["totals"].steps == 20
    assert len(module.rates) == 24


def test_round_with_a_batch_that_is_not_finite_is_lost() -> None:
    module = Model()
    module.overflow_at = {3}
    fitted, trainer = fit(AsyncLocalSGDStrategy(local_steps=4), module=module, max_steps=12, enable_checkpointing=False)
    assert all(torch.isfinite(tensor).all() for tensor in fitted.state_dict().values())
    assert trainer.global_step == 12


def test_worker_that_diverges_is_quarantined_with_an_error() -> None:
    module = Model()
    module.overflow_at = set(range(100))
    with pytest.raises(ExchangeError, match=r"worker 0 is quarantined.*5 of its last 5 pushes were refused.*NaN"):
        fit(AsyncLocalSGDStrategy(local_steps=2), module=module, max_steps=100, enable_checkpointing=False)


def test_single_worker_merges_its_steps_before_a_validation() -> None:
    states: list[tuple[str, torch.Tensor]] = []

    class Observe(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            states.append(("local", module.net[0].weight.detach().clone()))

        def on_validation_epoch_start(self, trainer: L.Trainer, module: Any) -> None:
            states.append(("validated", module.net[0].weight.detach().clone()))

        def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            states.append(("next", module.net[0].weight.detach().clone()))

    fit(
        AsyncLocalSGDStrategy(10, DelayedNesterov()), max_steps=20, val_check_interval=5, num_sanity_val_steps=0,
        enable_checkpointing=False, callbacks=[Observe()],
    )  # fmt: skip
    start = states[0][1]
    at = next(n for n, (kind, _) in enumerate(states) if kind == "validated")
    # The outer step is taken at step 5 of the round's 10, and training continues from its result.
    assert not torch.equal(states[at][1], start)
    assert not torch.equal(states[at][1], states[at - 1][1])
    assert torch.equal(states[at + 1][1], states[at][1])


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_progress_bar_shows_the_whole_budget(bar: type[ProgressBar]) -> None:
    seen: list[tuple[float, float]] = []

    class Observe(L.Callback):
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
        callbacks=[mine, Observe()],
    )  # fmt: skip
    # An epoch has twelve batches. Neither total nor position restarts with an epoch.
    assert {total for total, _ in seen} == {30}
    positions = [position for _, position in seen]
    assert positions == sorted(positions)
    assert positions[-1] == 30
    assert type(mine) is bar
