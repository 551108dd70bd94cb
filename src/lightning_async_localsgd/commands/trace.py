"""The timeline of a run in the Trace Event format, which Perfetto (ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

from typing import Any

from lightning_async_localsgd.commands.history import History

_MICROSECONDS = 1e6
_PROCESS = 1


def trace_events(history: History) -> dict[str, Any]:
    """Return the trace of a run as a JSON object. Each worker is a thread; losses are counters, faults are instants."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": _PROCESS, "name": "process_name", "args": {"name": history.run.get("run_name") or "run"}}
    ]
    for worker, spans in sorted(history.spans.items()):
        named = {"name": f"worker {worker}"}
        events.append({"ph": "M", "pid": _PROCESS, "tid": worker, "name": "thread_name", "args": named})
        events += [
            {
                "ph": "X", "pid": _PROCESS, "tid": worker, "name": span.state, "cat": "worker",
                "ts": _MICROSECONDS * span.begin, "dur": _MICROSECONDS * (span.end - span.begin),
                "args": dict(span.facts),
            }
            for span in spans
        ]  # fmt: skip
    for fault in history.faults:
        event: dict[str, Any] = {
            "ph": "i", "pid": _PROCESS, "name": fault["text"], "ts": _MICROSECONDS * fault["seconds"], "s": "g",
        }  # fmt: skip
        events.append(event if fault["worker"] is None else {**event, "s": "t", "tid": fault["worker"]})
    for name, points in {**history.values, **history.validations}.items():
        for seconds, _, value in points:
            counter: dict[str, Any] = {"ph": "C", "pid": _PROCESS, "name": name, "ts": _MICROSECONDS * seconds}
            events.append({**counter, "args": {name: value}})
    return {"traceEvents": events, "displayTimeUnit": "ms"}
