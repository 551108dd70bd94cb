"""Measure how soon the defaults reach the final losses of the fastest device alone and of DDP, in a simulated cluster.

Runs ``examples/language_model`` on the four devices of its configurations, without waiting for them: the fastest device
alone and DDP for the whole time, and the strategy's defaults for the whole time and for parts of it. Each run has a
learning-rate schedule of its own that ends with its steps. Prints one JSON line for each run, and a table::

    python benchmarks/time_to_loss.py                      # three seeds, half an hour
    python benchmarks/time_to_loss.py --seeds 0 --shares 1 0.556

DDP's gradient is that of the batches of all devices together, so it is one process with a four times larger batch here.
Its time is that of the slowest device. The exit code is 1 if the defaults miss a bar: with the whole time to end 0.25
below the fastest device alone and 0.45 below DDP, to reach the loss of the one in 1/1.5 of its time, and that of the
other in 1/1.8.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "language_model"
DEVICES = (0.100, 0.130, 0.260, 0.574)
"""Seconds per step of the devices in ``configs/simulated.yaml``."""
SHARE_USED = 0.968
"""Part of the devices' steps that an asynchronous run takes in its time."""
DDP_RATES = (2e-3, 4e-3)
BARS = {"alone": (0.25, 1 / 1.5), "ddp": (0.45, 1 / 1.8)}
"""By how much the defaults end below the others, and in which part of the time they reach their losses."""


class Run(NamedTuple):
    """A finished run: its time and the loss of its final model."""

    seconds: float
    loss: float


def train(config: str, seed: int, *options: str) -> Run:
    """Run the example, and return the time of its devices, which is 0 if it is not simulated, and its final loss."""
    command = [sys.executable, str(EXAMPLE / "train.py"), "fit", "--config", str(EXAMPLE / "configs" / config)]
    command += [f"--seed_everything={seed}", "--trainer.enable_progress_bar=false", *options]
    with tempfile.TemporaryDirectory(prefix="async_localsgd_bench_") as folder:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # Two threads wait for each other beside other programs.
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")
    loss = re.search(r"validation perplexity \S+ \(loss ([\d.]+)\)", done.stdout)
    seconds = re.search(r"local steps of all workers in ([\d.,]+) virtual s", done.stdout)
    assert loss is not None
    return Run(0.0 if seconds is None else float(seconds[1].replace(",", "")), float(loss[1]))


def alone(seconds: float, seed: int) -> Run:
    """Train on the fastest device alone."""
    steps = int(seconds / min(DEVICES))
    return Run(steps * min(DEVICES), train("single.yaml", seed, f"--trainer.max_steps={steps}").loss)


def data_parallel(seconds: float, seed: int) -> Run:
    """Train as DDP does, with the better one of two learning rates."""
    steps = int(seconds / max(DEVICES))
    options = [f"--trainer.max_steps={steps}", "--trainer.val_check_interval=100", f"--data.batch_size={4 * 4}"]
    losses = [train("single.yaml", seed, *options, f"--model.lr={rate}").loss for rate in DDP_RATES]
    return Run(steps * max(DEVICES), min(losses))


def defaults(seconds: float, seed: int) -> Run:
    """Train with the strategy's defaults."""
    steps = int(seconds * SHARE_USED * sum(1 / device for device in DEVICES) / len(DEVICES))
    return train("simulated.yaml", seed, f"--trainer.max_steps={steps}")


def main() -> int:
    """Run the command line, and return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=230.0, help="default: %(default)g")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[1.0, 1 / 1.5, 1 / 1.8, 1 / 2.3], help="parts of the time"
    )
    arguments = parser.parse_args()
    losses: dict[str, list[float]] = {}

    def note(name: str, seed: int, run: Run) -> None:
        losses.setdefault(name, []).append(run.loss)
        print(json.dumps({"run": name, "seed": seed, "seconds": round(run.seconds, 1), "loss": run.loss}), flush=True)

    for seed in arguments.seeds:
        for share in arguments.shares:
            note(f"defaults, 1/{1 / share:.3g} of the time", seed, defaults(share * arguments.seconds, seed))
        note("alone", seed, alone(arguments.seconds, seed))
        note("ddp", seed, data_parallel(arguments.seconds, seed))
    print("\n| run | final loss | of each seed |\n|---|---|---|")
    means = {name: statistics.fmean(values) for name, values in losses.items()}
    for name, values in losses.items():
        print(f"| {name} | {means[name]:.3f} | {', '.join(f'{value:.3f}' for value in values)} |")
    missed = 0
    for other, (gain, share) in BARS.items():
        for name, bar in (("defaults, 1/1 of the time", gain), (f"defaults, 1/{1 / share:.3g} of the time", 0.0)):
            if name in means and means[name] > means[other] - bar:
                print(f"missed: {name} ends {means[other] - means[name]:.3f} below {other}, the bar is {bar:g}")
                missed = 1
    return missed


if __name__ == "__main__":
    sys.exit(main())
