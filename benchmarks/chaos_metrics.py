"""The metrics of ``benchmarks/chaos.py``, computed from the notes and ledgers of both runs.

The module ``chaos`` defines each metric.
"""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from chaos_runs import Event, Lives, number_of_kills
from step_notes import Life, read_notes

from lightning_async_localsgd.protocol.messages import ALREADY_APPLIED
from lightning_async_localsgd.server.event_file import read_pushes

REQUIRED_GOODPUT = 0.95
MAX_STALL_SECONDS = 0.1
MAX_REJOIN_SECONDS = 30.0


def read_ledger(directory: Path) -> list[dict[str, Any]]:
    """Read the server's decision on each push."""
    return read_pushes(directory / "events.jsonl")


def measure_events(events: list[Event], lives: Lives, ledger: list[dict[str, Any]]) -> None:
    """Fill in the measured fields of each event."""
    merged = {(push["session"], push["sequence"]) for push in ledger if push["refused"] is None}
    for event in events:
        if event.kind == "stop":
            _measure_stop(event, events, lives, merged)
        else:
            _measure_kill(event, lives)


def _measure_stop(event: Event, events: list[Event], lives: Lives, merged: set[tuple[str, int]]) -> None:
    life = lives[event.worker, event.life]
    # The stop interrupted the round of the next answered push. A process that was killed may never get an answer.
    answered = [sequence for moment, sequence, _, _ in life.answers if moment > event.at]
    event.counted = (life.session, min(answered)) in merged if answered else None
    recovered_at = _recovered_at(life, event)
    # Do not measure a recovery that another event of the same worker interrupted.
    interrupted = any(event.at < later.at <= recovered_at and later.worker == event.worker for later in events)
    event.recover = recovered_at - event.until if answered and not interrupted else None


def _measure_kill(event: Event, lives: Lives) -> None:
    departure = f"worker {event.worker} left the run"
    server_log = lives[0, 0].log
    event.detect = _seconds_to_first(
        event, (moment for moment, line in server_log if moment > event.at and line.startswith(departure))
    )
    event.resume = _seconds_to_first(
        event,
        (
            moment
            for life in lives.values()
            if life.worker != event.worker
            for moment, _, _, refused in life.answers
            if moment > event.at and refused is None
        ),
    )
    restarted = lives.get((event.worker, event.life + 1))
    answers = restarted.answers if restarted else []
    event.rejoin = _seconds_to_first(event, (moment for moment, _, _, refused in answers if refused is None))


def _seconds_to_first(event: Event, moments: Iterable[float]) -> float | None:
    first = min(moments, default=None)
    return None if first is None else first - event.at


def _recovered_at(life: Life, event: Event) -> float:
    """Return when a process that was frozen trains normally again: at the first step after its first answer."""
    answered = min((moment for moment, *_ in life.answers if moment > event.until), default=life.steps[-1])
    return max(event.until, min((step for step in life.steps if step > answered), default=life.steps[-1]))


def frozen_spans(life: Life, events: list[Event], until_recovered: bool = False) -> list[tuple[float, float]]:
    """Return the times in which a process was frozen: from each stop to the first step after waking up.

    Args:
        life: of the process.
        events: all events of the run.
        until_recovered: extend each time until the process trains normally again.

    """
    spans = []
    for event in events:
        if event.kind == "stop" and (event.worker, event.life) == (life.worker, life.number):
            awake = min((step for step in life.steps if step > event.until), default=life.steps[-1])
            end = _recovered_at(life, event) if until_recovered else max(event.until, awake)
            spans.append((event.at, end))
    return spans


def longest_stall(lives: Lives, begin: float, end: float, events: list[Event]) -> float:
    """Return the longest time between two steps of a process that was neither frozen nor recovering."""
    longest = 0.0
    for life in lives.values():
        spans = frozen_spans(life, events, until_recovered=True)
        for before, after in life.gaps:
            if before >= begin and after <= end and not any(start <= after and before < stop for start, stop in spans):
                longest = max(longest, after - before)
    return longest


def living_seconds(lives: Lives, begin: float, end: float, events: list[Event]) -> Counter[int]:
    """Return, for each worker, the seconds in which it was alive and not frozen."""
    seconds: Counter[int] = Counter()
    for life in lives.values():
        if life.steps:
            spans = [(life.steps[0], life.steps[-1])]
            seconds[life.worker] += _within(spans, begin, end) - _within(frozen_spans(life, events), begin, end)
    return seconds


def _within(spans: list[tuple[float, float]], begin: float, end: float) -> float:
    """Return the total length of ``spans`` between ``begin`` and ``end``."""
    return sum(max(0.0, min(stop, end) - max(start, begin)) for start, stop in spans)


def merged_steps(lives: Lives, ledger: list[dict[str, Any]], begin: float, end: float) -> Counter[int]:
    """Return, for each worker, the local steps between ``begin`` and ``end`` that are part of merged pushes.

    The steps of a process are in the order of its pushes. The ledger contains the number of steps in each push, and the
    notes contain the time of each step.
    """
    steps: Counter[int] = Counter()
    for life in lives.values():
        pushes = sorted((p for p in ledger if p["session"] == life.session), key=lambda push: push["sequence"])
        assigned = 0
        seen = set()
        for push in pushes:
            if push["sequence"] in seen:
                continue
            seen.add(push["sequence"])
            merged = any(p["refused"] is None for p in pushes if p["sequence"] == push["sequence"])
            if merged:
                steps[life.worker] += sum(begin < at <= end for at in life.steps[assigned : assigned + push["steps"]])
            assigned += push["steps"]
    return steps


def rates(steps: Counter[int], seconds: Counter[int]) -> dict[int, float]:
    """Return, for each worker, the merged steps per living second."""
    return {worker: steps[worker] / seconds[worker] for worker in seconds}


def count_delivery_errors(lives: Lives, ledger: list[dict[str, Any]]) -> tuple[int, int]:
    """Return the number of acknowledged pushes that were lost, and the number that were applied more than once."""
    applied = Counter((push["session"], push["sequence"]) for push in ledger if push["refused"] is None)
    acknowledged = {
        (life.session, sequence)
        for life in lives.values()
        for _, sequence, _, refused in life.answers
        if refused in (None, ALREADY_APPLIED)
    }
    empty = {(push["session"], push["sequence"]) for push in ledger if push["steps"] == 0}
    return len(acknowledged - applied.keys() - empty), sum(count > 1 for count in applied.values())


def measure(
    directory: Path, calm: tuple[float, float], faulty: tuple[float, float], events: list[Event]
) -> dict[str, Any]:
    """Compute all metrics from the notes of both runs, and fill in the measured fields of ``events``.

    Args:
        directory: with the runs' directories ``calm`` and ``faulty``.
        calm: begin and end of the run without faults.
        faulty: begin and end of the faults.
        events: of the run with faults.

    """
    lives, calm_lives = read_notes(directory / "faulty"), read_notes(directory / "calm")
    ledger, calm_ledger = read_ledger(directory / "faulty"), read_ledger(directory / "calm")
    measure_events(events, lives, ledger)
    normal_rates = rates(merged_steps(calm_lives, calm_ledger, *calm), living_seconds(calm_lives, *calm, []))
    living = living_seconds(lives, *faulty, events)
    useful = merged_steps(lives, ledger, *faulty)
    normal_stall = longest_stall(calm_lives, *calm, [])
    stall = longest_stall(lives, *faulty, events)
    lost, twice = count_delivery_errors(lives, ledger)
    finals = [json.loads(path.read_text()) for path in sorted((directory / "faulty").glob("final_*.json"))]
    stops = [event for event in events if event.kind == "stop"]
    result: dict[str, Any] = {
        "ranks": len(normal_rates),
        "events": len(events),
        "kills": number_of_kills(events),
        "stops": len(stops),
        "seconds": faulty[1] - faulty[0],
        "goodput": sum(useful.values()) / sum(normal_rates[worker] * living[worker] for worker in living),
        "raw": sum(useful.values()) / sum(normal_rates[worker] * (faulty[1] - faulty[0]) for worker in normal_rates),
        "normal_stall_seconds": normal_stall,
        "longest_stall_seconds": stall,
        "acknowledged_and_lost": lost,
        "applied_twice": twice,
        "pushes_merged": sum(push["refused"] is None and push["steps"] > 0 for push in ledger),
        "pushes_refused": dict(Counter(push["refused"] for push in ledger if push["refused"] is not None)),
        "stops_whose_round_counted": sum(event.counted is True for event in stops),
        "stops_that_were_answered": sum(event.counted is not None for event in stops),
        "ranks_at_the_end": len(finals),
        "identical_weights": len({final["digest"] for final in finals}) == 1,
        "cpus": os.cpu_count(),
    }
    for name in ("detect", "resume", "rejoin", "recover"):
        values = [value for event in events if (value := getattr(event, name)) is not None]
        result[f"T_{name}"] = {
            "count": len(values),
            "median": statistics.median(values) if values else None,
            "max": max(values, default=None),
        }
    result["passed"] = _check_bars(result)
    return result


def _check_bars(result: dict[str, Any]) -> dict[str, bool]:
    """Return, for each bar, whether the result meets it."""
    rejoin = result["T_rejoin"]
    return {
        "goodput": result["goodput"] >= REQUIRED_GOODPUT,
        "stall": result["longest_stall_seconds"] - result["normal_stall_seconds"] < MAX_STALL_SECONDS,
        "rejoin": rejoin["count"] == result["kills"] and (rejoin["max"] or 0.0) <= MAX_REJOIN_SECONDS,
        "lost": result["acknowledged_and_lost"] == 0,
        "twice": result["applied_twice"] == 0,
        "weights": result["identical_weights"] and result["ranks_at_the_end"] == result["ranks"],
    }
