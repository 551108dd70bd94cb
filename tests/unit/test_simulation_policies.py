"""Every way of merging pushes plays a whole run: each outer rule, each staleness stage, each option of groups."""

from __future__ import annotations

import itertools
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


class Regression(L.LightningModule):
    """A linear one, with an inner optimizer that has a momentum; it counts what it was trained on."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.net = torch.nn.Linear(8, 1)
        self.lr = lr
        self.batches = 0
        self.versions: list[int] = []
        self.start = torch.cat([parameter.detach().flatten() for parameter in self.parameters()])

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.batches += 1
        self.versions.append(self.trainer.strategy.phase.server.view.version)
        return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.5)


class Counts(AsyncLocalSGDCallback):
    """What the server had counted when training was over."""

    def __init__(self) -> None:
        super().__init__(table=False)
        self.done = self.version = self.stale = 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        view = trainer.strategy.phase.server.view
        self.done, self.version, self.stale = view.progress, view.version, view.refusals.get("stale", 0)
        assert view.refused_pushes == self.stale


def fit(folder: Path, strategy: Simulated, max_steps: int, lr: float = 0.02) -> tuple[Regression, Counts, L.Trainer]:
    L.seed_everything(3, verbose=False)
    inputs = torch.randn(400, 8)
    targets = inputs @ torch.randn(8, 1) + 0.1 * torch.randn(400, 1)
    module, counts = Regression(lr), Counts()
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", devices=1, max_steps=max_steps, callbacks=[counts], logger=False,
        default_root_dir=folder, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(inputs, targets), batch_size=8, shuffle=True))
    return module, counts, trainer


RULES = [
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
    {"warmup_steps": 10},
    {"quorum": 2, "warmup_steps": 10},
    {"warmup_steps": 10, "outer_optimizer": Nesterov(lr=0.1), "merge": MergeOptions(average="rda")},
    {"quorum": 2, "schedule": [Death(2, 0.9), Death(1, 1.5, back_at=2.0)]},
    {"quorum": "all", "schedule": [Death(0, 0.8, back_at=1.4), Death(2, 2.0)]},
    {"quorum": "all", "merge": MergeOptions(quorum_seconds=0.4), "schedule": [Death(1, 1.0)]},
    {"warmup_steps": 12, "schedule": [Death(2, 0.9, back_at=1.3)]},
]


@pytest.mark.parametrize(
    "options",
    [
        *[pytest.param({"outer_optimizer": rule}, id=repr(rule)) for rule in RULES],
        *[pytest.param({"staleness": stage}, id=repr(stage)) for stage in STAGES],
        *[pytest.param(group, id=", ".join(f"{name}={value}" for name, value in group.items())) for group in GROUPS],
    ],
)  # fmt: skip
def test_a_run_takes_all_its_steps_and_leaves_a_sound_model(options: dict[str, Any], tmp_path: Path) -> None:
    module, counts, trainer = fit(tmp_path, Simulated([0.1, 0.13, 0.3], local_steps=4, **options), max_steps=30)
    # Every step that was played was handed in and counted, those of pushes that were dropped, too.
    assert module.batches == counts.done == 90
    assert trainer.global_step == 30
    assert counts.version > 5
    end = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    assert torch.isfinite(end).all()
    assert float((end - module.start).norm()) > 0.01


def test_a_momentum_that_points_the_wrong_way_does_not_drop_the_rest_of_the_run(tmp_path: Path) -> None:
    strategy = Simulated(outer_optimizer=DelayedNesterov(0.7), staleness=ExponentialCosine(0.1, 0.0), local_steps=10)
    module, counts, _ = fit(tmp_path, strategy, max_steps=200, lr=0.05)
    assert counts.stale > 0
    versions = module.versions
    assert module.batches == 800
    eighths = [versions[at] for at in range(0, 800, 100)] + [counts.version]
    assert all(before < after for before, after in itertools.pairwise(eighths)), eighths
