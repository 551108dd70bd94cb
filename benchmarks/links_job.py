"""Trains over a slow link, live and simulated, for ``links.py``: ``python links_job.py DIRECTORY JSON``.

The module has a given number of parameters and computes almost nothing. Its steps take as long as those of an emulated
device. Rank 0 notes each push of each run in ``DIRECTORY/<way>-<mode>.jsonl``. The other ranks note how long their
training threads stood still, in ``DIRECTORY/live-<mode>-<rank>.json``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_async_localsgd import (
    AsyncLocalSGDCallback,
    AsyncLocalSGDStrategy,
    EmulatedDevices,
    ExchangeOptions,
    Link,
    SimulatedAsyncLocalSGDStrategy,
    wire,
)
from lightning_async_localsgd.outer import Nesterov


class Model(pl.LightningModule):
    """Has parameters that are exchanged and never change, and a step that costs nothing.

    Args:
        parameters: number of parameters.

    """

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.parts = torch.nn.ParameterList(
            torch.nn.Parameter(torch.linspace(-1.0, 1.0, len(part))) for part in torch.empty(parameters).chunk(8)
        )
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.weight**2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=0.1)


class BlockedTime(pl.Callback):
    """Measures how long the training thread stands still at the ends of steps, for packing, exchanges and waiting.

    Args:
        path: file of the result.
        last_rank: number of the last rank. Rank 0 ends training once that rank has taken its rounds.
        rounds: rounds that each rank above 0 takes at least.

    Attributes:
        adopted: seconds, blocked seconds and steps of this rank when it had adopted each model.

    """

    def __init__(self, path: Path, last_rank: int, rounds: int) -> None:
        self._path = path
        self._ranks = range(1, last_rank + 1)
        self._rounds = rounds
        self.adopted: list[tuple[float, float, int]] = []
        self._is_measuring = False

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._is_measuring:
            return
        self._is_measuring = True
        runtime: Any = trainer.strategy.runtime  # type: ignore[attr-defined]
        end_step = runtime.end_step
        blocked, steps = 0.0, 0

        def timed() -> bool:
            nonlocal blocked, steps
            began = time.monotonic()
            adopted: bool = end_step()
            ended = time.monotonic()
            blocked += ended - began
            steps += 1
            if adopted and not runtime.stopped:
                self.adopted.append((ended, blocked, steps))
            return adopted

        if runtime.virtual_seconds is None:
            runtime.end_step = timed

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            totals = trainer.strategy.runtime.totals()  # type: ignore[attr-defined]
            trainer.should_stop = all(rank in totals and totals[rank].rounds >= self._rounds for rank in self._ranks)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank:
            self._path.with_name(f"{self._path.stem}-{trainer.global_rank}.json").write_text(json.dumps(self.adopted))


def take_detours(detours: dict[str, str]) -> None:
    """Let ranks connect to the address of a link instead of the server's, by rank."""

    class Detour(wire.WireExchange):
        def join(self, hello: Any, model: Tensor) -> Any:
            self._endpoints = dataclasses.replace(self._endpoints, address=detours[str(hello.worker)])
            return super().join(hello, model)

    wire.WireExchange = Detour  # type: ignore[misc]


def train(options: dict[str, Any], mode: dict[str, Any], path: Path, live: bool) -> None:
    """Train with one way of exchanging, live or simulated."""
    ranks, seconds = options["ranks"], options["seconds_per_step"]
    common: dict[str, Any] = {
        "local_steps": options["local_steps"],
        "dynamic_local_steps": False,
        "outer_optimizer": Nesterov(0.5),
        "grace": 0.0,
        "checkpoint_every": None,
    }
    last = BlockedTime(path, ranks - 1, options["rounds"] + 2)
    callbacks: list[pl.Callback] = [last, AsyncLocalSGDCallback(table=False, events=path, max_event_megabytes=None)]
    strategy: Any
    if live:
        exchange = ExchangeOptions(transport="tcp", port=options["port"], encrypt=False, **mode)
        strategy = AsyncLocalSGDStrategy(exchange=exchange, start_method="fork", **common)
        callbacks.insert(0, EmulatedDevices([seconds] * ranks))
    else:
        link = Link(options["delay"], options["bytes_per_second"])
        strategy = SimulatedAsyncLocalSGDStrategy(
            [seconds] * ranks, exchange_seconds=[Link(), *[link] * (ranks - 1)], **mode, **common
        )
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=ranks if live else 1,
        max_steps=-1,
        max_epochs=-1,
        callbacks=callbacks,
        default_root_dir=path.parent,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Model(options["parameters"]), DataLoader(range(10**7), batch_size=1))  # type: ignore[arg-type]


def main(directory: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    take_detours(options["detours"])
    for name, mode in options["modes"].items():
        train(options, mode, directory / f"live-{name}.jsonl", live=True)
        train(options, mode, directory / f"simulated-{name}.jsonl", live=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
