"""What all ranks learn at the end of a run about the workers that were lost: a run without them is no success."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.launch.children import ended_ranks
from lightning_async_localsgd.launch.lost_ranks import remember_lost
from lightning_async_localsgd.launch.restarts import WorkersLostError

if TYPE_CHECKING:
    from lightning_async_localsgd.launch.rendezvous import Rendezvous
    from lightning_async_localsgd.lightning.fit_state import FitState
    from lightning_async_localsgd.lightning.loop.controller import FitController
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


def lost_workers(runtime: Runtime, live: set[int], ranks: int, workers: int) -> list[int]:
    """Return the workers of the beginning that were lost. Rank 0 only.

    A rank must still be connected. A worker that has joined by hand leaves as soon as it has the final model. A number
    with which no worker has ever joined is not lost.

    Args:
        runtime: rank 0's part in training.
        live: workers that are still connected.
        ranks: number of ranks.
        workers: number of workers with which the run began.

    """
    assert runtime.server is not None
    there = live | {worker for worker in runtime.present_workers() if worker >= ranks}
    sound = there - runtime.server.quarantined
    return [worker for worker in sorted(runtime.totals()) if 0 <= worker < workers and worker not in sound]


def agree_after_training(
    rendezvous: Rendezvous | None, controller: FitController, fit: FitState, ranks: int, workers: int
) -> None:
    """Bring all ranks together after training, and let them know which ranks were lost.

    Args:
        rendezvous: where the ranks meet; None for a single rank and for a late joiner.
        controller: drives this rank's loop.
        fit: state of the fit; gets the lost workers on rank 0.
        ranks: number of ranks.
        workers: number of workers with which the run began.

    """
    runtime = controller.runtime
    if rendezvous is None:
        if runtime.server is not None:
            fit.lost_workers = lost_workers(runtime, runtime.live_workers(), ranks, workers)
        return
    rendezvous.begin_after_training()
    if runtime.server is not None:
        rendezvous.survivors = runtime.live_workers
    controller.save_optimizer_states(rendezvous)
    rendezvous.barrier("end of training")
    controller.gather_optimizer_states(rendezvous)
    if runtime.server is not None:
        # Now, while all ranks that are left are still connected.
        live = runtime.live_workers()
        fit.lost_workers = lost_workers(runtime, live, ranks, workers)
        rendezvous.survivors = lambda: live - ended_ranks()
    lost = (worker for worker in fit.lost_workers if worker < ranks)
    remember_lost(rendezvous.broadcast(lost_ranks(runtime, rendezvous, lost)))
    controller.synchronize(rendezvous)


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
