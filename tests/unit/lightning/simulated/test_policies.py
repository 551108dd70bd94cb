"""A whole run with each outer optimizer, each staleness stage, and each option that groups pushes."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_async_localsgd import AsyncLocalSGDCallback, Death, MergeOptions
from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy as Simulated
from lightning_async_localsgd.outer import (
    SGD,
    Adam,
    Buffer,
    DelayedNesterov,
    HeLoCo,
    LookAhead,
    Momentum,
    MomentumRestart,
    Nesterov,
    TorchOptimizer,
)
from lightning_async_localsgd.staleness import (
    Composed,
    Constant,
    DelayCompensation,
    ExponentialCosine,
    Hinge,
    Polynomial,
    PolynomialThreshold,
)
from tests.lightning_models import Regression


class RecordingRegression(Regression):
    """A linear regression whose inner optimizer has momentum. Records batches and versions of the global model."""

    def __init__(self, lr: float) -> None:
        super().__init__(torch.nn.Linear(8, 1), partial(torch.optim.SGD, momentum=0.5), lr)
        self.batches = 0
        self.versions: list[int] = []
        self.start = torch.cat([parameter.detach().flatten() for parameter in self.parameters()])

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.batches += 1
        self.versions.append(self.trainer.strategy.runtime.server.snapshot.version)
        return super().training_step(batch, index)


class ServerCounts(AsyncLocalSGDCallback):
    """Records what the server has counted at the end of training."""

    def __init__(self) -> None:
        super().__init__(table=False)
        self.done = self.version = self.stale = 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        view = trainer.strategy.runtime.server.snapshot
        self.done, self.version, self.stale = view.progress, view.version, view.refusals.get("stale", 0)
        assert view.refused_pushes == self.stale


def fit(
    folder: Path, strategy: Simulated, max_steps: int, lr: float = 0.02
) -> tuple[RecordingRegression, ServerCounts, L.Trainer]:
    L.seed_everything(3, verbose=False)
    inputs = torch.randn(400, 8)
    targets = inputs @ torch.randn(8, 1) + 0.1 * torch.randn(400, 1)
    module, counts = RecordingRegression(lr), ServerCounts()
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", devices=1, max_steps=max_steps, callbacks=[counts], logger=False,
        default_root_dir=folder, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(inputs, targets), batch_size=8, shuffle=True))
    return module, counts, trainer


OUTER_OPTIMIZERS = [
    SGD(lr=1 / 3),
    Momentum(lr=0.05),
    Nesterov(lr=0.05),
    Adam(lr=0.01),
    Buffer(),
    Buffer(period=2),
    DelayedNesterov(),
    DelayedNesterov(activation=0.2),
    DelayedNesterov(period=5, activation=0.1),
    LookAhead(lr=0.3),
    HeLoCo(LookAhead(lr=0.3)),
    HeLoCo(DelayedNesterov()),
    MomentumRestart(Nesterov(lr=0.05), every=3),
    MomentumRestart(HeLoCo(LookAhead(lr=0.3)), every=4),
    TorchOptimizer(torch.optim.RMSprop, lr=0.01),
    torch.optim.Adagrad,
]

STAGES = [
    Constant(),
    Polynomial(),
    PolynomialThreshold(threshold=1),
    Hinge(slope=1.0, start=1),
    ExponentialCosine(0.1, 0.0),
    DelayCompensation(0.5),
    Composed([Polynomial(), ExponentialCosine(0.0, -0.5), DelayCompensation(0.1)]),
]

GROUPS: list[dict[str, Any]] = [
    {"merge": MergeOptions(weights="samples")},
    {"merge": MergeOptions(weights="tokens^2/steps")},
    {"merge": MergeOptions(clip_norm=0.05)},
    {"quorum": 2},
    {"quorum": 2, "merge": MergeOptions(average="rda")},
    {"quorum": 2, "merge": MergeOptions(average="rda", weights="tokens^2/steps", clip_norm=0.1)},
    {"quorum": 2, "grace": 0.5, "staleness": Polynomial()},
    {"quorum": "all", "merge": MergeOptions(quorum_seconds=0.3)},
    {"quorum": "all", "merge": MergeOptions(quorum_seconds=0.3, weights="samples"), "staleness": Polynomial()},
    {"sync_warmup_steps": 10},
    {"quorum": 2, "sync_warmup_steps": 10},
    {"sync_warmup_steps": "auto", "exchange_seconds": 0.05},
    {"sync_warmup_steps": 40},
    {"sync_warmup_steps": 12, "upload": "int8", "download": "int8", "overlap": True},
    {"sync_warmup_steps": 12, "schedule": [Death(0, 0.7, back_at=1.5)]},
    {"quorum": 2, "schedule": [Death(2, 0.9), Death(1, 1.5, back_at=2.0)]},
    {"quorum": "all", "schedule": [Death(0, 0.8, back_at=1.4), Death(2, 2.0)]},
    {"quorum": "all", "merge": MergeOptions(quorum_seconds=0.4), "schedule": [Death(1, 1.0)]},
    {"sync_warmup_steps": 12, "schedule": [Death(2, 0.9, back_at=1.3)]},
]


@pytest.mark.parametrize(
    "options",
    [
        *[pytest.param({"outer_optimizer": outer}, id=repr(outer)) for outer in OUTER_OPTIMIZERS],
        *[
            pytest.param({"staleness": stage, "outer_optimizer": DelayedNesterov()}, id=repr(stage)) for stage in STAGES
        ],
        *[pytest.param(group, id=", ".join(f"{name}={value}" for name, value in group.items())) for group in GROUPS],
    ],
)  # fmt: skip
def test_run_takes_all_its_steps_and_ends_with_a_finite_model(options: dict[str, Any], tmp_path: Path) -> None:
    module, counts, trainer = fit(tmp_path, Simulated([0.1, 0.13, 0.3], local_steps=4, **options), max_steps=30)
    # All computed steps were pushed and counted, including the steps of dropped pushes.
    assert module.batches == counts.done == 90
    assert trainer.global_step == 30
    assert counts.version > 5
    end = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    assert torch.isfinite(end).all()
    assert float((end - module.start).norm()) > 0.01


def test_momentum_in_the_wrong_direction_does_not_drop_all_later_pushes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = Simulated(outer_optimizer=DelayedNesterov(0.7), staleness=ExponentialCosine(0.1, 0.0), local_steps=10)
    module, counts, _ = fit(tmp_path, strategy, max_steps=200, lr=0.05)
    assert counts.stale > 0
    warnings = [record for record in caplog.records if record.levelname == "WARNING" and "refused" in record.message]
    assert len(warnings) == counts.stale, "one line for each refused push"
    versions = module.versions
    assert module.batches == 800
    eighths = [versions[at] for at in range(0, 800, 100)] + [counts.version]
    assert all(before < after for before, after in itertools.pairwise(eighths)), eighths
