"""Measure the cost of the strategy per step between two exchanges, and the additional cost of data leases.

Times Lightning's own loop with an almost empty model, on a single device and with ``async_localsgd``: with one rank,
and on rank 0 of two ranks whose rounds are so long that nothing is exchanged. To measure leases, the steps of both
ranks take 5 ms, in which Python is free for other threads, as during tensor operations. The runs take turns, so that
other load on the machine affects all of them. The result is the median, over all turns, of the difference between two
runs of the same turn. Bars: the strategy costs at most 1 % of a step of 20 ms, and leases at most 2 % of a step of
5 ms.

Usage: ``python benchmarks/overhead.py [--turns 5] [--steps 1000]``
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STRATEGY_BAR = 0.01 * 20e-3
LEASES_BAR = 0.02 * 5e-3
"""The bars in seconds per step."""

KINDS = {
    "single device": {"strategy": "auto", "devices": 1, "leases": False, "pause": 0.0},
    "one rank": {"strategy": "async", "devices": 1, "leases": False, "pause": 0.0},
    "two ranks": {"strategy": "async", "devices": 2, "leases": False, "pause": 0.0},
    "two ranks, 5 ms": {"strategy": "async", "devices": 2, "leases": False, "pause": 0.005},
    "two ranks, 5 ms, leases": {"strategy": "async", "devices": 2, "leases": True, "pause": 0.005},
}


def train(kind: str, steps: int) -> None:
    """Make one run. Rank 0 prints the mean seconds per step."""
    import lightning as L
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_async_localsgd import AsyncLocalSGDStrategy

    options: dict[str, Any] = KINDS[kind]
    torch.set_num_threads(1)
    L.seed_everything(1, verbose=False)

    class EmptyModel(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            # Rank 1 always sleeps, so that the two ranks do not compete for a core.
            if options["pause"] or self.global_rank > 0:
                time.sleep(options["pause"] or 0.005)
            return (self.weight - batch[0].mean()) ** 2

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    class StepTimes(L.Callback):
        def __init__(self) -> None:
            self.moments: list[float] = []

        def on_train_batch_start(self, *_: Any) -> None:
            self.moments.append(time.perf_counter())

    step_times = StepTimes()
    strategy: Any = options["strategy"]
    if strategy == "async":
        strategy = AsyncLocalSGDStrategy(local_steps=10**6, dynamic_local_steps=False)
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=options["devices"],
        use_distributed_sampler=options["leases"],
        # Rank 0 alone takes fewer steps than this while it is timed, so that no round ends before.
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[step_times],
    )
    data = DataLoader(TensorDataset(torch.zeros(8 * steps, 4)), batch_size=4, shuffle=True)
    trainer.fit(EmptyModel(), data)
    if trainer.is_global_zero:
        # Leave out the warm-up at the beginning and the push at the end.
        moments = step_times.moments[len(step_times.moments) // 10 : -len(step_times.moments) // 10]
        print(json.dumps({"seconds": (moments[-1] - moments[0]) / (len(moments) - 1)}))


def measure(kind: str, steps: int) -> float:
    """Make a run in its own process, and return the mean seconds per step."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--run", kind, "--steps", str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"The run {kind!r} ended with exit code {done.returncode}:\n{done.stderr[-4000:]}")
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    return float(json.loads(line)["seconds"])


def main() -> int:
    """Run the benchmark, and return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="repeats of each kind of run")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each rank")
    parser.add_argument("--run", choices=list(KINDS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        train(options.run, options.steps)
        return 0
    turns = [{kind: measure(kind, options.steps) for kind in KINDS} for _ in range(options.turns)]
    for kind in KINDS:
        times = [turn[kind] * 1e6 for turn in turns]
        print(f"{kind:24} {statistics.median(times):7.1f} us per step ({min(times):.1f} to {max(times):.1f})")
    passed = True
    for title, kind, base, bar in (
        ("strategy, one rank", "one rank", "single device", STRATEGY_BAR),
        ("strategy, two ranks", "two ranks", "single device", STRATEGY_BAR),
        ("leases, two ranks", "two ranks, 5 ms, leases", "two ranks, 5 ms", LEASES_BAR),
    ):
        cost = statistics.median(turn[kind] - turn[base] for turn in turns)
        passed &= cost <= bar
        print(json.dumps({"cost": title, "us": round(cost * 1e6, 1), "bar_us": bar * 1e6, "passed": cost <= bar}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
