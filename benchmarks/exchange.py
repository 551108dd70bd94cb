"""Measure the cost of an exchange: time, memory, four workers at once, and a worker whose upload stalls.

The time is compared with bare memory passes and with plain sockets. Everything runs in separate processes on this
machine, with one torch thread each. Each ratio compares quantities that were measured in turn in the same run, so that
other load on the machine affects both::

    python benchmarks/exchange.py                       # 1 M, 10 M and 100 M parameters, a few minutes
    python benchmarks/exchange.py --sizes 1e6 --repeats 5

Prints a table, then one JSON line for each measurement and each ratio. The bars apply to 100 M parameters. The exit
code is 1 if a bar is missed. Needs Linux, for /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from exchange_processes import (
    MEMORY_PASSES,
    WORKERS,
    RemoteProcess,
    client_main,
    echo_main,
    memory_passes_main,
    remote_process,
    server_main,
    worker_main,
)
from exchange_report import Measurement, Ratio, Report, divide, format_table, measure_in_turn


def measure_wire(report: Report, repeats: int) -> None:
    """Measure round trips over each kind of wire and over a plain socket."""
    with remote_process(echo_main, report.numel) as echo:
        addresses = echo.receive()
        with remote_process(client_main, report.numel, addresses) as client:
            plain, tcp, curve, ipc = measure_in_turn(
                repeats,
                lambda: client.call("plain"),
                lambda: client.call("wire", "tcp"),
                lambda: client.call("wire", "curve"),
                lambda: client.call("wire", "ipc"),
            )
    report.add_measurement("plain TCP socket, round trip", plain)
    report.add_measurement("wire over tcp", tcp)
    report.add_measurement("wire over tcp with CURVE", curve)
    report.add_measurement("wire over ipc", ipc)
    report.add_ratio("tcp / plain socket", divide(tcp, plain), bar=1.3)
    report.add_ratio("tcp with CURVE / plain socket", divide(curve, plain), bar=4.0)
    report.add_ratio("ipc / plain socket", divide(ipc, plain))


def measure_exchange(report: Report, repeats: int, stall_seconds: float) -> None:
    """Measure whole exchanges with the real server, one by one, four at once and beside a stall; and its memory."""
    with ExitStack() as stack:
        server = stack.enter_context(remote_process(server_main, report.numel))
        endpoints = server.call("endpoints")
        workers = [stack.enter_context(remote_process(worker_main, rank, report.numel)) for rank in range(WORKERS)]
        for worker in workers:
            worker.send("join", endpoints)
        for worker in workers:
            worker.receive()

        def exchange_alone(worker: RemoteProcess) -> float:
            began, ended = worker.call("exchange")
            return float(ended - began)

        def exchange_at_once() -> float:
            at = time.monotonic() + 0.05
            for worker in workers:
                worker.send("exchange", at)
            times = [worker.receive() for worker in workers]
            return float(max(ended for _, ended in times) - min(began for began, _ in times))

        def exchange_one_by_one() -> float:
            return sum(exchange_alone(worker) for worker in workers)

        one_by_one, at_once = measure_in_turn(repeats, exchange_one_by_one, exchange_at_once)
        peak, buffers = server.call("memory")
        measure_stall(report, workers, max(2, repeats // 3), stall_seconds)
        bare = stack.enter_context(remote_process(memory_passes_main, report.numel))
        whole, memory_passes, steps = measure_in_turn(
            repeats, lambda: exchange_alone(workers[0]), lambda: bare.call("exchange"), lambda: server.call("merge")
        )
    report.add_measurement("whole exchange over ipc, one worker", whole)
    report.add_measurement("its memory passes in one process", memory_passes)
    report.add_measurement("one outer step, with the check of the push", steps)
    report.add_ratio("whole exchange / memory passes", divide(whole, memory_passes), bar=3.0)
    report.add_measurement("four exchanges, one by one", one_by_one)
    report.add_measurement("four exchanges at once", at_once)
    report.add_ratio("four at once / four one by one", divide(at_once, one_by_one), bar=1.5)
    report.add_ratio("four at once / four bare outer steps", divide(at_once, [WORKERS * step for step in steps]))
    report.add_measurement("peak memory of the server, without its imports", [peak], "bytes")
    report.add_measurement("whole-model buffers of the server", [buffers], "buffers")
    report.add_ratio("peak memory of the server / model", [peak / (4 * report.numel)], bar=5.0)


def measure_stall(report: Report, workers: list[RemoteProcess], repeats: int, stall_seconds: float) -> None:
    """Measure exchanges of one worker with and without another worker whose upload stalls."""
    stalling_worker, measured_worker = workers[0], workers[1]
    without_stall: list[float] = []
    beside_stall: list[float] = []
    ratios = []
    for _ in range(repeats):
        without = measured_worker.call("exchange_for", 0.8 * stall_seconds)
        stalling_worker.send("stall", stall_seconds)
        time.sleep(0.1 * stall_seconds)
        beside = measured_worker.call("exchange_for", 0.8 * stall_seconds)
        stalling_worker.receive()
        without_stall += without
        beside_stall += beside
        ratios.append(statistics.median(beside) / statistics.median(without))
    report.add_measurement("exchange without a stalled upload", without_stall)
    report.add_measurement("exchange beside a stalled upload", beside_stall)
    report.add_ratio("beside / without a stalled upload", ratios, bar=1.2)


def main() -> int:
    """Run the benchmark, and return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e6, 1e7, 1e8], help="parameters of the model")
    parser.add_argument("--repeats", type=int, default=9, help="repeats of each measurement")
    parser.add_argument("--stall-seconds", type=float, default=5.0, help="length of the stall during an upload")
    options = parser.parse_args()
    rows: list[Measurement | Ratio] = []
    for size in options.sizes:
        report = Report(int(size))
        measure_wire(report, options.repeats)
        measure_exchange(report, options.repeats, options.stall_seconds)
        rows += report.rows
        print(f"{size / 1e6:g} M parameters done", file=sys.stderr, flush=True)
    print(format_table(rows))
    print(f"\nMemory passes: {MEMORY_PASSES}.")
    print(f"{os.cpu_count()} cores, torch {torch.__version__} with one thread a process, {options.repeats} repeats.\n")
    for row in rows:
        print(json.dumps({"kind": type(row).__name__.lower(), **asdict(row)}))
    return int(any(isinstance(row, Ratio) and row.passed is False for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
