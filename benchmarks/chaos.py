"""Measure what killed and frozen workers cost the other workers.

Trains the same small model twice, on ranks that run at the speed of emulated devices. The first run has no faults. In
the second run worker processes are killed (SIGKILL) and frozen (SIGSTOP, later SIGCONT) at random moments. The launcher
restarts killed processes. Rank 0, which runs the server, is never hit. Prints one JSON line for each event, one for the
result, and a table::

    python benchmarks/chaos.py           # 50 events on six ranks, about eight minutes
    python benchmarks/chaos.py --quick   # four events on three ranks

Metrics:

* ``T_detect``: from a kill to the server's log line that the worker has left the run;
* ``T_resume``: from a kill to the next merged push of another worker, at the time at which that worker got the answer;
* ``T_rejoin``: from a kill to the first merged push of the worker's next process. This includes the launcher's restart
  delay and the start of Python, torch and Lightning. All ranks share the same cores for that;
* ``T_recover``: from waking a frozen worker to its first step after the first answered push. Until then it is
  recovering;
* longest stall: the longest time between two local steps of a worker, compared with the run without faults. The times
  in which the worker itself was frozen or recovering do not count. The time after the last event, in which all workers
  wait for the last one, does not count either;
* goodput: local steps in merged pushes per living second, compared with the run without faults. A worker is living from
  the first to the last local step of each of its processes, except while it is frozen. Everything counts against
  goodput: rounds lost with a killed worker, refused pushes, waiting, and the CPU time that restarts take from the other
  workers. ``raw`` counts all seconds, including those in which workers were dead or frozen;
* exactly-once delivery: pushes that were acknowledged to a worker but are not in the server's event file, and pushes
  that it contains as merged twice;
* whether all ranks end with the same weights, bit by bit;
* the number of stops after which the interrupted round was still merged.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chaos_metrics import MAX_REJOIN_SECONDS, MAX_STALL_SECONDS, REQUIRED_GOODPUT, measure
from chaos_runs import RandomFaults, run_with_faults, run_without_faults


def table(result: dict[str, Any]) -> str:
    """Format the result as text."""

    def times(name: str) -> str:
        values = result[f"T_{name}"]
        if not values["count"]:
            return "-"
        return f"{values['median']:.2f} s median, {values['max']:.2f} s max ({values['count']} events)"

    added = result["longest_stall_seconds"] - result["normal_stall_seconds"]
    verdicts = {True: "passed", False: "FAILED"}
    rows = [
        ("events", f"{result['kills']} kills, {result['stops']} stops in {result['seconds']:.0f} s", None),
        ("T_detect", times("detect"), None),
        ("T_resume", times("resume"), None),
        ("T_rejoin", f"{times('rejoin')}, bar {MAX_REJOIN_SECONDS:g} s", "rejoin"),
        ("T_recover", times("recover"), None),
        (
            "longest stall of a living worker",
            f"{result['longest_stall_seconds']:.3f} s, {result['normal_stall_seconds']:.3f} s without faults: "
            f"{added:+.3f} s, bar {MAX_STALL_SECONDS:g} s",
            "stall",
        ),
        (
            "goodput of living workers",
            f"{result['goodput']:.1%}, bar {REQUIRED_GOODPUT:.0%} (raw {result['raw']:.1%})",
            "goodput",
        ),
        ("acknowledged and lost pushes", str(result["acknowledged_and_lost"]), "lost"),
        ("pushes applied twice", f"{result['applied_twice']} of {result['pushes_merged']} merged", "twice"),
        (
            "merged rounds of frozen workers",
            f"{result['stops_whose_round_counted']} of {result['stops_that_were_answered']}",
            None,
        ),
        ("final weights", f"{result['ranks_at_the_end']} ranks, identical: {result['identical_weights']}", "weights"),
    ]
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(
        f"{name:{width}}  {text}" + (f"  {verdicts[result['passed'][bar]]}" if bar else "") for name, text, bar in rows
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=6)
    parser.add_argument("--events", type=int, default=50, help="number of kills and stops together")
    parser.add_argument("--pause", type=float, default=8.0, help="mean seconds between two events")
    parser.add_argument("--longest-stop", type=float, default=15.0, help="longest time a worker is frozen, in seconds")
    parser.add_argument("--calm", type=float, default=60.0, help="length of the run without faults, in seconds")
    parser.add_argument("--seconds-per-step", type=float, default=0.05, help="step time of the fastest rank")
    parser.add_argument("--local-steps", type=int, default=20)
    parser.add_argument(
        "--silence-timeout", type=float, default=10.0, help="silence_timeout of ExchangeOptions; some stops are longer"
    )
    parser.add_argument("--width", type=int, default=4096, help="width of the model, which has 10 x width parameters")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random faults")
    parser.add_argument("--directory", type=Path, help="for notes and logs (default: a new temporary directory)")
    parser.add_argument("--quick", action="store_true", help="four events on three ranks, as a smoke test")
    arguments = parser.parse_args()
    if arguments.ranks < 2:
        parser.error(f"--ranks {arguments.ranks} must be at least 2, because rank 0 is never hit")
    if arguments.quick:
        arguments.ranks, arguments.events, arguments.pause = 3, 4, 3.0
        arguments.longest_stop, arguments.silence_timeout, arguments.calm = 4.0, 2.0, 6.0
    return arguments


def main() -> int:
    """Run the benchmark, and return 1 if a bar is missed."""
    arguments = parse_arguments()
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="async_localsgd_chaos_"))
    print(f"notes and logs in {directory}", file=sys.stderr, flush=True)
    # The slowest rank takes twice as long for a step as the fastest.
    seconds = [arguments.seconds_per_step * (1 + rank / (arguments.ranks - 1)) for rank in range(arguments.ranks)]
    options = {
        "seconds_per_step": seconds,
        "local_steps": arguments.local_steps,
        "silence_timeout": arguments.silence_timeout,
        "max_restarts": arguments.events,
        "width": arguments.width,
    }
    faults = RandomFaults(arguments.events, arguments.pause, arguments.longest_stop, arguments.seed)
    calm = run_without_faults(directory / "calm", options, arguments.calm)
    begin, end, events = run_with_faults(directory / "faulty", options, faults)
    result = measure(directory, calm, (begin, end), events)
    for event in events:
        print(json.dumps({**asdict(event), "at": event.at - begin, "until": event.until - begin}), flush=True)
    print(json.dumps(result), flush=True)
    print(table(result), flush=True)
    return 0 if all(result["passed"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
