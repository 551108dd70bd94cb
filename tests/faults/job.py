"""A run with injected faults: ``python job.py OUT JSON``.

Each process writes its steps and the answers to its pushes to ``OUT/notes_<worker>_<life>.txt``. At the end of fit, it
writes ``OUT/rank_<n>.json``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from benchmarks.step_notes import StepNotes
from lightning_async_localsgd import (
    AsyncLocalSGDCallback,
    AsyncLocalSGDStrategy,
    DelayedNesterov,
    ExchangeOptions,
    wire,
)
from lightning_async_localsgd.faults import Fault, FaultInjection, FaultKind
from lightning_async_localsgd.lightning.fault_injection import life_number
from lightning_async_localsgd.server import line_file
from tests.lightning_models import Pace, Regression, digest, loader, quiet_trainer, regression_data

NOISE = 0.3
"""Standard deviation of the noise in the targets. The loss cannot fall below its square."""

# The tests kill rank 0, and look for every push that was answered before.
line_file.BATCH_SECONDS = 0.0

LEAST_STEPS = 600
"""Minimum number of local steps of all ranks together, so that the losses of runs can be compared."""

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""From these, data libraries learn which part of the data a process reads."""


def model(width: int) -> Regression:
    """Return a small regression. With ``width=1024``, the model has several parts on the wire."""
    layers: list[torch.nn.Module] = [torch.nn.Linear(8, width), torch.nn.Tanh()]
    if width > 256:
        layers += [torch.nn.Linear(width, width), torch.nn.Tanh()]
    return Regression(torch.nn.Sequential(*layers, torch.nn.Linear(width, 1)), torch.optim.AdamW, 1e-3)


def noisy(inputs: torch.Tensor) -> torch.Tensor:
    """Return targets with noise."""
    noise = torch.randn(len(inputs), 1, generator=torch.Generator().manual_seed(len(inputs)))
    return inputs[:, :1].tanh() + 0.5 * inputs[:, 2:3] + NOISE * noise


class RunEnd(Pace):
    """Slows steps down, ends the run, and notes its result.

    Args:
        out: folder of the notes.
        seconds: minimum duration of a step.
        until: the run ends when these processes have this number of answered pushes, by ``<worker>_<life>``.
        held: whether the run also waits for a file ``stop``.

    """

    def __init__(self, out: Path, seconds: float, until: dict[str, int], held: bool) -> None:
        super().__init__([seconds])
        self.out = out
        self.until = until
        self.held = held
        self.environment: list[str | None] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        super().on_train_batch_end(trainer, module)
        self.environment = [os.environ.get(name) for name in RANK_VARIABLES]
        if trainer.is_global_zero and trainer.global_step * trainer.world_size >= LEAST_STEPS:
            may_stop = not self.held or (self.out / "stop").exists()
            has_pushed = all(self.answers(name) >= count for name, count in self.until.items())
            trainer.should_stop = may_stop and has_pushed

    def answers(self, name: str) -> int:
        notes = self.out / f"notes_{name}.txt"
        return notes.read_text().count("\nanswer") if notes.exists() else 0

    def on_fit_end(self, trainer: L.Trainer, module: Regression) -> None:
        with torch.no_grad():
            loss = float(module.loss(regression_data(2000, noisy, seed=7).tensors))
        noted = {
            "rank": trainer.global_rank,
            "digest": digest(module.state_dict()),
            "loss": loss,
            "life": life_number(),
            "environment": self.environment,
        }
        (self.out / f"rank_{trainer.global_rank}.json").write_text(json.dumps(noted))


def take_detours(detours: dict[str, str]) -> None:
    """Let ranks connect to a proxy's address instead of the server's, by rank."""

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
        RunEnd(out, seconds, options.get("until", {}), bool(options.get("held"))),
        AsyncLocalSGDCallback(events=out / "events.jsonl", max_event_megabytes=None),
    ]
    faults = [Fault(**{**fault, "kind": FaultKind[fault["kind"]]}) for fault in options.get("faults", [])]
    if faults:
        callbacks.append(FaultInjection(faults))
    strategy = AsyncLocalSGDStrategy(
        local_steps=options.get("local_steps", 10),
        # With the default momentum, such a short run ends within oscillations, and its loss cannot be compared.
        outer_optimizer=DelayedNesterov(lr=0.7, momentum=0.5),
        exchange=ExchangeOptions(**{"start_timeout": 60.0, **options.get("exchange", {})}),
        **options.get("strategy", {}),
    )
    trainer = quiet_trainer(
        strategy,
        devices=options.get("ranks", 2),
        num_nodes=options.get("nodes", 1),
        logger=CSVLogger(out, name="", version=""),
        callbacks=callbacks,
        limit_val_batches=0,
        default_root_dir=out,
        max_steps=-1,
        max_epochs=-1,
    )
    trainer.fit(model(options.get("width", 32)), loader(160_000, batch_size=16, target=noisy))


if __name__ == "__main__":
    run(Path(sys.argv[1]), json.loads(sys.argv[2]))
