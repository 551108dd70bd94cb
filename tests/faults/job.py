"""The training job that the tests of this folder run as real processes: ``python job.py OUT JSON``.

Every process notes its steps and the answers to its pushes in ``OUT/notes_<worker>_<life>.txt``. Those that come to
the end of the fit write ``OUT/rank_<n>.json``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.step_notes import StepNotes
from lightning_async_localsgd import (
    AsyncLocalSGDCallback,
    AsyncLocalSGDStrategy,
    DelayedNesterov,
    ExchangeOptions,
    wire,
)
from lightning_async_localsgd.faults import Fault, FaultInjection, FaultKind, life_number
from tests.live.job import digest

NOISE = 0.3
"""Of the targets: the loss cannot come below its square."""

LEAST_STEPS = 600
"""Local steps of all ranks together; the run may end after them, so that what runs have learned can be compared."""


class Regression(L.LightningModule):
    """A small regression; with ``width=1024`` a model of several parts on the wire."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = [torch.nn.Linear(8, width), torch.nn.Tanh()]
        if width > 256:
            layers += [torch.nn.Linear(width, width), torch.nn.Tanh()]
        self.net = torch.nn.Sequential(*layers, torch.nn.Linear(width, 1))

    def loss(self, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.net(inputs), targets)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def samples(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 8, generator=generator)
    targets = inputs[:, :1].tanh() + 0.5 * inputs[:, 2:3]
    return TensorDataset(inputs, targets + NOISE * torch.randn(count, 1, generator=generator))


class End(L.Callback):
    """Holds this process to a speed, ends the run, and notes what it has come to.

    Args:
        out: folder of the notes.
        seconds: least duration of a step.
        until: answered pushes of certain processes before it may, by ``<worker>_<life>``.
        held: it may not before there is a file ``stop``.

    """

    def __init__(self, out: Path, seconds: float, until: dict[str, int], held: bool) -> None:
        self.out = out
        self.seconds = seconds
        self.until = until
        self.held = held

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        time.sleep(self.seconds)
        if trainer.is_global_zero and trainer.global_step * trainer.world_size >= LEAST_STEPS:
            free = not self.held or (self.out / "stop").exists()
            trainer.should_stop = free and all(self.answers(name) >= least for name, least in self.until.items())

    def answers(self, name: str) -> int:
        notes = self.out / f"notes_{name}.txt"
        return notes.read_text().count("\nanswer") if notes.exists() else 0

    def on_fit_end(self, trainer: L.Trainer, module: Regression) -> None:
        with torch.no_grad():
            loss = float(module.loss(samples(2000, seed=7).tensors))
        noted = {"rank": trainer.global_rank, "digest": digest(module), "loss": loss, "life": life_number()}
        (self.out / f"rank_{trainer.global_rank}.json").write_text(json.dumps(noted))


def take_detours(detours: dict[str, str]) -> None:
    """Has ranks dial other addresses than the server's own: those of proxies."""

    class Detour(wire.WireExchange):
        def join(self, hello: Any, model: torch.Tensor) -> Any:
            if str(hello.worker) in detours:
                self._endpoints = dataclasses.replace(self._endpoints, address=detours[str(hello.worker)])
            return super().join(hello, model)

    wire.WireExchange = Detour


def run(out: Path, options: dict[str, Any]) -> None:
    logging.basicConfig(format="%(message)s")
    L.seed_everything(1, verbose=False)
    torch.set_num_threads(1)
    take_detours(options.get("detour", {}))
    seconds = options.get("seconds", 0.03)
    callbacks: list[L.Callback] = [
        StepNotes(out),
        End(out, seconds, options.get("until", {}), bool(options.get("held"))),
        AsyncLocalSGDCallback(ledger=out / "ledger.jsonl"),
    ]
    faults = [Fault(**{**fault, "kind": FaultKind[fault["kind"]]}) for fault in options.get("faults", [])]
    if faults:
        callbacks.append(FaultInjection(faults))
    strategy = AsyncLocalSGDStrategy(
        local_steps=options.get("local_steps", 10),
        # With the default's momentum so short a run ends in the midst of oscillations, and what it has learned cannot
        # be compared.
        outer_optimizer=DelayedNesterov(lr=0.7, momentum=0.5),
        start_timeout=60.0,
        exchange=ExchangeOptions(**options.get("exchange", {})),
        **options.get("strategy", {}),
    )
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=options.get("ranks", 2),
        num_nodes=options.get("nodes", 1),
        logger=CSVLogger(out, name="", version=""),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        default_root_dir=out,
        max_steps=-1,
        max_epochs=-1,
    )
    trainer.fit(
        Regression(options.get("width", 32)),
        DataLoader(samples(options.get("samples", 160_000), seed=0), batch_size=16, shuffle=True),
    )


if __name__ == "__main__":
    run(Path(sys.argv[1]), json.loads(sys.argv[2]))
