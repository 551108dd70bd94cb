"""One run of the study in real processes on emulated devices: ``running.py`` starts this script."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from benchmarks.study import running, text
from benchmarks.study.cells import Cell, strategy_options
from benchmarks.study.running import Curve, MemoryLogger, Places
from lightning_async_localsgd import AsyncLocalSGDCallback, AsyncLocalSGDStrategy
from lightning_async_localsgd.emulation import EmulatedDevices

TIME_SCALE = 0.1
"""Seconds on this machine for a second of the devices."""


def train(cell: Cell, seed: int, places: Places, time_scale: float = TIME_SCALE) -> dict[str, Any] | None:
    """One rank's part of a run.

    Returns:
        On rank 0 the line of JSON, with all times in seconds of the devices; elsewhere None.

    """
    running.quiet()
    began = time.perf_counter()
    start = running.warm_start(cell, seed, places)
    corpus = running.load(cell, places)
    pl.seed_everything(seed, verbose=False)
    module = running.prepare(cell, start)
    curve = Curve(cell, corpus)
    with tempfile.TemporaryDirectory(prefix="async_localsgd_study_") as name:
        folder = Path(name)
        clock = Clock(time_scale)
        logger = MemoryLogger(folder, (running.COSINE,))
        trainer = pl.Trainer(
            strategy=AsyncLocalSGDStrategy(**strategy_options(cell)),
            max_steps=cell.steps,
            val_check_interval=curve.interval,
            logger=logger,
            callbacks=[
                EmulatedDevices([seconds * time_scale for seconds in cell.seconds_per_step]),
                clock,
                curve,
                AsyncLocalSGDCallback(table=False, ledger=folder / "ledger.jsonl"),
            ],
            **{**running.trainer_options(), "devices": cell.workers},
        )
        curve.begin(module, clock)
        trainer.fit(module, text.loader(corpus.mixture, running.BATCH), curve.loader)
        if not trainer.is_global_zero:
            return None
        found = running.of_the_run(cell, folder, time_scale)
        cosine = [[step * cell.workers, round(value, 4)] for step, value in logger.logged[running.COSINE]]
    return {
        **running.header(cell, seed),
        "time_scale": time_scale,
        **found,
        "cosine": cosine,
        **curve.finish(module, found["seconds"]),
        "wall_seconds": round(time.perf_counter() - began, 1),
    }


class Clock(pl.Callback):
    """Seconds of the devices since training began."""

    def __init__(self, time_scale: float) -> None:
        self._time_scale = time_scale
        self._began = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = time.monotonic()

    def __call__(self) -> float:
        return (time.monotonic() - self._began) / self._time_scale


def main() -> None:
    """Trains, and writes the line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cell", help="its fields as JSON, learning rates included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=text.DEFAULT_DATA)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--time-scale", type=float, default=TIME_SCALE, help="default: %(default)s")
    given = parser.parse_args()
    found = train(Cell(**json.loads(given.cell)), given.seed, Places(given.data, given.cache), given.time_scale)
    if found is not None:
        given.output.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
