"""Measure what this package adds to the start of a process: ``python benchmarks/import_cost.py [--processes N]``.

Every figure is the median over fresh processes, in milliseconds:

* ``package``: ``import lightning_async_localsgd`` after Lightning has been imported.
* ``strategy``: the first use of ``lightning_async_localsgd.AsyncLocalSGDStrategy``, for ``lightning.pytorch``.
* ``mirror``: the first use of ``lightning_async_localsgd.pytorch_lightning.AsyncLocalSGDStrategy``.
* ``mirror - strategy``: what a process pays because its project imports ``pytorch_lightning``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

MEASURE = """
import importlib, json, sys, time
lightning, package = sys.argv[1:]
for name in (lightning, f"{lightning}.cli", "zmq"):
    importlib.import_module(name)
begin = time.perf_counter()
import lightning_async_localsgd
imported = time.perf_counter()
importlib.import_module(package).AsyncLocalSGDStrategy
print(json.dumps([imported - begin, time.perf_counter() - imported]))
"""

PACKAGES = {
    "strategy": ("lightning.pytorch", "lightning_async_localsgd"),
    "mirror": ("pytorch_lightning", "lightning_async_localsgd.pytorch_lightning"),
}


def measure(processes: int) -> dict[str, float]:
    """Return the medians over ``processes`` processes of each kind, in milliseconds."""
    seconds: dict[str, list[list[float]]] = {name: [] for name in PACKAGES}
    for _ in range(processes):
        for name, arguments in PACKAGES.items():
            command = [sys.executable, "-c", MEASURE, *arguments]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            seconds[name].append(json.loads(output.splitlines()[-1]))
    found = {"package": statistics.median(first for runs in seconds.values() for first, _ in runs)}
    found |= {name: statistics.median(second for _, second in runs) for name, runs in seconds.items()}
    found["mirror - strategy"] = found["mirror"] - found["strategy"]
    return {name: 1000 * value for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=7, help="processes of each kind (default: 7)")
    options = parser.parse_args()
    if options.processes < 1:
        parser.error(f"--processes={options.processes} must be at least 1")
    for name, value in measure(options.processes).items():
        print(f"{name:18}{value:8.1f} ms")


if __name__ == "__main__":
    main()
