"""What the simulated cluster costs: as many local steps on one device with the simulator and with Lightning alone.

The language model of ``examples/language_model`` in its size ``tiny`` takes the same number of local optimizer steps,
on batches of the same size, once on a single device and once as a simulated cluster of four workers of the paper's
speeds with H = 20. Slower workers take shorter rounds, and at the end of each a push is merged and the next worker's
weights and optimizer state take their place: the simulated run has all of that, with the default rules. The two runs
take turns, each in a process of its own and each first in every other turn, so that what else the machine does falls on
both. A turn gives the ratio of their seconds of CPU time, from the first batch to the end of training: both compute in
one thread and wait for nothing, and other programs disturb that least. Reported are the median ratio and its spread.
Bar: the simulated cluster takes at most 15 % more.

Run: ``python benchmarks/simulation_overhead.py [--turns 5] [--steps 400]``
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

BAR = 0.15
SECONDS_PER_STEP = (0.58, 0.75, 1.51, 3.33)
LOCAL_STEPS = 20
VOCABULARY_SIZE, SEQUENCE_LENGTH, BATCH_SIZE = 2048, 64, 4
KINDS = ("single device", "simulated cluster")
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "language_model"


def train(kind: str, steps: int) -> None:
    """One run; prints its seconds of CPU time, and what came of it."""
    import lightning as L
    import torch
    from torch.utils.data import DataLoader

    from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy

    sys.path.insert(0, str(EXAMPLE))
    from model import LanguageModel

    torch.set_num_threads(1)
    L.seed_everything(1, verbose=False)

    class Clock(L.Callback):
        begin = end = 0.0

        def on_train_batch_start(self, *_: Any) -> None:
            self.begin = self.begin or time.process_time()

        def on_train_end(self, *_: Any) -> None:
            self.end = time.process_time()

    clock = Clock()
    simulated = kind == "simulated cluster"
    strategy: Any = "auto"
    if simulated:
        strategy = SimulatedAsyncLocalSGDStrategy(seconds_per_step=SECONDS_PER_STEP, local_steps=LOCAL_STEPS)
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        # Of a cluster, max_steps counts the local steps of each worker.
        max_steps=steps // len(SECONDS_PER_STEP) if simulated else steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    module = LanguageModel(size="tiny", vocabulary_size=VOCABULARY_SIZE, sequence_length=SEQUENCE_LENGTH)
    # What the tokens say makes no difference to the time.
    tokens: Any = torch.randint(VOCABULARY_SIZE, (steps * BATCH_SIZE, SEQUENCE_LENGTH + 1))
    trainer.fit(module, DataLoader(tokens, batch_size=BATCH_SIZE, shuffle=True))
    if not clock.begin < clock.end:
        raise RuntimeError(f"the run {kind!r} took no step")
    print(json.dumps({"seconds": clock.end - clock.begin, "global_step": trainer.global_step}))


def measure(kind: str, steps: int) -> float:
    """Seconds of CPU time of a run's training, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--run", kind, "--steps", str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the run {kind!r} failed:\n{done.stderr[-4000:]}")
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    return float(json.loads(line)["seconds"])


def report(turns: list[dict[str, float]], steps: int) -> dict[str, Any]:
    """The figures of all turns, given the seconds of each run in each turn."""
    single, simulated = KINDS
    overheads = [turn[simulated] / turn[single] - 1.0 for turn in turns]
    typical = {kind: statistics.median(turn[kind] for turn in turns) for kind in KINDS}
    return {
        "steps": steps,
        "seconds": {kind: [round(turn[kind], 3) for turn in turns] for kind in KINDS},
        "ms_per_step": {kind: round(1e3 * typical[kind] / steps, 2) for kind in KINDS},
        "overhead": round(statistics.median(overheads), 4),
        "lowest": round(min(overheads), 4),
        "highest": round(max(overheads), 4),
        "bar": BAR,
        "passed": statistics.median(overheads) <= BAR,
    }


def table(found: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [f"{'run':20}{'ms a step':>11}{'seconds':>10}{'lowest':>10}{'highest':>10}"]
    for kind in KINDS:
        times = found["seconds"][kind]
        lines.append(
            f"{kind:20}{found['ms_per_step'][kind]:11.2f}{statistics.median(times):10.2f}{min(times):10.2f}"
            f"{max(times):10.2f}"
        )
    verdict = "passed" if found["passed"] else "FAILED"
    lines.append(
        f"overhead {found['overhead']:.1%} ({found['lowest']:.1%} to {found['highest']:.1%} in {len(times)} turns), "
        f"bar {found['bar']:.0%}: {verdict}"
    )
    return "\n".join(lines)


def main() -> int:
    """Runs the benchmark; returns 1 if the simulated cluster takes more than the bar allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="how often both runs are repeated")
    parser.add_argument("--steps", type=int, default=400, help="local steps of all workers together in a run")
    parser.add_argument("--run", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 1 or options.steps % len(SECONDS_PER_STEP):
        parser.error(f"--steps {options.steps} must be a positive multiple of {len(SECONDS_PER_STEP)}, the workers")
    if options.turns < 1:
        parser.error(f"--turns {options.turns} must be at least 1")
    if options.run is not None:
        train(options.run, options.steps)
        return 0
    turns = []
    for turn in range(options.turns):
        order = KINDS if turn % 2 == 0 else KINDS[::-1]
        turns.append({kind: measure(kind, options.steps) for kind in order})
    found = report(turns, options.steps)
    print(json.dumps(found))
    print(table(found))
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
