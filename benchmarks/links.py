"""Measures what exchanges cost over slow links, and compares that with the simulator's prediction.

    python -m benchmarks.links                  # 20 M parameters, 100 Mbit/s, 50 ms: the bar
    python -m benchmarks.links --parameters 1e6 --megabits 10 --delays 0 0.05 --seconds-per-step 0.05
    python -m benchmarks.links --report         # write the table of docs/slow-networks.md

Real ranks train on this machine. Each rank above 0 reaches rank 0 over a link of its own: a proxy that carries a
limited number of bytes a second in each direction, and delivers them late. Their model has the given size, but its
steps only sleep, so a few cores are enough. For each way of exchanging, a run counts the rounds between the first model
that a rank adopts and the last one before the end of training:

* blocked: share of the time in which the training threads of ranks above 0 stand still for packing, exchanges and
  waiting;
* speed: their steps a second, relative to ``1 / seconds_per_step``;
* predicted speed: the same in a simulated run over ``Link(delay, rate)``;
* bytes a round: of a push and a model.

Prints a line of JSON for each, which ``--results`` appends to a file, and a table. The exit code is 1 if a bar is
missed: with overlap and int8, at most 1 % of the time is blocked if a round takes three times as long as its exchange;
and the predicted speed is within 5 % of the measured one. Figures are only valid while the machine has idle cores.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.study.markdown import markdown_table
from benchmarks.study.report import replace_section
from lightning_async_localsgd.protocol.codecs import codec_of
from lightning_async_localsgd.protocol.layout import Layout
from lightning_async_localsgd.server.event_file import read_pushes
from lightning_async_localsgd.simulation.devices import Link
from tests.proxy import Proxy

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "links" / "links.jsonl"
PAGE = ROOT / "docs" / "slow-networks.md"

MODES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"upload": "bf16", "download": "bf16"},
    "int8": {"upload": "int8", "download": "int8"},
    "int4": {"upload": "int4", "download": "int8"},
}
MODES |= {f"{name}-overlap": {**mode, "overlap": True} for name, mode in MODES.items()}
"""Options of the exchange, by name."""

LARGEST_BLOCKED_SHARE = 0.01
LARGEST_DIFFERENCE = 0.05
"""Bars: share of blocked time with overlap and int8, and relative difference of the predicted to the measured speed."""


def bytes_a_round(parameters: int, mode: dict[str, Any]) -> tuple[int, int]:
    """Return the bytes of a push and of a model."""
    layout = Layout([("weight", (parameters,), "torch.float32", "parameter")])
    codecs = (codec_of(layout, mode.get(name, "fp32")) for name in ("upload", "download"))
    up, down = (4 * parameters if codec is None else codec.nbytes for codec in codecs)
    return up, down


def speed_of(pushes: Iterable[dict[str, Any]], ranks: int, seconds_per_step: float) -> float:
    """Return the speed of the ranks above 0 between their first and their last whole round."""
    speeds = []
    pushes = list(pushes)
    for rank in range(1, ranks):
        # The last push is that of an unfinished round.
        own = [push for push in pushes if push["worker"] == rank and push["refused"] is None][:-1]
        steps = sum(push["steps"] for push in own[1:])
        speeds.append(seconds_per_step * steps / (own[-1]["seconds"] - own[0]["seconds"]))
    return statistics.fmean(speeds)


def blocked_share(adopted: Sequence[Sequence[float]]) -> float:
    """Return the share of blocked time between the first and the last of the :attr:`.BlockedTime.adopted`."""
    first, last = adopted[0], adopted[-1]
    return (last[1] - first[1]) / (last[0] - first[0])


def measure(directory: Path, options: dict[str, Any], mode: str) -> dict[str, Any]:
    """Compute the figures of one way of exchanging from the files of its two runs."""
    ranks, seconds = options["ranks"], options["seconds_per_step"]
    notes = [json.loads((directory / f"live-{mode}-{rank}.json").read_text()) for rank in range(1, ranks)]
    speed, predicted = (
        speed_of(read_pushes(directory / f"{way}-{mode}.jsonl"), ranks, seconds) for way in ("live", "simulated")
    )
    up, down = bytes_a_round(options["parameters"], MODES[mode])
    link = Link(options["delay"], options["bytes_per_second"])
    exchange = link.seconds(up) + link.seconds(down)
    return {
        "mode": mode,
        **{name: options[name] for name in ("parameters", "ranks", "seconds_per_step", "local_steps", "delay")},
        "megabits": round(8e-6 * options["bytes_per_second"], 3),
        "rounds": min(len(note) for note in notes) - 1,
        "bytes": up + down,
        "exchange_seconds": round(exchange, 3),
        "blocked": round(statistics.fmean(blocked_share(note) for note in notes), 4),
        "speed": round(speed, 4),
        "predicted_speed": round(predicted, 4),
    }


def missed_bars(record: dict[str, Any]) -> list[str]:
    """Return the bars that a measurement misses, as texts."""
    missed = []
    hidden = record["seconds_per_step"] * record["local_steps"] >= 3.0 * record["exchange_seconds"]
    if record["mode"] == "int8-overlap" and hidden and record["blocked"] > LARGEST_BLOCKED_SHARE:
        missed.append(f"{record['blocked']:.1%} of the time is blocked, more than {LARGEST_BLOCKED_SHARE:.0%}")
    if abs(record["predicted_speed"] / record["speed"] - 1.0) > LARGEST_DIFFERENCE:
        missed.append(f"speed {record['speed']:.1%}, but {record['predicted_speed']:.1%} were predicted")
    return missed


def run(options: dict[str, Any], modes: Sequence[str], timeout: float) -> list[dict[str, Any]]:
    """Make the runs over one kind of link, and return the figures of each way of exchanging.

    Raises:
        RuntimeError: The job failed, or took longer than ``timeout`` seconds.

    """
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="async_localsgd_links_")))
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        detours = {}
        for rank in range(1, options["ranks"]):
            link = stack.enter_context(Proxy(f"tcp://127.0.0.1:{port}"))
            link.throttle(options["bytes_per_second"])
            link.delay(options["delay"])
            detours[str(rank)] = link.address
        job = {**options, "port": port, "detours": detours, "modes": {name: MODES[name] for name in modes}}
        output = directory / "output.txt"
        with output.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("links_job.py")), str(directory), json.dumps(job)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            try:
                code: int | str = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = f"no exit code within {timeout:.0f} s"
            finally:
                # The ranks are in the same process group.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code != 0:
            tail = "\n".join(output.read_text().splitlines()[-20:])
            raise RuntimeError(f"the job ended with {code}:\n{tail}")
        return [measure(directory, options, mode) for mode in modes]


def table(records: Iterable[dict[str, Any]]) -> str:
    """Format measurements in Markdown."""
    names = ["parameters", "ranks", "link", "round", "exchange", "bytes a round", "its time on the link"]
    names += ["blocked", "speed", "predicted speed"]
    rows = [
        [
            f"{record['parameters'] / 1e6:g} M",
            str(record["ranks"]),
            f"{record['megabits']:g} Mbit/s, {1000 * record['delay']:g} ms",
            f"{record['local_steps']} x {1000 * record['seconds_per_step']:g} ms",
            record["mode"].replace("-", ", "),
            f"{record['bytes'] / 1e6:.1f} MB",
            f"{record['exchange_seconds']:.2f} s",
            f"{record['blocked']:.1%}",
            f"{record['speed']:.1%}",
            f"{record['predicted_speed']:.1%}",
        ]
        for record in records
    ]
    return markdown_table(names, rows)


def latest(path: Path) -> list[dict[str, Any]]:
    """Return the last measurement of each kind in a file, the largest models and the slowest links first."""
    fields = ("parameters", "ranks", "seconds_per_step", "local_steps", "delay", "megabits", "mode")
    found = {
        tuple(record[name] for name in fields): record for record in map(json.loads, path.read_text().splitlines())
    }
    order = list(MODES)
    return sorted(
        found.values(),
        key=lambda record: (
            -record["parameters"], record["ranks"], record["megabits"], record["delay"], order.index(record["mode"])
        ),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Carry out a command line, and return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=["fp32", "fp32-overlap", "int8-overlap"])
    parser.add_argument("--parameters", nargs="+", type=float, default=[20e6], help="parameters of the model")
    parser.add_argument("--megabits", nargs="+", type=float, default=[100.0], help="Mbit/s in each direction")
    parser.add_argument("--delays", nargs="+", type=float, default=[0.05], help="seconds in each direction")
    parser.add_argument("--ranks", type=int, default=2, help="ranks; each above 0 has a link of its own (default: 2)")
    parser.add_argument("--seconds-per-step", type=float, default=0.25, help="of the emulated devices (default: 0.25)")
    parser.add_argument("--local-steps", type=int, default=50, help="H (default: 50)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each rank above 0 (default: 3)")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds after which a job is killed")
    parser.add_argument("--results", type=Path, help=f"file that lines are appended to, such as {RESULTS.name}")
    parser.add_argument("--report", action="store_true", help=f"only write the table in {PAGE.name}")
    options = parser.parse_args(arguments)
    if options.report:
        PAGE.write_text(replace_section(PAGE.read_text(), "links", table(latest(options.results or RESULTS))))
        return 0
    if options.ranks < 2 or options.rounds < 1:
        parser.error(f"--ranks {options.ranks} must be at least 2, and --rounds {options.rounds} at least 1")
    # A signal must not leave ranks behind: it ends this program through its `finally` clauses.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    records = []
    for parameters, megabits, delay in itertools.product(options.parameters, options.megabits, options.delays):
        job = {
            **{name: getattr(options, name) for name in ("ranks", "seconds_per_step", "local_steps", "rounds")},
            "parameters": int(parameters),
            "bytes_per_second": megabits * 1e6 / 8.0,
            "delay": delay,
        }
        for record in run(job, options.modes, options.timeout):
            records.append(record)
            line = json.dumps(record)
            print(line, flush=True)
            if options.results is not None:
                options.results.parent.mkdir(parents=True, exist_ok=True)
                with options.results.open("a") as file:
                    file.write(f"{line}\n")
    print(table(records))
    missed = [f"{record['mode']}: {text}" for record in records for text in missed_bars(record)]
    print("\n".join(missed) or "all bars are met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
