"""What all ranks learn at the end of a run about the workers that were lost: a run without them is no success."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.launch.restarts import WorkersLostError

if TYPE_CHECKING:
    from lightning_async_localsgd.launch.rendezvous import Rendezvous
    from lightning_async_localsgd.runtime.base import Runtime


def lost_ranks(runtime: Runtime, rendezvous: Rendezvous, lost: Iterable[int]) -> dict[int, tuple[str, str]]:
    """Return on rank 0 the processes of the ranks that were lost in training, and why each was lost.

    Args:
        runtime: this rank's part in training. Ranks without the server know nothing.
        rendezvous: where the ranks have met.
        lost: the lost ranks.

    """
    if runtime.server is None:
        return {}
    processes = rendezvous.processes()
    reasons = {worker: reason for worker, _, reason in runtime.lost_workers}
    return {rank: (processes.get(rank, ""), reasons.get(rank, "it left")) for rank in lost}


def raise_if_lost(lost: Iterable[int]) -> None:
    """Raise if workers were lost, with the option ``fail_on_lost_workers``.

    Args:
        lost: the lost workers.

    Raises:
        WorkersLostError: There are such workers.

    """
    if names := ", ".join(map(str, lost)):
        raise WorkersLostError(
            f"Training is complete and saved, but worker(s) {names} were lost and fail_on_lost_workers=True."
        )


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
