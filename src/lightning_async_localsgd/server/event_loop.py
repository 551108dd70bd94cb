"""Runs the events of a server one after another, in a thread of its own or in the caller's."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # The builtin one only from Python 3.11 on.
from typing import TypeVar

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_CHECK_SECONDS = 0.5
"""Seconds between two checks for a failure while an answer is awaited."""


class EventLoop:
    """Runs events in order. After the first failure events still run, and must check :attr:`failure`.

    Any thread may call any method.

    Args:
        after_event: called after every event, and when ``timeout`` has passed without one, unless the loop has failed.
        timeout: returns the seconds to wait for the next event; None waits without a limit.
        on_failure: called with the error, in the loop's own thread, each time an event fails.
        threaded: if False, events run at once in the caller's thread, and their errors are raised there.

    """

    def __init__(
        self,
        after_event: Callable[[], None],
        timeout: Callable[[], float | None],
        on_failure: Callable[[BaseException], None],
        threaded: bool,
    ) -> None:
        self.failure: BaseException | None = None
        self._after_event = after_event
        self._timeout = timeout
        self._on_failure = on_failure
        self._closed = False
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._run, name="async_localsgd-server", daemon=True)
            self._thread.start()

    def submit(self, event: Callable[[], None]) -> None:
        """Run ``event`` after all earlier events."""
        if self._thread is not None:
            self._events.put(event)
            return
        try:
            self._handle(event)
        except BaseException as error:
            self._note(error)
            raise

    def ask(self, question: Callable[[], _T]) -> _T:
        """Run ``question`` after all earlier events, and return its answer.

        Raises:
            RuntimeError: The loop has failed or is closed, and there is no answer.

        """
        answer: Future[_T] = Future()

        def event() -> None:
            try:
                answer.set_result(question())
            except BaseException as error:
                answer.set_exception(error)

        self.submit(event)
        while True:
            try:
                return answer.result(timeout=_CHECK_SECONDS)
            except FutureTimeoutError:
                self.raise_failure()

    def raise_failure(self, closed: bool = True) -> None:
        """Raise the first failure, if there is one.

        Args:
            closed: also raise an error if the loop is closed.

        Raises:
            RuntimeError: The loop has failed or is closed.

        """
        if self.failure is not None:
            raise RuntimeError(f"the server of the asynchronous run failed: {self.failure}") from self.failure
        if closed and self._closed:
            raise RuntimeError("the server of the asynchronous run is closed")

    def close(self) -> bool:
        """End the thread after the events so far. Can be called twice, also from an event.

        Returns:
            Whether this was the first call.

        """
        if self._closed:
            return False
        self._closed = True
        if self._thread is not None:
            self._events.put(None)
            if self._thread is not threading.current_thread():
                self._thread.join()
        return True

    def _run(self) -> None:
        while True:
            try:
                event = self._events.get(timeout=None if self.failure is not None else self._timeout())
            except queue.Empty:
                event = nothing
            if event is None:
                return
            try:
                self._handle(event)
            except BaseException as error:
                _log.exception("the server of the asynchronous run failed")
                self._note(error)
                self._on_failure(error)

    def _handle(self, event: Callable[[], None]) -> None:
        event()
        if self.failure is None:
            self._after_event()

    def _note(self, error: BaseException) -> None:
        if self.failure is None:  # Later errors are consequences of the first.
            self.failure = error


def nothing() -> None:
    """Do nothing. Submitted to have :class:`EventLoop` call ``after_event``."""
