"""Runs that log metrics, and runs whose learning rate follows a metric: ``python metrics_job.py OUT``.

There are three ranks. A step of the slowest takes six times as long as one of the fastest. Each rank writes what it
noted to ``OUT/rank_<n>.json``, by the name of the run.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchmetrics
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_async_localsgd import AsyncLocalSGDStrategy, ExchangeOptions
from tests.lightning_models import PacedRegression, line_loader, quiet_trainer

SECONDS = (0.004, 0.008, 0.024)
"""Minimum seconds of a local step, by rank."""

RANKS = len(SECONDS)
CONSTANTS = (1.0, 10.0, 100.0)
"""What each rank logs under the same names."""


class Paced(PacedRegression):
    """A linear model on ranks of unequal speed."""

    def __init__(self) -> None:
        super().__init__(SECONDS, torch.nn.Linear(1, 1), lr=0.01)
        self.noted: dict[str, Any] = {}

    @property
    def rank(self) -> int:
        return self.trainer.global_rank


class Logging(Paced):
    """Logs in all possible ways, and records what it logs."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.MeanMetric()
        self.on_step_only = torchmetrics.MeanMetric(dist_sync_on_step=True)
        self.validated = torchmetrics.MeanMetric()
        self.noted = {"values": [], "ends": [], "bar": []}

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = super().training_step(batch, index)
        constant = CONSTANTS[self.rank]
        # Unequal weights: the mean over all samples differs from the mean over ranks.
        size = 1 + index % (2 + self.rank)
        self.noted["values"].append((constant + index, size))
        self.log("both", constant, on_step=True, on_epoch=True, prog_bar=True)
        self.log("step", constant, on_step=True, on_epoch=False)
        self.log("weighted", constant + index, on_step=False, on_epoch=True, batch_size=size)
        self.log("most", constant + index, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("least", -constant - index, on_step=False, on_epoch=True, reduce_fx="min")
        self.log("count", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("synced", constant, on_step=True, on_epoch=False, sync_dist=True)
        self.log("rank_zero", constant, on_step=True, on_epoch=False, rank_zero_only=True)
        self.log("silent", constant, on_step=True, on_epoch=False, logger=False)
        if self.rank == 1:
            self.log("foreign", 7.0, on_step=True, on_epoch=True)
            self.log("undefined", float("nan"), on_step=True, on_epoch=False)
            self.log("foreign_count", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        self.accuracy.update(torch.tensor(constant))
        self.log("state", self.accuracy, on_step=False, on_epoch=True)
        self.on_step_only(torch.tensor(constant))
        gathered = self.all_gather(torch.tensor(constant))
        assert float(gathered) == constant
        return loss

    def on_train_epoch_end(self) -> None:
        metrics = self.trainer.callback_metrics
        self.noted["ends"].append({name: value.item() for name, value in metrics.items()})

    def on_train_batch_end(self, *_: Any) -> None:
        shown = self.trainer.progress_bar_metrics.get("both_step")
        if shown is not None:
            self.noted["bar"].append(shown)

    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step(batch, index)
        self.validated.update(batch[0])
        self.log("samples_mean", self.validated, on_step=False, on_epoch=True)
        self.log("rank_mean", float(self.rank), sync_dist=True)
        self.log("rows", float(len(batch[0])), reduce_fx="sum", sync_dist=True)
        assert self.trainer.world_size == RANKS
        self.all_gather(torch.ones(1))

    def test_step(self, batch: Any, index: int) -> None:
        self.validation_step(batch, index)


class Crowd(Paced):
    """Logs more metrics than fit into a push."""

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        for n in range(400):
            self.log(f"metric_{n}", float(self.rank), on_step=True, on_epoch=False)
        return super().training_step(batch, index)


class Plateaus(Paced):
    """Has a learning rate that follows a metric, which gets worse with each validation.

    Args:
        besides: whether there is a second schedule, over steps.
        interval: interval of the scheduler that follows the metric.
        factor: factor of its reductions.
        manual: whether to use manual optimization.

    """

    def __init__(self, besides: bool, interval: str, factor: float, manual: bool) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.factor = factor
        self.besides = besides
        self.interval = interval
        self.worse = 0.0
        self.noted = {"rates": [], "monitored": []}

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = super().training_step(batch, index)
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
        return loss

    def on_train_epoch_end(self) -> None:
        if not self.automatic_optimization:
            self.lr_schedulers().step(self.trainer.callback_metrics.get("worse", 0.0))

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.worse += 1.0
            self.log("worse", self.worse)

    def on_train_batch_end(self, *_: Any) -> None:
        self.noted["rates"].append([group["lr"] for group in self.optimizers().param_groups])
        if "worse" in self.trainer.callback_metrics:
            self.noted["monitored"].append(self.trainer.callback_metrics["worse"].item())

    def on_train_end(self) -> None:
        self.noted["steps"] = self.trainer.lr_scheduler_configs[0].scheduler.last_epoch

    def configure_optimizers(self) -> Any:
        groups = [{"params": [self.net.weight], "lr": 0.01}, {"params": [self.net.bias], "lr": 0.02}]
        optimizer = torch.optim.SGD(groups, lr=0.01)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=self.factor, patience=0)
        config = {"scheduler": plateau, "monitor": "worse", "interval": self.interval, "strict": False}
        if self.interval == "step":
            config["frequency"] = 5
        configs: list[Any] = [config]
        if self.besides:
            configs.append({"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99), "interval": "step"})
        return [optimizer], configs


def trainer(out: Path, **options: Any) -> L.Trainer:
    return quiet_trainer(
        AsyncLocalSGDStrategy(local_steps=5, exchange=ExchangeOptions(start_timeout=120.0)),
        devices=RANKS,
        default_root_dir=out,
        **{"num_sanity_val_steps": 0, "limit_val_batches": 2, **options},
    )


def log_everything(out: Path) -> dict[str, Any]:
    module = Logging()
    run = trainer(
        out,
        max_steps=40,
        logger=CSVLogger(out, name="", version="metrics"),
        log_every_n_steps=1,
        limit_val_batches=None,
        val_check_interval=20,
        check_val_every_n_epoch=None,
    )
    valid = DataLoader(TensorDataset(torch.arange(24.0).reshape(-1, 1), torch.zeros(24, 1)), batch_size=4)
    before = run.validate(module, valid, verbose=False)[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module, line_loader(4000), valid)
    shown = [run.callback_metrics, run.logged_metrics, run.progress_bar_metrics]
    shown = [{name: float(value) for name, value in metrics.items()} for metrics in shown]
    after = run.validate(module, valid, verbose=False)[0]
    tested = run.test(module, valid, verbose=False)[0]
    connector = "+".join(c.__name__ for c in type(run._logger_connector).__mro__[:-1])
    texts = [str(warning.message) for warning in caught]
    return {
        **module.noted,
        "before": before,
        "after": after,
        "tested": tested,
        "shown": shown,
        "warnings": texts,
        "class": connector,
    }


def log_a_crowd(out: Path) -> dict[str, Any]:
    module = Crowd()
    run = trainer(out, max_steps=6, limit_val_batches=0)
    run.fit(module, line_loader(4000))
    return {"arrived": sum(value.item() > 0 for value in run.callback_metrics.values())}


def follow_a_plateau(
    out: Path, besides: bool = False, interval: str = "epoch", factor: float = 0.5, manual: bool = False
) -> dict[str, Any]:
    module = Plateaus(besides, interval, factor, manual)
    if interval == "step":
        run = trainer(out, max_steps=60, val_check_interval=10, check_val_every_n_epoch=None)
    else:
        run = trainer(out, max_epochs=4)
    run.fit(module, line_loader(240), line_loader(16))
    scheduler = run.lr_scheduler_configs[0].scheduler
    return {
        **module.noted,
        "last": [group["lr"] for group in run.optimizers[0].param_groups],
        "best": scheduler.best,
        "shown": scheduler.get_last_lr(),
        "frequency": run.lr_scheduler_configs[0].frequency,
        "class": type(scheduler).__name__,
        "state": sorted(scheduler.state_dict()),
    }


def main(out: Path) -> None:
    torch.set_num_threads(1)
    L.seed_everything(1, verbose=False)
    noted = {
        "everything": log_everything(out),
        "crowd": log_a_crowd(out),
        "plateau": follow_a_plateau(out),
        "plateau_manual": follow_a_plateau(out, manual=True),
        "plateau_besides": follow_a_plateau(out, besides=True, interval="step", factor=0.8),
    }
    rank = L.pytorch.utilities.rank_zero_only.rank
    (out / f"rank_{rank}.json").write_text(json.dumps(noted))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
