"""A call that runs in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

_T = TypeVar("_T")


class BackgroundCall(Generic[_T]):
    """Calls a function in a thread of its own, and keeps its result.

    Args:
        function: the function.
        name: name of the thread.

    Example::

        >>> call = BackgroundCall(lambda: 6 * 7, "example")
        >>> call.result()
        42

    """

    def __init__(self, function: Callable[[], _T], name: str) -> None:
        self._future: Future[_T] = Future()
        self._function = function
        # A daemon thread, so that a call that hangs does not keep the process from exiting.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether the function has returned or raised an error."""
        return self._future.done()

    def result(self) -> _T:
        """Wait for the function, and return what it returned, or raise its error."""
        return self._future.result()

    def wait(self, seconds: float) -> bool:
        """Wait up to ``seconds`` for the end of the thread. Return whether it has ended. Raises no error."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._future.set_result(self._function())
        except BaseException as error:
            self._future.set_exception(error)
