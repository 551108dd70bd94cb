"""What the strategy costs in a step between two exchanges, and what leasing data adds to it.

Lightning's own loop around a model that does next to nothing is timed on a single device and with ``async_localsgd``:
on one rank, and on rank 0 of two whose rounds are so long that nothing is exchanged. For the leases both ranks' steps
take 5 ms, in which Python is free for other threads as it is while tensors are computed. The runs take turns, so that
what else the machine does falls on all of them; what is reported is the median over the turns of the difference to the
other run of the same turn. Bars: the strategy costs at most 1 % of a step of 20 ms, leasing at most 2 % of one of 5 ms.

Run: ``python benchmarks/overhead.py [--turns 5] [--steps 1000]``
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
"""Seconds a step."""

KINDS = {
    "single device": {"strategy": "auto", "devices": 1, "leases": False, "pause": 0.0},
    "one rank": {"strategy": "async", "devices": 1, "leases": False, "pause": 0.0},
    "two ranks": {"strategy": "async", "devices": 2, "leases": False, "pause": 0.0},
    "two ranks, 5 ms": {"strategy": "async", "devices": 2, "leases": False, "pause": 0.005},
    "two ranks, 5 ms, leases": {"strategy": "async", "devices": 2, "leases": True, "pause": 0.005},
}


def train(kind: str, steps: int) -> None:
    """One run; rank 0 prints the mean seconds of a step."""
    import lightning as L
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_async_localsgd import AsyncLocalSGDStrategy

    options: dict[str, Any] = KINDS[kind]
    torch.set_num_threads(1)
    L.seed_everything(1, verbose=False)

    class Nothing(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            # The other one of two ranks always sleeps, so that they do not compete for a core.
            if options["pause"] or self.global_rank > 0:
                time.sleep(options["pause"] or 0.005)
            return (self.weight - batch[0].mean()) ** 2

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    class Clock(L.Callback):
        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_train_batch_start(self, *_: Any) -> None:
            self.marks.append(time.perf_counter())

    clock = Clock()
    strategy: Any = options["strategy"]
    if strategy == "async":
        strategy = AsyncLocalSGDStrategy(local_steps=10**6, dynamic_local_steps=False)
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=options["devices"],
        use_distributed_sampler=options["leases"],
        # More than rank 0 alone takes while it is timed: no round ends before.
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    data = DataLoader(TensorDataset(torch.zeros(8 * steps, 4)), batch_size=4, shuffle=True)
    trainer.fit(Nothing(), data)
    if trainer.is_global_zero:
        # The first steps warm up; at the end a round is handed in.
        marks = clock.marks[len(clock.marks) // 10 : -len(clock.marks) // 10]
        print(json.dumps({"seconds": (marks[-1] - marks[0]) / (len(marks) - 1)}))


def measure(kind: str, steps: int) -> float:
    """Mean seconds of a step of a run in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--run", kind, "--steps", str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the run {kind!r} failed:\n{done.stderr[-4000:]}")
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    return float(json.loads(line)["seconds"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="how often each kind of run is repeated")
    parser.add_argument("--steps", type=int, default=1000, help="steps of a rank in a run")
    parser.add_argument("--run", choices=list(KINDS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        train(options.run, options.steps)
        return 0
    turns = [{kind: measure(kind, options.steps) for kind in KINDS} for _ in range(options.turns)]
    for kind in KINDS:
        times = [turn[kind] * 1e6 for turn in turns]
        print(f"{kind:24} {statistics.median(times):7.1f} us a step ({min(times):.1f} to {max(times):.1f})")
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
