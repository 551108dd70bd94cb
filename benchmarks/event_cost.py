"""Measure what the event file costs rank 0: ``python benchmarks/event_cost.py [--workers K] [--seconds S]``.

K workers push once in 20 ms, in real time, to a coordinator of a model with one parameter, so that everything else
costs little. The threads of rank 0 share one interpreter, so what counts is the processor time of all of them. It is
measured with the event file, with the file of :class:`.LineFile` left out, and without any observer. Rounds have one
step, which is the worst case: a round of H steps costs 1/H of it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_async_localsgd.outer import SGD
from lightning_async_localsgd.policies.budget import Budget
from lightning_async_localsgd.policies.grace import GraceWindow
from lightning_async_localsgd.policies.pacing import SpeedAwareSteps
from lightning_async_localsgd.protocol.layout import Layout
from lightning_async_localsgd.protocol.messages import PROTOCOL_VERSION, Hello, Push
from lightning_async_localsgd.server.begin_event import begin_event
from lightning_async_localsgd.server.coordinator import Coordinator
from lightning_async_localsgd.server.global_model import GlobalModel
from lightning_async_localsgd.server.journal import Journal
from lightning_async_localsgd.server.line_file import LineFile
from lightning_async_localsgd.server.observers import RunObserver

STEP_SECONDS = 0.02
MODES = ("nothing", "journal", "file")


class _ToFile(RunObserver):
    def __init__(self, file: LineFile) -> None:
        self._file = file

    def on_line(self, line: dict[str, Any]) -> None:
        self._file.write(line)


def seconds_per_push(workers: int, pushes: int, mode: str, folder: Path) -> float:
    """Return the processor seconds of a push and its dispatch."""
    layout = Layout.of(nn.Linear(1, 1, bias=False))
    model = GlobalModel(layout, SGD(1.0), workers)
    coordinator = Coordinator(
        model, SpeedAwareSteps(1), GraceWindow(0.0), Budget(None), cohort=workers, incarnation="benchmark"
    )
    file = LineFile(folder / "events.jsonl", max_bytes=256_000_000) if mode == "file" else None
    if mode != "nothing":
        coordinator.observers.add([Journal(coordinator.observers.on_line, {})])
    if file is not None:
        coordinator.observers.add([_ToFile(file)])
    coordinator.observers.on_event(begin_event(coordinator, 0.0))
    for worker in range(workers):
        coordinator.join(Hello(PROTOCOL_VERSION, worker, f"session-{worker}", layout.fingerprint), 0.0)
    coordinator.dispatch(0.0)
    versions, gradient = dict.fromkeys(range(workers), 0), torch.full((1,), 1e-3)
    begin, started = time.process_time(), time.monotonic()
    for number in range(pushes):
        worker, now = number % workers, STEP_SECONDS * number / workers
        time.sleep(max(0.0, started + now - time.monotonic()))
        push = Push(
            worker, f"session-{worker}", number // workers + 1, "benchmark", versions[worker], 1, 8, 1, STEP_SECONDS,
            0.001, False, False,
        )  # fmt: skip
        coordinator.push(push, gradient, now)
        for other, reply in coordinator.dispatch(now).items():
            versions[other] = reply.version
    if file is not None:
        file.close()
    return (time.process_time() - begin) / pushes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=4, help="number of workers (default: 4)")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds of each repetition (default: 5)")
    parser.add_argument("--repetitions", type=int, default=5, help="repetitions of each kind (default: 5)")
    options = parser.parse_args()
    pushes = round(options.seconds / STEP_SECONDS) * options.workers
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(options.repetitions):
        for mode in MODES:
            with tempfile.TemporaryDirectory() as folder:
                found[mode].append(seconds_per_push(options.workers, pushes, mode, Path(folder)))
                size = sum(file.stat().st_size for file in Path(folder).iterdir())
    medians = {mode: statistics.median(values) for mode, values in found.items()}
    for mode, what in (("journal", "without the file"), ("file", "with the file")):
        cost = medians[mode] - medians["nothing"]
        print(
            f"{what:17}{1e6 * cost:7.1f} us a push, {100 * options.workers * cost / STEP_SECONDS:.3f} % of a step of "
            f"{1000 * STEP_SECONDS:g} ms in which {options.workers} workers push"
        )
    print(f"{size / pushes:.0f} bytes a push")


if __name__ == "__main__":
    main()
