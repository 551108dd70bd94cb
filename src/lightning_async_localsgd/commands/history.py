"""What happened in a run when, from the lines of its event file: the material of the report and of the trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_async_localsgd.server.run_state import RunState

Point = tuple[float, float]

STATES = ("computing", "exchanging", "waiting", "validating", "away")
"""What a worker does, in the order of the legend."""


@dataclass(frozen=True)
class Span:
    """A time for which a worker does one thing.

    Args:
        state: one of :data:`STATES`.
        begin: seconds since the run began.
        end: seconds since the run began.
        facts: what else is known, such as the steps of a round.

    """

    state: str
    begin: float
    end: float
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class _Worker:
    """What a worker is doing.

    Attributes:
        state: one of :data:`STATES`, or "" before it does anything.
        since: since when, in seconds since the run began.
        overlaps: whether it trains while its pushes are in flight.
        pushed_span: position of the round of its last push in the list of its spans.
        arrived: whether it waits for the dispatch that answers a push.
        dispatch_at: when it was dispatched last.

    """

    state: str = ""
    since: float = 0.0
    overlaps: bool = False
    pushed_span: int | None = None
    arrived: bool = False
    dispatch_at: float | None = None


class History:
    """The history of the last run in an event file: :meth:`add` takes in the lines, and :meth:`finish` ends it.

    Attributes:
        state: the state at the end.
        spans: for each worker, what it did when.
        values: for each logged value, (seconds, local steps or samples of all workers, value).
        validations: the same for values of validations.
        staleness: for each worker, (seconds, staleness) of its merged pushes.
        waits: for each worker, (seconds, seconds that it waited after a push).
        local_steps: for each worker, (seconds, local steps of its round).
        cosine: (seconds, momentum cosine).
        norms: (seconds, update norm).
        sent: (seconds, bytes that the server has sent).
        received: (seconds, bytes that the server has received).
        faults: what went wrong: dictionaries of ``seconds``, ``worker`` and ``text``.
        end: seconds from the begin to the last line.
        lacks_beginning: whether earlier lines were dropped, because the file was rotated.

    """

    def __init__(self) -> None:
        self.state = RunState(max_faults=None)
        self._begin({})
        self.lacks_beginning = False

    def finish(self) -> None:
        """End what the workers were doing at the end of the file."""
        for number in list(self._workers):
            self._change(number, "", self.end)

    def _begin(self, run: Mapping[str, Any]) -> None:
        self._run = run
        self._offset = -float(run.get("seconds") or 0.0)
        self._workers: dict[int, _Worker] = {}
        self.spans: dict[int, list[Span]] = {}
        self.values: dict[str, list[tuple[float, float, float]]] = {}
        self.validations: dict[str, list[tuple[float, float, float]]] = {}
        self.staleness: dict[int, list[Point]] = {}
        self.waits: dict[int, list[Point]] = {}
        self.local_steps: dict[int, list[Point]] = {}
        self.cosine: list[Point] = []
        self.norms: list[Point] = []
        self.sent: list[Point] = []
        self.received: list[Point] = []
        self.faults: list[dict[str, Any]] = []
        self.end = 0.0

    @property
    def run(self) -> Mapping[str, Any]:
        """The line that began the run."""
        return self._run

    def add(self, line: Mapping[str, Any]) -> None:
        """Take in a line."""
        kind, known = line["kind"], len(self.state.faults)
        if kind == "run":
            self._on_run(line)
        self.state.add(line)
        if line.get("seconds") is not None:
            self.end = max(self.end, float(line["seconds"]) + self._offset)
        faults = self.state.faults
        # There are fewer if another run has begun.
        new = len(faults) - (known if len(faults) >= known else 0)
        self.faults += [{**faults[index], "seconds": self.end} for index in range(-new, 0)]
        method = getattr(self, f"_on_{kind}", None)
        if method is not None and kind != "run" and self._run:
            method(line, self.end)

    def _on_run(self, line: Mapping[str, Any]) -> None:
        run = self._run
        if not run:
            self.lacks_beginning = bool(line.get("continued"))
            self._begin(line)
        elif line.get("continued") and line.get("incarnation") == run.get("incarnation"):
            return
        elif not line.get("run_name") or line.get("run_name") != run.get("run_name"):
            self._begin(line)
            self.lacks_beginning = False
        else:
            # Rank 0 was restarted: another clock, and the time in between is a part of the run.
            if not line.get("virtual"):
                self._offset = line["time"] - run["time"] - line["seconds"]
            for number in self._workers:
                self._change(number, "away", self.end)

    # --------------------------------------------------------------------- lines

    def _on_join(self, line: Mapping[str, Any], now: float) -> None:
        self._change(line["worker"], "waiting", now)
        self._of(line["worker"]).arrived = False

    def _on_lost(self, line: Mapping[str, Any], now: float) -> None:
        if not self.state.ended:
            self._change(line["worker"], "away", now)

    def _on_back(self, line: Mapping[str, Any], now: float) -> None:
        if self._of(line["worker"]).state == "away":
            self._change(line["worker"], "computing", now)

    def _on_interrupt(self, line: Mapping[str, Any], now: float) -> None:
        self._change(line["worker"], "validating", now)

    def _on_continue(self, line: Mapping[str, Any], now: float) -> None:
        if self._of(line["worker"]).state == "validating":
            self._change(line["worker"], "computing", now)

    def _on_dispatch(self, line: Mapping[str, Any], now: float) -> None:
        for name, steps in line["steps"].items():
            number = int(name)
            worker = self._of(number)
            if worker.state == "waiting" and worker.arrived:
                self.waits.setdefault(number, []).append((now, now - worker.since))
            worker.overlaps = name in line.get("overlap", ())
            worker.dispatch_at = now
            if line.get("final"):
                self._change(number, "", now)
                continue
            self._change(number, "computing", now)
            self.local_steps.setdefault(number, []).append((now, float(steps)))

    def _on_held(self, line: Mapping[str, Any], now: float) -> None:
        self._arrive(line, {"steps": line["steps"]}, now)

    def _on_push(self, line: Mapping[str, Any], now: float) -> None:
        number = line["worker"]
        if self._of(number).state in ("", "away"):
            return
        facts = {"steps": line["steps"], "staleness": line["staleness"], "version": line["version"]}
        if line["refused"] is not None:
            facts["refused"] = line["refused"]
        self._arrive(line, facts, now)
        if line["refused"] is None and line["steps"]:
            self.staleness.setdefault(number, []).append((now, float(line["staleness"])))
            if line.get("update_norm") is not None:
                self.norms.append((now, line["update_norm"]))
            if line.get("momentum_cosine") is not None:
                self.cosine.append((now, line["momentum_cosine"]))

    def _on_metrics(self, line: Mapping[str, Any], now: float) -> None:
        self._note_values(self.values, line, now)

    def _on_validation(self, line: Mapping[str, Any], now: float) -> None:
        self._note_values(self.validations, line, now)

    def _on_end(self, line: Mapping[str, Any], now: float) -> None:
        self._note_traffic(line, now)

    # ------------------------------------------------------------------ internal

    def _arrive(self, line: Mapping[str, Any], facts: Mapping[str, Any], now: float) -> None:
        """End the round of a worker whose push has arrived, or tell more of a round whose push was held."""
        number, worker = line["worker"], self._of(line["worker"])
        spans = self.spans.setdefault(number, [])
        if worker.state == "waiting" and worker.arrived:
            if worker.pushed_span is not None:
                spans[worker.pushed_span] = replace(spans[worker.pushed_span], facts=facts)
            return
        self._mark_exchange(worker, spans, float(line.get("exchange_seconds") or 0.0))
        if not worker.overlaps:
            self._change(number, "waiting", now, facts)
            worker.arrived = True
            worker.pushed_span = len(spans) - 1 if spans and spans[-1].end == now else None

    def _note_values(self, store: dict[str, list[Any]], line: Mapping[str, Any], now: float) -> None:
        for name, value in line["values"].items():
            if value is not None:
                store.setdefault(name, []).append((now, float(line.get("progress", 0)), value))
        self._note_traffic(line, now)

    def _note_traffic(self, line: Mapping[str, Any], now: float) -> None:
        if "bytes_sent" in line:
            self.sent.append((now, float(line["bytes_sent"])))
            self.received.append((now, float(line["bytes_received"])))

    def _of(self, number: int) -> _Worker:
        return self._workers.setdefault(number, _Worker())

    def _change(self, number: int, state: str, now: float, facts: Mapping[str, Any] | None = None) -> None:
        """End what a worker does, and begin something else."""
        worker = self._of(number)
        if worker.state and now > worker.since:
            self.spans.setdefault(number, []).append(Span(worker.state, worker.since, now, facts or {}))
        worker.state, worker.since = state, now

    def _mark_exchange(self, worker: _Worker, spans: list[Span], seconds: float) -> None:
        """Mark the exchange between the last two rounds, whose duration comes with the push after it.

        Half of it is taken to be the upload, before the earlier push has arrived, and half the download.
        """
        index, half = worker.pushed_span, seconds / 2
        if half <= 0.0 or worker.overlaps:
            return
        if index is not None and spans[index].state == "computing":
            span = spans[index]
            middle = max(span.begin, span.end - half)
            spans[index : index + 1] = [
                part
                for part in (Span("computing", span.begin, middle, span.facts), Span("exchanging", middle, span.end))
                if part.end > part.begin
            ]
        if worker.state == "computing" and worker.dispatch_at == worker.since:
            middle = min(worker.since + half, self.end)
            if middle > worker.since:
                spans.append(Span("exchanging", worker.since, middle))
                worker.since = middle
