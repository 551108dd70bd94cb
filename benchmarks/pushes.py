"""Measure pushes a second, and how long a push blocks a worker that pushes after every step.

Real workers in a few processes exchange with a real server in another one. Each round is one step::

    python benchmarks/pushes.py                             # all sizes and numbers of workers, ten minutes
    python benchmarks/pushes.py --sizes 1e6 --workers 2 4

Workers push as fast as they can for the pushes a second, and after pauses of 100 ms for the time that a push blocks.
Combinations that need more memory than ``--memory`` are left out. Prints a table, then one JSON line for each row. With
1 M parameters and four workers, the median push must block for 3 ms at most; the exit code is 1 if it does not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass

os.environ["OMP_NUM_THREADS"] = "1"

from exchange_processes import remote_process, server_main, workers_main

PROCESSES = 2
"""Processes of the workers. Each has its workers in threads."""
STEP_SECONDS = 0.1
BAR = 0.003
"""Largest median time in seconds that a push may block, with 1 M parameters and four workers."""


@dataclass(frozen=True)
class Row:
    """Pushes of one combination. Times are in seconds."""

    parameters: int
    workers: int
    transport: str
    pushes_per_second: float
    blocked: float
    blocked_high: float

    @property
    def has_bar(self) -> bool:
        return self.parameters == 1_000_000 and self.workers == 4


def needed_bytes(parameters: int, workers: int) -> int:
    """Return the memory that a combination needs: module, model and gradient of each worker, and the server's."""
    return 4 * parameters * (3 * workers + workers + 6)


def measure(parameters: int, workers: int, transport: str, seconds: float) -> Row:
    """Measure one combination."""
    with ExitStack() as stack:
        server = stack.enter_context(remote_process(server_main, parameters, workers))
        endpoints = server.call("endpoints", transport)
        shares = [list(range(first, workers, PROCESSES)) for first in range(PROCESSES)]
        processes = [stack.enter_context(remote_process(workers_main, share, parameters)) for share in shares if share]

        def all_of(*command: object) -> list[float]:
            for process in processes:
                process.send(*command)
            return [value for process in processes for value in process.receive() or ()]

        all_of("join", endpoints)
        all_of("push_for", min(1.0, seconds), 0.0)
        pushes = all_of("push_for", seconds, 0.0)
        blocked = all_of("push_for", seconds, STEP_SECONDS)
    return Row(
        parameters,
        workers,
        transport,
        len(pushes) / seconds,
        statistics.median(blocked),
        statistics.quantiles(blocked, n=20)[-1] if len(blocked) > 1 else blocked[0],
    )


def main() -> int:
    """Run the benchmark, and return 1 if the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e6, 1e7, 1e8], help="parameters of the model")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4, 16, 64])
    parser.add_argument("--transports", nargs="+", choices=["ipc", "tcp"], default=["ipc", "tcp"])
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement")
    parser.add_argument("--memory", type=float, default=12.0, help="largest memory of a combination, in GiB")
    options = parser.parse_args()
    rows = []
    print(f"{'parameters':>11}{'workers':>9}{'transport':>11}{'pushes/s':>10}{'blocked ms':>12}{'95 % below':>12}")
    for size in map(int, options.sizes):
        for workers in options.workers:
            for transport in options.transports:
                if needed_bytes(size, workers) > options.memory * 2**30:
                    print(f"{size:11,}{workers:9}{transport:>11}  left out: needs more than --memory", flush=True)
                    continue
                row = measure(size, workers, transport, options.seconds)
                rows.append(row)
                print(
                    f"{size:11,}{workers:9}{transport:>11}{row.pushes_per_second:10.1f}{1e3 * row.blocked:12.2f}"
                    f"{1e3 * row.blocked_high:12.2f}",
                    flush=True,
                )
    for row in rows:
        print(json.dumps(asdict(row)))
    missed = [row for row in rows if row.has_bar and row.blocked > BAR]
    for row in missed:
        print(
            f"missed: {row.transport} blocks {1e3 * row.blocked:.2f} ms, the bar is {1e3 * BAR:g} ms", file=sys.stderr
        )
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
