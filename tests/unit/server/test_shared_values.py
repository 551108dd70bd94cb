"""Frozen parameters that workers move themselves: the run's values, and their exchange through a server."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_async_localsgd.protocol.buffers import BufferPool
from lightning_async_localsgd.protocol.frozen import FrozenParameters
from lightning_async_localsgd.protocol.layout import Binding, Layout
from lightning_async_localsgd.protocol.messages import MessageError, Push, Share
from lightning_async_localsgd.runtime.local_exchange import LocalExchange
from lightning_async_localsgd.runtime.shared_parameters import SharedParameters
from lightning_async_localsgd.runtime.worker import Worker
from lightning_async_localsgd.server.server import Server
from lightning_async_localsgd.server.shared_values import SharedValues
from tests.harness import make_coordinator


def share_of(parameters: str, merge: bool = True, worker: int = 0) -> Share:
    return Share(worker, f"s{worker}", 1, "this", parameters, merge)


def test_first_value_sets_and_later_ones_move_the_run_by_their_share() -> None:
    values = SharedValues([1, 2])
    first = torch.tensor([1.0, 2.0, 3.0])
    assert values.answer(share_of("0-1"), first, 2).shared == "0-1"
    assert first.tolist() == [1.0, 2.0, 3.0]
    second = torch.tensor([4.0, 5.0])
    values.answer(share_of("1"), second, 2)
    assert second.tolist() == [3.0, 4.0]
    assert values.copies()[1].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("flat", [[math.nan], [math.inf]])
def test_values_that_are_not_finite_do_not_count(flat: list[float]) -> None:
    values = SharedValues([1])
    values.answer(share_of("0"), torch.tensor(flat), 2)
    assert values.listed == ""
    values.answer(share_of("0"), torch.tensor([2.0]), 2)
    bad = torch.tensor(flat)
    values.answer(share_of("0"), bad, 2)
    assert bad.tolist() == [2.0]


def test_buffers_fit_the_values_of_a_header() -> None:
    values = SharedValues([1, 2, 4])
    buffer = values.buffers(share_of("0,2")).try_acquire()
    assert buffer is not None
    assert buffer.tensor.numel() == 5
    for parameters in ("", "3", "0-3"):
        with pytest.raises(MessageError):
            values.buffers(share_of(parameters))


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1, bias=False)
        self.teacher = nn.Linear(2, 1, bias=False).requires_grad_(False)
        self.backbone = nn.Linear(2, 1, bias=False).requires_grad_(False)


Start = Callable[[int], tuple[Server, list[Worker], list["Student"]]]


def watched(module: nn.Module, layout: Layout) -> FrozenParameters:
    frozen = FrozenParameters(module, layout)
    frozen.watch()
    return frozen


class Counting(LocalExchange):
    """Counts what is sent beside the pushes."""

    sent = 0

    def share(self, share: Share, values: torch.Tensor) -> object:  # type: ignore[override]
        self.sent += values.numel()
        return super().share(share, values)


@pytest.fixture
def start() -> Start:
    def start_(workers: int) -> tuple[Server, list[Worker], list[Student]]:
        torch.manual_seed(0)
        first = Student()
        layout = Layout.of(first)
        coordinator = make_coordinator(workers, total=1000, local_steps=1, layout=layout)
        Binding(layout, first).read(coordinator.model.theta)
        sizes = FrozenParameters(first, layout).sizes
        server = Server(coordinator, BufferPool(layout.numel), threaded=False, shared=SharedValues(sizes))
        modules = [copy.deepcopy(first) for _ in range(workers)]
        made = []
        for number, module in enumerate(modules):
            worker = Worker(number, Binding(layout, module), Counting(server))
            worker.shared = SharedParameters(watched(module, layout), worker.exchange.share)
            made.append(worker)
        return server, made, modules

    return start_


def round_of(worker: Worker, teacher: nn.Linear, value: float) -> None:
    teacher.weight.data.fill_(value)
    worker.count_step()
    worker.end_step(samples=1)
    worker.end_round()


def test_only_parameters_that_change_are_sent(
    start: Start,
) -> None:
    server, [worker], [module] = start(1)
    worker.join()
    worker.count_step()
    worker.end_round()
    assert worker.exchange.sent == 0, "nothing has changed yet"
    round_of(worker, module.teacher, 3.0)
    assert worker.exchange.sent == 2, "the teacher alone"
    assert {number: value.tolist() for number, value in server.shared_values().items()} == {0: [3.0, 3.0]}
    assert module.teacher.weight.tolist() == [[3.0, 3.0]]


def test_worker_that_joins_later_begins_with_the_values_of_the_run(
    start: Start,
) -> None:
    server, [worker], [module] = start(1)
    worker.join()
    round_of(worker, module.teacher, 3.0)
    late = copy.deepcopy(module)
    late.teacher.weight.data.zero_()
    layout = server.layout
    joined = Worker(server.new_number(), Binding(layout, late), LocalExchange(server))
    joined.shared = SharedParameters(watched(late, layout), joined.exchange.share)
    joined.join()
    assert late.teacher.weight.tolist() == [[3.0, 3.0]]
    # Its values count from now on: half of the way, as one of two workers.
    round_of(joined, late.teacher, 5.0)
    assert late.teacher.weight.tolist() == [[4.0, 4.0]]


def test_session_that_was_replaced_does_not_move_the_values(
    start: Start,
) -> None:
    server, [worker], [module] = start(1)
    worker.join()
    round_of(worker, module.teacher, 3.0)
    values = torch.tensor([9.0, 9.0])
    LocalExchange(server).share(Share(0, "older", 1, server.incarnation, "0", merge=True), values)
    assert values.tolist() == [3.0, 3.0]


def test_changes_are_only_reported_if_frozen_parameters_are_not_to_be_exchanged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = Student()
    frozen = watched(module, Layout.of(module))

    def send(share: Share, values: torch.Tensor) -> object:
        raise AssertionError("nothing may be sent")

    shared = SharedParameters(frozen, send, keeps_own=True)  # type: ignore[arg-type]
    module.teacher.weight.data.fill_(2.0)
    push = Push(1, "s", 1, "this", 0, 1, 1, 0, 0.0, 0.0, False, False)
    shared.push(push)
    shared.push(push)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "1 frozen parameter(s) change in training: 'teacher.weight'. With exchange.frozen=False" in caplog.text
    assert shared.differing() == ["teacher.weight"]
