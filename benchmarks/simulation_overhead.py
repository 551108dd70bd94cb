"""Measures the overhead of the simulator: the same number of local steps with the simulator and with Lightning alone.

The language model of ``examples/language_model`` in size ``tiny`` takes the same number of local optimizer steps, on
batches of the same size, in two runs: on a single device, and as a simulated cluster of four workers with the paper's
speeds and H = 20. The simulated run uses the default options. At the end of each round, it merges a push and loads the
weights and the optimizer state of the next worker.

The two runs are repeated alternately, each in its own process, and the order changes with each repetition, so that
other load on the machine affects both runs alike. A repetition gives the ratio of the CPU times from the first batch
to the end of training. Both runs compute in one thread and never wait, so CPU time is hardly disturbed by other
programs. The report has the median ratio and its range. The benchmark passes if the simulated cluster takes at most
15 % more CPU time.

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

LIMIT = 0.15
"""Largest overhead that passes."""
SECONDS_PER_STEP = (0.58, 0.75, 1.51, 3.33)
LOCAL_STEPS = 20
VOCABULARY_SIZE, SEQUENCE_LENGTH, BATCH_SIZE = 2048, 64, 4
KINDS = ("single device", "simulated cluster")
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "language_model"


def train(kind: str, steps: int) -> None:
    """Train one run, and print its CPU seconds and global steps as JSON."""
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
        # In a simulated cluster, max_steps are the local steps of each worker on average.
        max_steps=steps // len(SECONDS_PER_STEP) if simulated else steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    module = LanguageModel(size="tiny", vocabulary_size=VOCABULARY_SIZE, sequence_length=SEQUENCE_LENGTH)
    # The content of the tokens does not affect the time.
    tokens: Any = torch.randint(VOCABULARY_SIZE, (steps * BATCH_SIZE, SEQUENCE_LENGTH + 1))
    trainer.fit(module, DataLoader(tokens, batch_size=BATCH_SIZE, shuffle=True))
    if not clock.begin < clock.end:
        raise RuntimeError(f"the run {kind!r} took no step")
    print(json.dumps({"seconds": clock.end - clock.begin, "global_step": trainer.global_step}))


def measure(kind: str, steps: int) -> float:
    """Train a run in its own process, and return the CPU seconds of its training."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--run", kind, "--steps", str(steps)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    if process.returncode != 0:
        raise RuntimeError(f"the run {kind!r} failed:\n{process.stderr[-4000:]}")
    line = next(line for line in reversed(process.stdout.splitlines()) if line.startswith("{"))
    return float(json.loads(line)["seconds"])


def report(repetitions: list[dict[str, float]], steps: int) -> dict[str, Any]:
    """Compute the result of all repetitions.

    Args:
        repetitions: CPU seconds of each run by kind, for each repetition.
        steps: local steps of a run.

    """
    single, simulated = KINDS
    overheads = [seconds[simulated] / seconds[single] - 1.0 for seconds in repetitions]
    typical = {kind: statistics.median(seconds[kind] for seconds in repetitions) for kind in KINDS}
    return {
        "steps": steps,
        "seconds": {kind: [round(seconds[kind], 3) for seconds in repetitions] for kind in KINDS},
        "ms_per_step": {kind: round(1e3 * typical[kind] / steps, 2) for kind in KINDS},
        "overhead": round(statistics.median(overheads), 4),
        "lowest": round(min(overheads), 4),
        "highest": round(max(overheads), 4),
        "limit": LIMIT,
        "passed": statistics.median(overheads) <= LIMIT,
    }


def table(result: dict[str, Any]) -> str:
    """Format a result as text."""
    lines = [f"{'run':20}{'ms/step':>11}{'seconds':>10}{'lowest':>10}{'highest':>10}"]
    for kind in KINDS:
        times = result["seconds"][kind]
        lines.append(
            f"{kind:20}{result['ms_per_step'][kind]:11.2f}{statistics.median(times):10.2f}{min(times):10.2f}"
            f"{max(times):10.2f}"
        )
    verdict = "passed" if result["passed"] else "FAILED"
    lines.append(
        f"overhead {result['overhead']:.1%} ({result['lowest']:.1%} to {result['highest']:.1%} in "
        f"{len(times)} repetitions), limit {result['limit']:.0%}: {verdict}"
    )
    return "\n".join(lines)


def main() -> int:
    """Run the benchmark, and return 1 if the overhead exceeds the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="repetitions of both runs")
    parser.add_argument("--steps", type=int, default=400, help="local steps of a run, all workers together")
    parser.add_argument("--run", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 1 or options.steps % len(SECONDS_PER_STEP):
        parser.error(
            f"--steps {options.steps} must be a positive multiple of {len(SECONDS_PER_STEP)}, the number of workers"
        )
    if options.turns < 1:
        parser.error(f"--turns {options.turns} must be at least 1")
    if options.run is not None:
        train(options.run, options.steps)
        return 0
    repetitions = []
    for number in range(options.turns):
        order = KINDS if number % 2 == 0 else KINDS[::-1]
        repetitions.append({kind: measure(kind, options.steps) for kind in order})
    result = report(repetitions, options.steps)
    print(json.dumps(result))
    print(table(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
