"""The server's side of the evaluator."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_async_localsgd.outer import DelayedNesterov
from lightning_async_localsgd.protocol.buffers import PooledBuffer
from lightning_async_localsgd.protocol.exchange import ExchangeError
from lightning_async_localsgd.protocol.messages import EVALUATOR, Push, Reply
from lightning_async_localsgd.protocol.ports import ReplyChannel
from lightning_async_localsgd.server.evaluations import Evaluations, ValidationResult
from lightning_async_localsgd.server.global_model import GlobalModel
from tests.harness import LAYOUT, hello
from tests.unit.server.serving import RecordingChannel, make_server


class Channel(ReplyChannel):
    """Records what is sent, as if the evaluator had received it at once."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.refused: list[str] = []

    def dispatch(self, reply: Reply, buffer: PooledBuffer) -> None:
        self.replies.append(reply)
        buffer.release()

    def refuse(self, reason: str) -> None:
        self.refused.append(reason)


def push(sequence: int, session: str = "s", stop: bool = False, text: str = "") -> Push:
    return Push(
        EVALUATOR, session, sequence, "this", 0, 0, 0, 0, 0.0, 0.0, final=False, stop=stop, metrics=text,
    )  # fmt: skip


class Evaluated:
    """Evaluations with one evaluator that has joined."""

    def __init__(self) -> None:
        self.model = GlobalModel(LAYOUT, DelayedNesterov(), 1)
        self.evaluations = Evaluations("this", LAYOUT.numel)
        self.channel = Channel()
        assert self.join() is None
        self.evaluations.push(push(1), self.channel)

    def join(self, session: str = "s", **changes: Any) -> str | None:
        return self.evaluations.join(hello(EVALUATOR, session, **changes), self.channel, self.model)

    def request(self) -> int | None:
        request = self.evaluations.begin(self.model, {"step": 3})
        if request is not None:
            request.buffer.release()
        return None if request is None else request.number

    def answer(self, sequence: int, number: int) -> str:
        text = json.dumps({"number": number})
        self.evaluations.push(push(sequence, text=text), self.channel)
        return text

    @property
    def results(self) -> list[ValidationResult]:
        found = []
        while not self.evaluations.results.empty():
            found.append(self.evaluations.results.get_nowait())
        return found


def test_evaluator_is_present_once_it_has_reported_that_it_can_validate() -> None:
    evaluations, channel = Evaluations("this", LAYOUT.numel), Channel()
    model = GlobalModel(LAYOUT, DelayedNesterov(), 1)
    assert evaluations.join(hello(EVALUATOR, "s"), channel, model) is None
    assert [(reply.sequence, reply.broadcast) for reply in channel.replies] == [(0, "")]
    assert not evaluations.present
    assert evaluations.push(push(1), channel) is None
    assert evaluations.present


def test_reason_of_an_evaluator_that_cannot_validate_is_returned() -> None:
    evaluations = Evaluated().evaluations
    assert evaluations.push(push(2, stop=True, text="no data"), Channel()) == "no data"


def test_one_validation_is_out_at_a_time() -> None:
    run = Evaluated()
    assert run.request() == 1
    assert run.request() is None
    assert json.loads(run.channel.replies[-1].broadcast) == {"step": 3, "number": 1}
    text = run.answer(2, 1)
    assert run.results == [ValidationResult(1, text)]
    assert run.request() == 2


def test_result_that_is_sent_again_counts_once_and_is_answered_again() -> None:
    run = Evaluated()
    run.request()
    run.answer(2, 1)
    run.request()
    assert run.join(reconnecting=True) is None
    run.answer(2, 1)
    assert len(run.results) == 1
    assert [(reply.sequence, json.loads(reply.broadcast)["number"]) for reply in run.channel.replies[-2:]] == [
        (2, 2)
    ] * 2


def test_what_a_lost_evaluator_was_validating_is_reported() -> None:
    run = Evaluated()
    run.request()
    run.evaluations.lose("another", "it is of no interest")
    assert run.evaluations.present
    run.evaluations.lose("s", "it died")
    assert run.results == [ValidationResult(1, None)]
    assert run.request() is None
    # It is back, with a result that nobody waits for.
    run.evaluations.revive("s")
    run.answer(2, 1)
    assert run.results == []
    assert run.request() == 2


def test_only_one_evaluator_may_be_there() -> None:
    run = Evaluated()
    assert "at most one" in (run.join("t") or "")
    run.evaluations.lose("s", "it died")
    assert run.join("t") is None
    assert run.evaluations.push(push(1, "t"), run.channel) is None
    assert run.request() == 1
    run.evaluations.push(push(5, "s"), outdated := Channel())
    assert outdated.refused == ["another evaluator has replaced this one"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"number": true}', '{"number": 2}'])
def test_text_that_is_no_result_of_the_request_does_not_count(text: str) -> None:
    run = Evaluated()
    run.request()
    run.evaluations.push(push(2, text=text), run.channel)
    assert run.results == []


def test_evaluator_that_waits_ends_with_training() -> None:
    run = Evaluated()
    run.evaluations.end(run.model)
    run.evaluations.end(run.model)
    assert [reply.stop for reply in run.channel.replies] == [False, True]
    assert run.channel.refused == []


@pytest.mark.parametrize("reconnects", [False, True])
def test_evaluator_that_is_validating_at_the_end_or_comes_back_is_told_the_end(reconnects: bool) -> None:
    run = Evaluated()
    run.request()
    if reconnects:
        run.evaluations.lose("s", "its connection broke")
    run.evaluations.end(run.model)
    assert run.channel.refused == ([] if reconnects else ["training has ended"])
    assert run.join("s", reconnecting=True) == run.join("t") == "training has ended"
    assert run.evaluations.check_join() == "training is over"
    run.evaluations.push(push(2, text='{"number": 1}'), late := Channel())
    assert late.refused == ["training has ended"]
    assert not run.evaluations.present


@pytest.mark.parametrize("started", [False, True])
def test_evaluator_that_cannot_validate_ends_only_a_run_that_has_not_begun(
    started: bool, caplog: pytest.LogCaptureFixture
) -> None:
    server = make_server(2, total=None, threaded=False)
    workers, unfit = [RecordingChannel() for _ in range(2)], Channel()
    for number in range(1 + started):
        server.join(hello(number, layout=server.layout), workers[number])
    server.join(hello(EVALUATOR, "s"), unfit)
    for _ in range(2):  # The answer was lost.
        server.push(push(1, stop=True, text="no validation data"), None, unfit)
    assert unfit.refused == ["no validation data"] * 2
    assert not server.evaluations.present
    if not started:
        assert workers[0].refusals == ["no validation data"]
        with pytest.raises(ExchangeError, match=r"^no validation data$"):
            server.raise_failure()
        return
    assert [channel.refusals for channel in workers] == [[], []]
    server.raise_failure()
    server.join(hello(EVALUATOR, "s", reconnecting=True), unfit)
    server.revive(EVALUATOR, "s")
    server.lost(EVALUATOR, "s", "it has ended")
    assert unfit.refused == ["no validation data"] * 3
    warnings = [record.message for record in caplog.records if record.name.endswith("evaluations")]
    assert warnings == ["no validation data. Training goes on, and rank 0 validates"]
    server.join(hello(EVALUATOR, "t"), fit := Channel())
    server.push(push(1, "t"), None, fit)
    assert fit.refused == []
    assert server.evaluations.present
    server.close()


@given(st.lists(st.sampled_from(["request", "answer", "again", "lose", "revive", "replace"]), max_size=40))
def test_every_request_has_one_result_or_is_the_one_that_is_out(events: list[str]) -> None:
    run = Evaluated()
    session, sequence, requested, results = 0, 1, 0, []
    names = ["s"]
    for event in events:
        if event == "request":
            requested += run.request() is not None
        elif event in ("answer", "again"):
            sequence += event == "answer"
            number = json.dumps({"number": requested})
            run.evaluations.push(push(sequence, names[-1], text=number if sequence > 1 else ""), run.channel)
        elif event == "lose":
            run.evaluations.lose(names[-1], "it died")
        elif event == "revive":
            run.evaluations.revive(names[-1])
        elif run.join(f"s{session}") is None:
            names.append(f"s{session}")
            session, sequence = session + 1, 1
            run.evaluations.push(push(1, names[-1]), run.channel)
        results += run.results
        numbers = [result.number for result in results]
        assert numbers == list(range(1, len(numbers) + 1))
        assert requested - len(numbers) in (0, 1)
