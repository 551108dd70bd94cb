"""The server's event loop: order, answers, failures and the end, with and without a thread."""

from __future__ import annotations

import threading

import pytest

from lightning_async_localsgd.server.event_loop import EventLoop, nothing


def fail() -> None:
    raise ArithmeticError("the event broke")


class Recorder:
    """Records the calls of a loop."""

    def __init__(self, threaded: bool, timeout: float | None = None) -> None:
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self.called = threading.Event()
        self.loop = EventLoop(self.after_event, lambda: timeout, self.on_failure, threaded)

    def after_event(self) -> None:
        self.calls.append("after")
        self.threads.add(threading.get_ident())
        self.called.set()

    def on_failure(self, error: BaseException) -> None:
        self.calls.append(str(error))


@pytest.mark.parametrize("threaded", [True, False])
def test_events_run_in_order_and_answers_are_returned(threaded: bool) -> None:
    recorder = Recorder(threaded)
    for number in range(3):
        recorder.loop.submit(lambda number=number: recorder.calls.append(str(number)))  # type: ignore[misc]
    assert recorder.loop.ask(lambda: list(recorder.calls)) == ["0", "after", "1", "after", "2", "after"]
    with pytest.raises(ZeroDivisionError):
        recorder.loop.ask(lambda: 1 // 0)
    assert recorder.loop.failure is None, "an answer that fails is the caller's failure"
    assert recorder.loop.close()
    assert not recorder.loop.close()
    assert (recorder.threads == {threading.get_ident()}) is not threaded


def test_loop_looks_again_after_its_timeout() -> None:
    recorder = Recorder(threaded=True, timeout=0.01)
    assert recorder.called.wait(10.0)
    recorder.loop.close()


def test_failure_in_the_thread_is_reported_and_ends_the_dispatches() -> None:
    recorder = Recorder(threaded=True)
    recorder.loop.submit(fail)
    recorder.loop.submit(lambda: recorder.calls.append("later"))
    with pytest.raises(RuntimeError, match="the event broke"):
        recorder.loop.ask(recorder.loop.raise_failure)
    assert recorder.calls == ["the event broke", "later"]
    recorder.loop.submit(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert recorder.loop.ask(lambda: str(recorder.loop.failure)) == "the event broke", "the first failure counts"
    recorder.loop.close()


def test_failure_without_a_thread_is_raised_at_once() -> None:
    recorder = Recorder(threaded=False)
    with pytest.raises(ArithmeticError, match="the event broke"):
        recorder.loop.submit(fail)
    with pytest.raises(RuntimeError, match="the event broke"):
        recorder.loop.raise_failure(closed=False)
    recorder.loop.submit(nothing)
    assert recorder.calls == []


def test_closed_loop_answers_no_more() -> None:
    recorder = Recorder(threaded=True)
    recorder.loop.close()
    recorder.loop.raise_failure(closed=False)
    with pytest.raises(RuntimeError, match="closed"):
        recorder.loop.ask(lambda: None)
