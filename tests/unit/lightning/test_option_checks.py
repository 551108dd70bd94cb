"""Options, plugins, callbacks and models that cannot work are refused as early as possible."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
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
from tests.lightning_models import quiet_trainer

SECRET = ExchangeOptions(token="a secret of sufficient length")


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
        (lambda: ExchangeOptions(start_timeout=0), ValueError, "start_timeout=0"),
        (lambda: ExchangeOptions(silence_timeout=-3), ValueError, "silence_timeout=-3"),
        (
            lambda: ExchangeOptions(silence_timeout=timedelta(minutes=1)),
            ValueError,
            "silence_timeout=.*timedelta",
        ),
        (lambda: ExchangeOptions(silence_timeout=None), ValueError, "silence_timeout=None"),
        (lambda: ExchangeOptions(start_timeout="60"), ValueError, "start_timeout='60'"),
        (lambda: ExchangeOptions(token=12345678901234567890), TypeError, "exchange.token must be a string, got int"),
        (
            lambda: AsyncLocalSGDStrategy(fail_on_lost_workers="yes"),
            ValueError,
            "fail_on_lost_workers='yes'.*True or False",
        ),
        (lambda: AsyncLocalSGDStrategy(dynamic_local_steps="yes"), ValueError, "dynamic_local_steps='yes'"),
        (lambda: AsyncLocalSGDStrategy(start_method="popen2"), ValueError, "start_method='popen2'.*popen, spawn"),
        (lambda: AsyncLocalSGDCallback(table="no"), ValueError, "table='no'.*True or False"),
        (lambda: EmulatedDevices(0.1), ValueError, "seconds_per_step=0.1 must be a list"),
        (lambda: EmulatedDevices("0.1"), ValueError, "seconds_per_step='0.1' must be a list"),
        (lambda: FaultInjection(Fault(FaultKind.KILL, 1, 2)), ValueError, "must be a list of Fault objects"),
        (lambda: SimulatedAsyncLocalSGDStrategy(replay="nope.jsonl"), ValueError, "replay='nope.jsonl' is not a file"),
        (lambda: AsyncLocalSGDStrategy(exchange="tcp"), TypeError, "exchange='tcp'"),
        (lambda: ExchangeOptions(transport="pigeon"), ValueError, "exchange.transport='pigeon'"),
        (lambda: ExchangeOptions(port=70000), ValueError, "exchange.port=70000"),
        (
            lambda: ExchangeOptions(upload="int2"),
            ValueError,
            r"exchange.upload='int2' is unknown.*'bf16', 'int8', 'int4'",
        ),
        (
            lambda: ExchangeOptions(download="int4"),
            ValueError,
            r"exchange.download='int4' is unknown.*'bf16', 'int8'\)",
        ),
        (lambda: SimulatedAsyncLocalSGDStrategy(upload=8), ValueError, "exchange.upload=8 is unknown"),
        (lambda: ExchangeOptions(frozen="sometimes"), ValueError, "exchange.frozen='sometimes'"),
        (lambda: ExchangeOptions(frozen=1), ValueError, "exchange.frozen=1"),
        (lambda: ExchangeOptions(transport="ipc", encrypt=True), ValueError, "exchange.encrypt=True"),
    ],
)
def test_options_outside_their_range_are_refused(make: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


def trainer(strategy: AsyncLocalSGDStrategy | str = "async_localsgd", **options: Any) -> L.Trainer:
    return quiet_trainer(strategy, **{"max_steps": 4, **options})


def test_sync_batchnorm_has_no_effect_and_one_warning_on_several_ranks() -> None:
    class WithBatchNorm(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(32)

        def training_step(self, batch: Any, index: int) -> Any:
            assert type(self.norm) is torch.nn.BatchNorm1d
            return super().training_step(self.norm(batch), index)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for devices in (1, 2):
            single = trainer(devices=devices, sync_batchnorm=True)
            if devices == 1:
                single.fit(WithBatchNorm(), DataLoader(RandomDataset(32, 16), batch_size=4))
    [text] = [str(warning.message) for warning in caught if "sync_batchnorm" in str(warning.message)]
    assert "sync_batchnorm=True has no effect with async_localsgd" in text
    assert "running statistics are merged" in text


@pytest.mark.parametrize("plugin", [FSDPPrecision("32-true"), DeepSpeedPrecision("32-true")])
def test_precision_plugins_of_sharding_strategies_are_refused_when_the_trainer_is_made(plugin: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"plugins={type(plugin).__name__}")):
        trainer(plugins=[plugin])


def test_activation_is_checked_against_the_number_of_workers_before_training() -> None:
    strategy = AsyncLocalSGDStrategy(outer_optimizer=DelayedNesterov(activation=0.6))
    module = BoringModel()
    trainer(strategy).fit(module)  # With one worker 0.6 <= 1/1.
    outer_optimizer = DelayedNesterov(activation=0.6)
    with pytest.raises(ValueError, match=r"activation.*0\.6"):
        outer_optimizer.setup(torch.zeros(2), {"w": torch.zeros(2)}, workers=2)


def test_weights_of_pushes_are_refused_with_a_single_worker() -> None:
    for weights in ("samples", "tokens^2/steps"):
        merge, text = MergeOptions(weights=weights), re.escape(f"merge.weights={weights!r}")
        with pytest.raises(ValueError, match=rf"{text} .*single worker.*leave it out"):
            trainer(AsyncLocalSGDStrategy(merge=merge))
        trainer(AsyncLocalSGDStrategy(merge=merge, exchange=SECRET))  # Workers may join.
        trainer(AsyncLocalSGDStrategy(merge=merge), devices=2)
    trainer(AsyncLocalSGDStrategy(merge=MergeOptions(clip_norm=1.0)))


def test_grace_is_refused_with_a_quorum_of_all_workers() -> None:
    with pytest.raises(ValueError, match=r"grace=2.0 .*quorum='all' waits for all.*smaller quorum.*leave grace out"):
        AsyncLocalSGDStrategy(quorum="all", grace=2.0)
    with pytest.raises(ValueError, match=r"grace=2.0 .*quorum=3 of 3 workers waits for all.*leave grace out"):
        trainer(AsyncLocalSGDStrategy(quorum=3, grace=2.0), devices=3)
    for options in ({"quorum": 2, "grace": 2.0}, {"quorum": 3, "grace": 0}, {"quorum": 3}):
        trainer(AsyncLocalSGDStrategy(**options), devices=3)
    trainer(AsyncLocalSGDStrategy(quorum=3, grace=2.0, exchange=SECRET), devices=3)
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


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"max_epochs": 2}, r"max_epochs=2 cannot"),
        ({}, r"max_epochs=1000 \(Lightning's default without another limit\)"),
    ],
)
def test_data_without_a_length_needs_max_steps(limits: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=rf"has no length.*{named}.*Set max_steps.*limit_train_batches"):
        trainer(max_steps=-1, **limits).fit(BoringModel(), DataLoader(Endless(), batch_size=2))


def test_max_steps_is_enough_for_data_without_a_length(caplog: pytest.LogCaptureFixture) -> None:
    for epochs in (-1, 100):
        fitted = trainer(max_epochs=epochs, limit_val_batches=0)
        with caplog.at_level("INFO"):
            fitted.fit(BoringModel(), DataLoader(Endless(), batch_size=2))
        assert fitted.global_step == 4
        assert ("max_epochs=100 has no effect" in caplog.text) == (epochs == 100)


def test_pruning_in_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ModelPruning.*prune the trained model"):
        trainer(callbacks=[ModelPruning("l1_unstructured", amount=0.5)]).fit(BoringModel())


def test_process_group_of_an_earlier_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_async_localsgd.lightning.option_checks import check_no_process_group

    check_no_process_group()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="destroy_process_group"):
        check_no_process_group()


def test_run_with_an_evaluator_and_nothing_to_validate_is_refused() -> None:
    trainer = quiet_trainer(AsyncLocalSGDStrategy(evaluator=True), max_steps=2, limit_val_batches=0)
    with pytest.raises(ValueError, match=r"evaluator=True, but host .* has no validation data.*evaluator=False"):
        trainer.fit(BoringModel())


def test_evaluator_is_a_switch() -> None:
    with pytest.raises(ValueError, match="evaluator=1 must be True or False"):
        AsyncLocalSGDStrategy(evaluator=1)  # type: ignore[arg-type]
