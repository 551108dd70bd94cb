"""The state of a run, computed from the lines of its event file.

The server keeps one, and answers ``watch`` with it. The commands compute the same from a file. Time is that of the
lines: nothing here reads a clock.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.protocol.rejections import REPEATED

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_WORKERS = 1000
"""Workers that :meth:`RunState.as_dict` lists, at most. It lists the present ones first."""

_RATE_SECONDS = 60.0
"""Seconds of the past from which the speed of the run is measured."""

_LOSSES = 120
"""Number of losses that are kept, for a small curve."""

_MAX_FAULTS = 20
"""Number of the latest faults that are kept."""


@dataclass
class WorkerState:
    """What is known of one worker.

    Attributes:
        number: the worker's number.
        state: what it does: ``"computing"``, ``"waiting"``, ``"validating"`` (or saving), ``"away"``,
            ``"quarantined"`` or ``"finished"``. See also :meth:`state_at`.
        since: time since which it does so, in seconds of the server's clock.
        rounds: number of merged pushes.
        steps: local steps in these pushes.
        samples: samples in these pushes.
        staleness: staleness of the last push, in versions.
        total_staleness: sum of the stalenesses of the merged pushes.
        local_steps: steps of the last dispatch.
        steps_per_second: speed while computing; None while unknown.
        compute_seconds: seconds of timed computing.
        exchange_seconds: seconds of the last exchange, without waiting.
        total_exchange_seconds: seconds of all exchanges.
        wait_seconds: seconds between arrivals of pushes and dispatches.
        pushes: number of pushes with data, refused ones included.
        dispatches: number of models that it was sent.
        refused: number of refused pushes.
        sessions: number of sessions that joined.
        losses: number of times that it was lost.
        overlaps: whether it goes on training while its pushes are in flight.

    """

    number: int
    state: str = "waiting"
    since: float = 0.0
    rounds: int = 0
    steps: int = 0
    samples: int = 0
    staleness: int = 0
    total_staleness: int = 0
    local_steps: int = 0
    steps_per_second: float | None = None
    compute_seconds: float = 0.0
    exchange_seconds: float = 0.0
    total_exchange_seconds: float = 0.0
    wait_seconds: float = 0.0
    pushes: int = 0
    dispatches: int = 0
    refused: int = 0
    sessions: int = 0
    losses: int = 0
    overlaps: bool = False
    _session: str = ""
    _arrived_at: float | None = None
    _last_refused: tuple[str, int, str] | None = None

    def change(self, state: str, now: float) -> None:
        """Note that the worker does something else from now on."""
        if self.state != state:
            self.state, self.since = state, now

    def arrive(self, now: float) -> None:
        """Note that a push has arrived, whose dispatch the worker waits for."""
        if self.state not in ("away", "quarantined") and not self.overlaps:
            self.change("waiting", now)
            self._arrived_at = now if self._arrived_at is None else self._arrived_at

    def state_at(self, now: float) -> str:
        """Return what the worker does at a time: ``"exchanging"`` while its model is probably still on its way."""
        # A round trip is an upload and a download. The server sees the end of the upload and the begin of the download.
        if self.state == "computing" and now - self.since < self.exchange_seconds / 2:
            return "exchanging"
        return self.state


class RunState:
    """The state of a run. A run whose rank 0 was restarted is one run; another fit in the same file begins anew.

    Args:
        max_faults: number of the latest faults that are kept; None for all.

    Attributes:
        run: the line that began the run; None before.
        workers: the workers by number.
        ended: whether training is over, in this file.
        summary: the summary of the run at its end; None before.
        error: the error that ended the run; None if there was none.

    """

    def __init__(self, max_faults: int | None = _MAX_FAULTS) -> None:
        self._max_faults = max_faults
        self._reset({})

    def _reset(self, run: Mapping[str, Any]) -> None:
        self.run: dict[str, Any] | None = dict(run) or None
        self.workers: dict[int, WorkerState] = {}
        self.ended = False
        self.summary: dict[str, Any] | None = None
        self.error: str | None = None
        self.refusals: Counter[str] = Counter()
        self.faults: deque[dict[str, Any]] = deque(maxlen=self._max_faults)
        self.values: dict[str, float | None] = {}
        self.validation: dict[str, float | None] = {}
        self.losses: deque[tuple[float, float]] = deque(maxlen=_LOSSES)
        self.now = float(run["seconds"]) if run else 0.0
        self.begin = self.now
        self.version = int(run.get("version", 0))
        self.progress = int(run.get("done", 0))
        self.total: int | None = run.get("total")
        self.counts_samples = bool(run.get("step_samples"))
        self.update_norm: float | None = None
        self.momentum_cosine: float | None = None
        self.bytes_sent = self.bytes_received = 0
        self.global_step: int | None = None
        self.paused = False
        self._history: deque[tuple[float, int]] = deque([(self.now, self.progress)])

    def add(self, line: Mapping[str, Any]) -> None:
        """Take in a line of the event file. Unknown kinds are skipped."""
        method = getattr(self, f"_on_{line.get('kind')}", None)
        seconds = line.get("seconds")
        if method is None or (self.run is None and line["kind"] != "run"):
            return
        if seconds is not None and line["kind"] != "run":
            self.now = max(self.now, float(seconds))
        method(line)

    # --------------------------------------------------------------------- lines

    def _on_run(self, line: Mapping[str, Any]) -> None:
        known = self.run
        if known and line.get("continued") and line.get("incarnation") == known.get("incarnation"):
            return
        workers = self.workers
        losses, refusals, faults = self.losses, self.refusals, self.faults
        self._reset(line)
        if known and line.get("run_name") and line.get("run_name") == known.get("run_name"):
            # Rank 0 was restarted. Its workers have to join again.
            self.workers, self.losses, self.refusals, self.faults = workers, losses, refusals, faults
            for worker in workers.values():
                worker.change("away", self.now)
            self._fault(None, "rank 0 was restarted")

    def _on_join(self, line: Mapping[str, Any]) -> None:
        worker = self._worker(line)
        if worker._session != line["session"]:
            worker._session = line["session"]
            worker.sessions += 1
        # A worker that reconnects, because its connection broke, sends its push again.
        worker._arrived_at = None
        worker.change("waiting", self.now)

    def _on_lost(self, line: Mapping[str, Any]) -> None:
        worker = self._worker(line)
        if self.ended or worker.state in ("away", "finished"):
            return
        worker.losses += 1
        worker.change("away", self.now)
        self._fault(worker.number, f"lost: {line.get('reason', '')}")

    def _on_back(self, line: Mapping[str, Any]) -> None:
        worker = self._worker(line)
        if worker.state == "away" and worker._session == line["session"]:
            worker.change("computing", self.now)

    def _on_pause(self, line: Mapping[str, Any]) -> None:
        self.paused = True
        self._fault(None, "training is paused: fewer workers than min_workers take part")

    def _on_resume(self, line: Mapping[str, Any]) -> None:
        self.paused = False

    def _on_interrupt(self, line: Mapping[str, Any]) -> None:
        self._worker(line).change("validating", self.now)

    def _on_continue(self, line: Mapping[str, Any]) -> None:
        worker = self._worker(line)
        if worker.state == "validating":
            worker.change("computing", self.now)

    def _on_dispatch(self, line: Mapping[str, Any]) -> None:
        for number, steps in line["steps"].items():
            worker = self._worker({"worker": int(number)})
            if worker._arrived_at is not None:
                worker.wait_seconds += self.now - worker._arrived_at
                worker._arrived_at = None
            worker.dispatches += 1
            worker.overlaps = number in line.get("overlap", ())
            if line.get("final"):
                worker.change("finished", self.now)
            else:
                worker.local_steps = steps
                worker.since = self.now
                worker.change("computing", self.now)

    def _on_held(self, line: Mapping[str, Any]) -> None:
        self._worker(line).arrive(self.now)

    def _on_push(self, line: Mapping[str, Any]) -> None:
        worker = self._worker(line)
        self.version = max(self.version, int(line["version"]))
        if line["steps"]:
            worker.pushes += 1
        if line["refused"] is None:
            self._merged(worker, line)
        else:
            push = (str(line.get("session")), int(line.get("sequence", 0)), str(line.get("refusal")))
            # A worker that reconnects sends its last push again, and is told the same reason again.
            if push != worker._last_refused or push[2] == REPEATED.kind:
                worker.refused += 1
                self.refusals[push[2]] += 1
                self._fault(worker.number, f"push refused: {line['refused']}")
            worker._last_refused = push
        worker.arrive(float(line["seconds"]))

    def _merged(self, worker: WorkerState, line: Mapping[str, Any]) -> None:
        if not line["steps"]:
            return
        worker.rounds += 1
        worker.steps += line["steps"]
        worker.samples += line.get("samples", 0)
        worker.staleness = line["staleness"]
        worker.total_staleness += line["staleness"]
        if line.get("timed_steps") and line.get("compute_seconds"):
            worker.steps_per_second = line["timed_steps"] / line["compute_seconds"]
            worker.compute_seconds += line["compute_seconds"]
        worker.exchange_seconds = line.get("exchange_seconds", 0.0)
        worker.total_exchange_seconds += worker.exchange_seconds
        worker.wait_seconds += line.get("wait_seconds", 0.0)
        self.progress += line["samples"] if self.counts_samples else line["steps"]
        self._note_progress()
        if line.get("update_norm") is not None:
            self.update_norm, self.momentum_cosine = line["update_norm"], line.get("momentum_cosine")

    def _on_metrics(self, line: Mapping[str, Any]) -> None:
        self.values = dict(line["values"])
        self.global_step = line.get("global_step")
        loss = next((value for name, value in self.values.items() if "loss" in name and value is not None), None)
        if loss is not None:
            self.losses.append((self.now, loss))
        self._note_run(line)

    def _on_validation(self, line: Mapping[str, Any]) -> None:
        self.validation = dict(line["values"])
        self._note_run(line)

    def _on_stop(self, line: Mapping[str, Any]) -> None:
        self.total = None if self.total is None else self.progress

    def _on_end(self, line: Mapping[str, Any]) -> None:
        self.summary, self.error = line.get("summary"), line.get("error")
        self._note_run(line)
        self.ended = True
        for worker in self.workers.values():
            if worker.state not in ("away", "quarantined"):
                worker.change("finished" if self.error is None else "away", self.now)
        if self.error is not None:
            self._fault(None, f"the run ended with {self.error}")

    # ------------------------------------------------------------------ internal

    def _note_run(self, line: Mapping[str, Any]) -> None:
        self.bytes_sent = line.get("bytes_sent", self.bytes_sent)
        self.bytes_received = line.get("bytes_received", self.bytes_received)
        self.progress = line.get("progress", self.progress)
        self.total = line.get("total", self.total)
        for number in line.get("quarantined", ()):
            worker = self._worker({"worker": number})
            if worker.state != "quarantined":
                worker.change("quarantined", self.now)
                self._fault(number, "quarantined for the rest of the run")

    def _note_progress(self) -> None:
        history = self._history
        if self.now - history[-1][0] >= 0.5:
            history.append((self.now, self.progress))
            while len(history) > 2 and self.now - history[1][0] > _RATE_SECONDS:
                history.popleft()

    def _worker(self, line: Mapping[str, Any]) -> WorkerState:
        number = int(line["worker"])
        if number not in self.workers:
            self.workers[number] = WorkerState(number, since=self.now)
        return self.workers[number]

    def _fault(self, worker: int | None, text: str) -> None:
        self.faults.append({"seconds": self.now - self.begin, "worker": worker, "text": text})

    # --------------------------------------------------------------------- views

    def progress_per_second(self) -> float | None:
        """Return the progress per second of the last minute, in local steps or samples; None while unknown."""
        (begin, first), now = self._history[0], self.now
        return (self.progress - first) / (now - begin) if now > begin and self.progress > first else None

    def as_dict(self, now: float | None = None) -> dict[str, Any]:
        """Return the state in JSON's types.

        Args:
            now: time of the server's clock; by default that of the last line.

        """
        now = self.now if now is None else max(now, self.now)
        rate, run = self.progress_per_second(), self.run or {}
        left = None if self.total is None else max(0, self.total - self.progress)
        work = sum(self._work_of(worker) for worker in self.workers.values())
        ordered = sorted(
            self.workers.values(), key=lambda worker: (worker.state in ("away", "finished"), worker.number)
        )
        return {
            "run_name": run.get("run_name"),
            "virtual": run.get("virtual", False),
            "parameters": run.get("parameters"),
            "started": run.get("time"),
            "ended": self.ended,
            "error": self.error,
            "paused": self.paused,
            "seconds": now - self.begin,
            "version": self.version,
            "progress": self.progress,
            "total": self.total,
            "unit": "samples" if self.counts_samples else "local steps",
            "progress_per_second": rate,
            "seconds_left": None if self.ended or not rate or left is None else left / rate,
            "global_step": self.global_step,
            "values": self.values,
            "validation": self.validation,
            "losses": [[at - self.begin, loss] for at, loss in self.losses if math.isfinite(loss)],
            "update_norm": self.update_norm,
            "momentum_cosine": self.momentum_cosine,
            "refusals": dict(self.refusals),
            "faults": list(self.faults),
            "bytes_sent": self.bytes_sent,
            "bytes_received": self.bytes_received,
            "more_workers": max(0, len(ordered) - MAX_WORKERS),
            "workers": sorted(
                (self._worker_dict(worker, now, work, run) for worker in ordered[:MAX_WORKERS]),
                key=lambda worker: int(worker["worker"]),
            ),
        }

    def _work_of(self, worker: WorkerState) -> int:
        return worker.samples if self.counts_samples else worker.steps

    def _worker_dict(self, worker: WorkerState, now: float, work: int, run: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "worker": worker.number,
            "state": worker.state_at(now),
            "state_seconds": max(0.0, now - worker.since),
            "steps_per_second": worker.steps_per_second,
            "local_steps": worker.local_steps,
            "staleness": worker.staleness,
            "mean_staleness": worker.total_staleness / worker.rounds if worker.rounds else 0.0,
            "rounds": worker.rounds,
            "steps": worker.steps,
            "samples": worker.samples,
            "share": self._work_of(worker) / work if work else 0.0,
            "compute_seconds": worker.compute_seconds,
            "exchange_seconds": worker.exchange_seconds,
            "total_exchange_seconds": worker.total_exchange_seconds,
            "wait_seconds": worker.wait_seconds,
            "bytes": _bytes_of(worker, run),
            "refused": worker.refused,
            "sessions": worker.sessions,
            "losses": worker.losses,
        }


def _bytes_of(worker: WorkerState, run: Mapping[str, Any]) -> int:
    """Return the bytes of a worker's pushes and models, in their usual sizes."""
    if worker.number == 0 and not run.get("virtual"):
        return 0  # It is in the server's own process.
    return int(worker.pushes * run.get("push_bytes", 0) + worker.dispatches * run.get("model_bytes", 0))
