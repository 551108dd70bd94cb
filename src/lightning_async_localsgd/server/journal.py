"""Tells the observers of a run what happens, as lines of the event file.

A line is a dictionary of JSON's types with a ``kind`` and the ``seconds`` of the server's clock. ``docs/commands.md``
lists the kinds and their fields. The event file, the answers to ``watch`` and the report are all made of these lines.
"""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_async_localsgd.server.observers import RunObserver

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lightning_async_localsgd.protocol.layout import Layout
    from lightning_async_localsgd.protocol.messages import Push
    from lightning_async_localsgd.server.events import Event
    from lightning_async_localsgd.server.run_state import RunState
    from lightning_async_localsgd.server.run_stats import PushOutcome
    from lightning_async_localsgd.server.traffic import Traffic

_TOGETHER = 500
"""Lines from which the state of the run is updated, at most."""

FORMAT = 1
"""Format number of event files. Raised when a reader of the previous format would misread a file."""


class Journal(RunObserver):
    """Makes a line of each event and push that a reader of the event file needs.

    Args:
        emit: gets the lines.
        facts: further fields of the first line.

    """

    def __init__(self, emit: Callable[[dict[str, Any]], None], facts: Mapping[str, Any]) -> None:
        self._state: RunState | None = None
        self._new: list[dict[str, Any]] = []
        self._emit = emit
        self._facts = facts
        self._undecided: dict[int, Event] = {}
        self._paused = False

    def write(self, line: dict[str, Any]) -> None:
        """Hand a line to the observers."""
        self._emit(line)
        self._new.append(line)
        # Many at once: the first line costs several times as much as the others.
        if len(self._new) >= _TOGETHER:
            self._update()

    def note(self, paused: bool, now: float) -> None:
        """Write what an event has led to: pushes that are held for their group, and pauses for lack of workers."""
        for event in self._undecided.values():
            push: Push = event.content["push"]
            names = ("worker", "session", "sequence", "steps", "exchange_seconds")
            self.write({"kind": "held", "seconds": event.seconds, **{name: getattr(push, name) for name in names}})
        self._undecided.clear()
        if paused != self._paused:
            self._paused = paused
            self.write({"kind": "pause" if paused else "resume", "seconds": now})

    @property
    def state(self) -> RunState:
        """State of the run according to the lines."""
        return self._update()

    def status(self, now: float) -> str:
        """Return the state of the run at a time of the server's clock as a JSON object, for processes that watch it."""
        return json.dumps({**self.state.as_dict(now), "time": time.time(), "package": package_version()})

    def _update(self) -> RunState:
        if self._state is None:
            # Only the server needs it, so the other ranks do not import it.
            from lightning_async_localsgd.server.run_state import RunState

            self._state = RunState()
        new, self._new = self._new, []
        for line in new:
            self._state.add(line)
        return self._state

    @override
    def on_event(self, event: Event) -> None:
        kind, content, seconds = event.kind, event.content, event.seconds
        line: dict[str, Any]
        if kind == "push":
            self._undecided[content["push"].worker] = event
            return
        if kind == "dispatch":
            replies = content["replies"].items()
            line = {
                "kind": "dispatch",
                "seconds": seconds,
                "steps": {str(worker): reply.local_steps for worker, reply in replies},
            }
            if overlapping := [str(worker) for worker, reply in replies if reply.overlap_steps]:
                line["overlap"] = overlapping
            if any(reply.stop for _, reply in replies):
                line["final"] = True
        elif kind == "begin":
            line = self._first_line(seconds, content)
        elif kind == "join":
            hello = content["hello"]
            line = {"kind": "join", "seconds": seconds, "worker": hello.worker, "session": hello.session}
        elif kind == "leave":
            line = {"kind": "lost", "seconds": seconds, **content}
        elif kind == "revive":
            line = {"kind": "back", "seconds": seconds, **content}
        elif kind in ("interrupt", "continue", "stop"):
            line = {"kind": kind, "seconds": seconds, **content}
        else:
            return
        self.write(line)

    @override
    def on_push(self, outcome: PushOutcome) -> None:
        self._undecided.pop(outcome.worker, None)
        self.write({"kind": "push", **vars(outcome)})

    def _first_line(self, seconds: float | None, content: Mapping[str, Any]) -> dict[str, Any]:
        names = ("incarnation", "workers", "min_workers", "version", "done", "total")
        return {
            "kind": "run",
            "seconds": seconds,
            "format": FORMAT,
            "time": time.time(),
            "package": package_version(),
            "host": platform.node(),
            "process": os.getpid(),
            **{name: content[name] for name in names},
            "step_samples": content.get("step_samples", 0),
            **self._facts,
        }


def run_facts(run_name: str, layout: Layout, traffic: Traffic, virtual: bool) -> dict[str, Any]:
    """Return what the first line says of a run beside its begin event."""
    return {
        "run_name": run_name,
        "virtual": virtual,
        "parameters": layout.parameter_numel,
        "push_bytes": traffic.push_bytes,
        "model_bytes": traffic.model_bytes,
    }


def package_version() -> str:
    """Return the version of this package."""
    try:
        return version("lightning-async-localsgd")
    except PackageNotFoundError:  # A checkout that is on the path, and not installed.
        return "unknown"
