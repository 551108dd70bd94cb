"""Observers of a run: the server calls them for every event, push and batch of logged values."""

from __future__ import annotations

import logging
import queue
from typing import TYPE_CHECKING, Any

from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lightning_async_localsgd.server.events import Event
    from lightning_async_localsgd.server.run_stats import PushOutcome

_log = logging.getLogger(__name__)

_MAX_METRICS = 100_000
"""Largest number of pushes whose logged values wait for rank 0. Rank 0 reads them at every batch."""


class RunObserver:
    """Base class of observers. Override the methods of interest.

    The server's thread calls the methods, in the order in which things happen. They must return at once.
    """

    def on_event(self, event: Event) -> None:
        """Handle an event of the server. The first event is the beginning of the run."""

    def on_push(self, outcome: PushOutcome) -> None:
        """Handle the outcome of a push."""

    def on_metrics(self, worker: int, text: str) -> None:
        """Handle the values that a worker's module logged in a round, see :attr:`.Push.metrics`."""

    def on_line(self, line: dict[str, Any]) -> None:
        """Handle a line of the event file, see :mod:`.journal`. It must not be changed."""


class ObserverList(RunObserver):
    """Passes everything on to several observers, in the order in which they were added."""

    def __init__(self) -> None:
        self._observers: list[RunObserver] = []

    def add(self, observers: Iterable[RunObserver]) -> None:
        """Add observers. They see what happens from now on."""
        self._observers += observers

    @override
    def on_event(self, event: Event) -> None:
        for observer in self._observers:
            observer.on_event(event)

    @override
    def on_push(self, outcome: PushOutcome) -> None:
        for observer in self._observers:
            observer.on_push(outcome)

    @override
    def on_metrics(self, worker: int, text: str) -> None:
        for observer in self._observers:
            observer.on_metrics(worker, text)

    @override
    def on_line(self, line: dict[str, Any]) -> None:
        for observer in self._observers:
            observer.on_line(line)


class MetricsQueue(RunObserver):
    """Keeps the values that workers log until rank 0 reads them.

    Attributes:
        received: workers and the texts of their pushes, in order of arrival.

    """

    def __init__(self) -> None:
        self.received: queue.Queue[tuple[int, str]] = queue.Queue(_MAX_METRICS)

    @override
    def on_metrics(self, worker: int, text: str) -> None:
        try:
            self.received.put_nowait((worker, text))
        except queue.Full:
            _log.warning(
                "rank 0 has not read the values that workers logged with the last %d pushes; the values of worker %d "
                "are dropped", _MAX_METRICS, worker,
            )  # fmt: skip
