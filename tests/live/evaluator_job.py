"""A fit with an evaluator: ``python evaluator_job.py OUT JSON``.

Every process appends to ``OUT/validations.jsonl`` what it has validated. Rank 0 writes ``OUT/rank_0.json``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import Logger

from lightning_async_localsgd import AsyncLocalSGDStrategy, ExchangeOptions
from tests.lightning_models import Regression, digest, loader, network, quiet_trainer


class Model(Regression):
    """A regression whose learning rate follows the validation loss.

    Args:
        out: folder of the job.
        options: options of the job.

    """

    def __init__(self, out: Path, options: dict[str, Any]) -> None:
        other = options.get("evaluator_with_other_model") and os.environ.get("ASYNC_LOCALSGD_ROLE") == "evaluator"
        super().__init__(network(width=3) if other else None)
        self.out = out
        self.options = options
        self.validations = 0
        self.steps = 0

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        """Wait for a result that is long out, so that on a slow machine, too, no validation is skipped."""
        if not self.trainer.is_global_zero:
            return
        skipping = self.options.get("skips_until", 0) > self.trainer.global_step
        if not skipping:
            (self.out / "skipped").touch()
        strategy = self.trainer.strategy
        delegated, results = strategy.controller._delegated, strategy.runtime.server.evaluations.results
        deadline = time.monotonic() + 120.0
        while self.options.get("awaits_evaluator") and not strategy.runtime.server.evaluations.present:
            assert time.monotonic() < deadline, "no evaluator has joined"
            time.sleep(0.005)
        while (
            not skipping
            and delegated._out is not None
            and self.trainer.global_step >= delegated._out.step + 8
            and results.empty()
            and time.monotonic() < deadline
        ):
            time.sleep(0.005)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        time.sleep(0.01)
        self.steps += 1
        dies = self.steps == self.options.get("worker_1_dies_at") and self.global_rank == 1
        if dies and "ASYNC_LOCALSGD_REJOIN" not in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, index)

    def on_validation_start(self) -> None:
        self.validations += 1
        if self.trainer.global_rank > 0 and self.validations == self.options.get("dies_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        deadline = time.monotonic() + 60.0
        while "skips_until" in self.options and not (self.out / "skipped").exists():
            assert time.monotonic() < deadline, "rank 0 did not go on"
            time.sleep(0.005)

    def validation_step(self, batch: Any, index: int) -> None:
        time.sleep(self.options.get("validation_seconds", 0.02))
        super().validation_step(batch, index)
        self.log("worse", float(self.global_step))

    def on_validation_end(self) -> None:
        weights = digest({name: value.float() for name, value in self.state_dict().items()})
        seen = {"pid": os.getpid(), "step": self.global_step, "epoch": self.current_epoch, "digest": weights}
        with (self.out / "validations.jsonl").open("a") as file:
            file.write(json.dumps({**seen, "val_loss": float(self.trainer.callback_metrics["val_loss"])}) + "\n")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1000)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


class Logged(Logger):
    """Records the validation losses by step."""

    name, version, save_dir = "logged", 0, None

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[tuple[int, float]] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Record nothing."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "val_loss" in metrics:
            assert step is not None
            self.losses.append((step, metrics["val_loss"]))


def run(out: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    L.seed_everything(0)
    evaluates = os.environ.get("ASYNC_LOCALSGD_ROLE") == "evaluator"
    saved = ModelCheckpoint(out / "saved", monitor="val_loss", save_top_k=-1)
    stops = EarlyStopping(options.get("stops_on", "val_loss"), patience=options.get("patience", 1000))
    logger = Logged()
    exchange = ExchangeOptions(**options.get("exchange", {}))
    trainer = quiet_trainer(
        AsyncLocalSGDStrategy(local_steps=5, exchange=exchange, **options.get("strategy", {"evaluator": True})),
        devices=2,
        num_sanity_val_steps=0,
        logger=logger,
        log_every_n_steps=1,
        callbacks=[saved, stops],
        default_root_dir=out,
        **options["trainer"],
    )
    model = Model(out, options)
    without_data = evaluates and options.get("evaluator_without_data")
    trainer.fit(model, loader(options.get("samples", 2048)), loader(0 if without_data else 32, shuffle=False))
    if trainer.is_global_zero:
        found = {
            "pid": os.getpid(),
            "losses": logger.losses,
            "steps": trainer.global_step,
            "saved": {Path(path).name: float(value) for path, value in saved.best_k_models.items()},
            "digests": {
                Path(path).name: digest(torch.load(path, weights_only=True)["state_dict"])
                for path in saved.best_k_models
            },
            "plateau_steps": trainer.lr_scheduler_configs[0].scheduler.last_epoch,
            "stopped_epoch": stops.stopped_epoch,
        }
        (out / "rank_0.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run(Path(sys.argv[1]), json.loads(sys.argv[2]))
