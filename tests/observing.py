"""Observers of a coordinator or server, for the tests."""

from __future__ import annotations

from collections.abc import Callable

from lightning_async_localsgd.server.events import Event
from lightning_async_localsgd.server.observers import RunObserver
from lightning_async_localsgd.server.run_stats import PushOutcome


class RecordingObserver(RunObserver):
    """Records pushes and events.

    Args:
        on_push: called with the outcome of each push.

    """

    def __init__(self, on_push: Callable[[PushOutcome], None] = lambda push: None) -> None:
        self.pushes: list[PushOutcome] = []
        self.events: list[Event] = []
        self._on_push = on_push

    def on_push(self, outcome: PushOutcome) -> None:
        self.pushes.append(outcome)
        self._on_push(outcome)

    def on_event(self, event: Event) -> None:
        self.events.append(event)
