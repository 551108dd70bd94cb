"""Run one cell in real processes on emulated devices. ``running.py`` starts this script."""

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
from benchmarks.study.running import LossCurve, MemoryLogger, RunContext
from lightning_async_localsgd import AsyncLocalSGDCallback, AsyncLocalSGDStrategy
from lightning_async_localsgd.emulation import EmulatedDevices

TIME_SCALE = 0.1
"""Seconds on this machine per second of the devices."""


def train(cell: Cell, seed: int, context: RunContext, time_scale: float = TIME_SCALE) -> dict[str, Any] | None:
    """Run the part of one rank.

    Returns:
        On rank 0 the result for the line of JSON, with all times in seconds of the devices. On other ranks None.

    """
    running.configure_process()
    began = time.perf_counter()
    start = running.make_warm_start(cell, seed, context)
    corpus = running.load_corpus(cell, context)
    pl.seed_everything(seed, verbose=False)
    module = running.make_module(cell, start)
    curve = LossCurve(cell, corpus)
    with tempfile.TemporaryDirectory(prefix="async_localsgd_study_") as name:
        folder = Path(name)
        clock = DeviceClock(time_scale)
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
                AsyncLocalSGDCallback(table=False, events=folder / "events.jsonl", max_event_megabytes=None),
            ],
            **{**running.trainer_options(), "devices": cell.workers},
        )
        curve.begin(module, clock)
        trainer.fit(module, text.make_loader(corpus.mixture, running.BATCH), curve.loader)
        if not trainer.is_global_zero:
            return None
        result = running.read_run_files(cell, folder, time_scale)
        cosine = [[step * cell.workers, round(value, 4)] for step, value in logger.logged[running.COSINE]]
    return {
        **running.describe_run(cell, seed),
        "time_scale": time_scale,
        **result,
        "cosine": cosine,
        **curve.finish(module, result["seconds"]),
        "wall_seconds": round(time.perf_counter() - began, 1),
    }


class DeviceClock(pl.Callback):
    """Measures the seconds of the devices since the start of training.

    Args:
        time_scale: seconds on this machine per second of the devices.

    """

    def __init__(self, time_scale: float) -> None:
        self._time_scale = time_scale
        self._began = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = time.monotonic()

    def __call__(self) -> float:
        return (time.monotonic() - self._began) / self._time_scale


def main() -> None:
    """Train, and write the line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cell", help="the fields of the cell as JSON, with learning rates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=text.DEFAULT_DATA)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--time-scale", type=float, default=TIME_SCALE, help="default: %(default)s")
    arguments = parser.parse_args()
    result = train(
        Cell(**json.loads(arguments.cell)),
        arguments.seed,
        RunContext(arguments.data, arguments.cache),
        arguments.time_scale,
    )
    if result is not None:
        arguments.output.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
