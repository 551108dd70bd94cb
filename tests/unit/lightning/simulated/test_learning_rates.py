"""Learning-rate schedulers of simulated workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy as Simulated
from tests.unit.lightning.simulated.support import SPEEDS, Model, fit, loader


def test_reduce_on_plateau_changes_the_rates_of_all_workers() -> None:
    class Plateau(Model):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss", "interval": "step", "frequency": 1,
                                 "strict": False},
            }  # fmt: skip

    module, trainer = fit(Simulated([0.1, 0.2], local_steps=3), module=Plateau, max_steps=20, val_check_interval=5)
    last = trainer.optimizers[0].param_groups[0]["lr"]
    assert last < 1e-2
    assert all(rates == sorted(rates, reverse=True) for rates in module.rates.values())
    assert {len({*rates}) > 1 for rates in module.rates.values()} == {True}


class EpochSchedule(Model):
    """Has either an epoch schedule or a schedule that follows a metric."""

    def __init__(self, plateau: bool) -> None:
        super().__init__()
        self.plateau = plateau

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("constant", 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
        if self.plateau:
            schedule: Any = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        else:
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "constant"}}


@pytest.mark.parametrize("plateau", [True, False])
def test_epoch_schedule_ends_with_the_last_epoch(plateau: bool) -> None:
    _, trainer = fit(
        Simulated([0.1, 0.2, 0.3], local_steps=3), module=lambda: EpochSchedule(plateau), max_steps=-1, max_epochs=4,
        val_check_interval=1.0, data=loader(20),
    )  # fmt: skip
    assert trainer.current_epoch == 4
    assert not trainer.should_stop
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert scheduler.last_epoch == 4
    # The first validation is the best one, and each of the other three halves the rate.
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5 ** (3 if plateau else 4))


def test_step_schedule_ends_with_the_run() -> None:
    class Steps(Model):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 40)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    _, trainer = fit(Simulated(SPEEDS, local_steps=6), module=Steps, max_steps=40)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 40
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0


class ManualEpochSchedule(Model):
    """Steps its scheduler in the hook at the end of an epoch, and sets the momentum in the hook at its beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.momenta: dict[int, list[float]] = {}

    def training_step(self, batch: Any, index: int) -> None:
        loss = super().training_step(batch, index)
        group = self.trainer.optimizers[0].param_groups[0]
        self.momenta.setdefault(self.trainer.current_epoch, []).append((group["lr"], group["momentum"]))
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def on_train_epoch_start(self) -> None:
        self.trainer.optimizers[0].param_groups[0]["momentum"] = 0.1 * self.trainer.current_epoch

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def test_changes_by_epoch_hooks_apply_to_all_workers() -> None:
    module, _ = fit(Simulated(SPEEDS, local_steps=3), module=ManualEpochSchedule, max_steps=-1, max_epochs=4)
    assert sorted(module.momenta) == [0, 1, 2, 3]
    for epoch, values in module.momenta.items():
        assert set(values) == {(0.1 * 0.5**epoch, 0.1 * epoch)}
