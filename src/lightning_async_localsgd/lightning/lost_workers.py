"""The line that says at the end of a run which workers were lost, so that a run without them looks like no success."""

from __future__ import annotations

from typing import Any


def lost_text(summary: dict[str, Any]) -> str:
    """Return one line about the initial workers that were not there at the end; empty if all were.

    Args:
        summary: see :func:`.run_summary`.

    """
    initial = summary["initial_workers"]
    reasons: dict[str, list[int]] = {}
    for worker in summary["workers"]:
        if 0 <= worker["worker"] < initial and (worker["quarantined"] or not worker["present"]):
            reasons.setdefault(_reason(worker, summary["lost"]), []).append(worker["worker"])
    lost = sum(map(len, reasons.values()))
    if not lost:
        return ""
    details = "; ".join(f"{_named(numbers)} ({reason})" for reason, numbers in reasons.items())
    left = sum(worker["present"] and not worker["quarantined"] for worker in summary["workers"])
    others = "a single worker was left, which took" if left == 1 else f"the other {left} workers took"
    were = "was" if lost == 1 else "were"
    return (
        f"{lost} of {initial} workers {were} lost before the end of training: {details}; {others} the remaining steps"
    )


def _reason(worker: dict[str, Any], lost: list[dict[str, Any]]) -> str:
    if worker["quarantined"]:
        return "quarantined: the server refused its pushes"
    reasons: list[str] = [loss["reason"] for loss in lost if loss["worker"] == worker["worker"]]
    return reasons[0] if reasons else "it left"


def _named(numbers: list[int]) -> str:
    return f"worker{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
