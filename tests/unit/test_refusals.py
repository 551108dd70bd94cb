"""Bad input is refused by name, as early as it can be known."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, FSDPPrecision
from torch.utils.data import DataLoader, IterableDataset

from lightning_async_localsgd import (
    AsyncLocalSGDCallback,
    AsyncLocalSGDStrategy,
    DelayedNesterov,
    EmulatedDevices,
    ExchangeOptions,
    FaultInjection,
    MergeOptions,
    SimulatedAsyncLocalSGDStrategy,
    TorchOptimizer,
)
from lightning_async_localsgd.faults import Fault, FaultKind


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: AsyncLocalSGDStrategy(local_steps=0), ValueError, "local_steps.*0"),
        (lambda: AsyncLocalSGDStrategy(local_steps=2.5), ValueError, "local_steps.*2.5"),
        (lambda: DelayedNesterov(momentum=1.0), ValueError, "momentum.*1.0"),
        (lambda: DelayedNesterov(momentum=-0.1), ValueError, "momentum.*-0.1"),
        (lambda: DelayedNesterov(period=0), ValueError, "period.*0"),
        (lambda: DelayedNesterov(period="sometimes"), ValueError, "period.*sometimes"),
        (lambda: DelayedNesterov(period=4, activation=0.3), ValueError, "activation.*0.3"),
        (lambda: DelayedNesterov(activation=-0.1), ValueError, "activation.*-0.1"),
        (lambda: DelayedNesterov(lr=0.0), ValueError, "lr.*0.0"),
        (lambda: TorchOptimizer(torch.optim.SGD, lr=-1.0), ValueError, "-1.0"),
        (lambda: AsyncLocalSGDStrategy(grace=-1.0), ValueError, "grace.*-1.0"),
        (lambda: AsyncLocalSGDStrategy(grace="never"), ValueError, "grace.*never"),
        (lambda: AsyncLocalSGDStrategy(outer_optimizer="nesterov"), TypeError, "nesterov"),
        (lambda: AsyncLocalSGDStrategy(outer_optimizer=3), TypeError, "3"),
        (lambda: AsyncLocalSGDStrategy(start_timeout=0), ValueError, "start_timeout=0"),
        (lambda: AsyncLocalSGDStrategy(silence_timeout=-3), ValueError, "silence_timeout=-3"),
        (
            lambda: AsyncLocalSGDStrategy(silence_timeout=timedelta(minutes=1)),
            ValueError,
            "silence_timeout=.*timedelta",
        ),
        (lambda: AsyncLocalSGDStrategy(silence_timeout=None), ValueError, "silence_timeout=None"),
        (lambda: AsyncLocalSGDStrategy(start_timeout="60"), ValueError, "start_timeout='60'"),
        (lambda: AsyncLocalSGDStrategy(token=12345678901234567890), TypeError, "token is of type int"),
        (lambda: AsyncLocalSGDStrategy(strict="yes"), ValueError, "strict='yes'.*True or False"),
        (lambda: AsyncLocalSGDStrategy(dynamic_local_steps="yes"), ValueError, "dynamic_local_steps='yes'"),
        (lambda: AsyncLocalSGDStrategy(start_method="popen2"), ValueError, "start_method='popen2'.*popen, spawn"),
        (lambda: AsyncLocalSGDCallback(table="no"), ValueError, "table='no'.*True or False"),
        (lambda: EmulatedDevices(0.1), ValueError, "seconds_per_step=0.1 must be a list"),
        (lambda: EmulatedDevices("0.1"), ValueError, "seconds_per_step='0.1' must be a list"),
        (lambda: FaultInjection(Fault(FaultKind.KILL, 1, 2)), ValueError, "must be a list of Fault objects"),
        (lambda: SimulatedAsyncLocalSGDStrategy(replay="nope.jsonl"), ValueError, "replay='nope.jsonl' is no file"),
        (lambda: AsyncLocalSGDStrategy(exchange="tcp"), TypeError, "exchange='tcp'"),
        (lambda: ExchangeOptions(transport="pigeon"), ValueError, "exchange.transport='pigeon'"),
        (lambda: ExchangeOptions(port=70000), ValueError, "exchange.port=70000"),
        (lambda: ExchangeOptions(frozen="sometimes"), ValueError, "exchange.frozen='sometimes'"),
        (lambda: ExchangeOptions(frozen=1), ValueError, "exchange.frozen=1"),
        (lambda: ExchangeOptions(transport="ipc", encrypt=True), ValueError, "exchange.encrypt=True"),
    ],
)
def test_options_outside_their_range(make: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


def trainer(strategy: AsyncLocalSGDStrategy | str = "async_localsgd", **options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    return L.Trainer(strategy=strategy, accelerator="cpu", **{"devices": 1, "max_steps": 4, **quiet, **options})


def test_sync_batchnorm_is_refused_when_the_trainer_is_made() -> None:
    with pytest.raises(ValueError, match="sync_batchnorm=True"):
        trainer(devices=2, sync_batchnorm=True)


@pytest.mark.parametrize("plugin", [FSDPPrecision("32-true"), DeepSpeedPrecision("32-true")])
def test_plugins_of_strategies_that_shard_are_refused_when_the_trainer_is_made(plugin: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"plugins={type(plugin).__name__}")):
        trainer(plugins=[plugin])


def test_activation_is_checked_against_the_number_of_workers_before_training() -> None:
    strategy = AsyncLocalSGDStrategy(outer_optimizer=DelayedNesterov(activation=0.6))
    module = BoringModel()
    trainer(strategy).fit(module)  # One worker: 0.6 <= 1/1.
    rule = DelayedNesterov(activation=0.6)
    with pytest.raises(ValueError, match=r"activation.*0\.6"):
        rule.setup(torch.zeros(2), {"w": torch.zeros(2)}, workers=2)


def test_weights_of_pushes_need_another_worker_to_weigh_them_against() -> None:
    for weights in ("samples", "tokens^2/steps"):
        merge, text = MergeOptions(weights=weights), re.escape(f"merge.weights={weights!r}")
        with pytest.raises(ValueError, match=rf"{text} .*single worker.*leave it out"):
            trainer(AsyncLocalSGDStrategy(merge=merge))
        trainer(AsyncLocalSGDStrategy(merge=merge, token="a secret of sufficient length"))  # Others may join.
        trainer(AsyncLocalSGDStrategy(merge=merge), devices=2)
    trainer(AsyncLocalSGDStrategy(merge=MergeOptions(clip_norm=1.0)))


def test_a_quorum_of_as_many_as_there_are_leaves_nobody_to_wait_for() -> None:
    with pytest.raises(ValueError, match=r"grace=2.0 .*quorum='all' waits for all.*smaller quorum.*leave grace out"):
        AsyncLocalSGDStrategy(quorum="all", grace=2.0)
    with pytest.raises(ValueError, match=r"grace=2.0 .*quorum=3 of 3 workers waits for all.*leave grace out"):
        trainer(AsyncLocalSGDStrategy(quorum=3, grace=2.0), devices=3)
    for options in ({"quorum": 2, "grace": 2.0}, {"quorum": 3, "grace": 0}, {"quorum": 3}):
        trainer(AsyncLocalSGDStrategy(**options), devices=3)
    trainer(AsyncLocalSGDStrategy(quorum=3, grace=2.0, token="a secret of sufficient length"), devices=3)
    trainer(AsyncLocalSGDStrategy(grace=2.0))


class Frozen(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.layer.requires_grad_(False)


class Expanded(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.layer.weight = torch.nn.Parameter(torch.zeros(32).expand(2, 32))


@pytest.mark.parametrize(
    ("module", "text"), [(Frozen, "no trainable parameter"), (Expanded, r"parameter 'layer.weight'.*contiguous")]
)
def test_models_that_cannot_be_exchanged_are_refused_before_training(
    module: type[L.LightningModule], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        trainer().fit(module())


class Endless(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Any:
        while True:
            yield torch.randn(32)


def test_epochs_of_unknown_length_are_refused_and_steps_are_not() -> None:
    loader = DataLoader(Endless(), batch_size=2)
    with pytest.raises(ValueError, match="max_epochs=2"):
        trainer(max_steps=-1, max_epochs=2).fit(BoringModel(), loader)
    fitted = trainer(max_epochs=-1, limit_val_batches=0)
    fitted.fit(BoringModel(), loader)
    assert fitted.global_step == 4


def test_pruning_while_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ModelPruning.*prune the trained model"):
        trainer(callbacks=[ModelPruning("l1_unstructured", amount=0.5)]).fit(BoringModel())


def test_a_process_group_that_was_left_behind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_async_localsgd.refusals import refuse_process_group

    refuse_process_group()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="destroy_process_group"):
        refuse_process_group()
