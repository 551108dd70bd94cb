"""The synchronous beginning on the server: which gradients are averaged, and who is answered with what."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_async_localsgd.policies.synchronous_beginning import SynchronousBeginning, automatic_length
from lightning_async_localsgd.policies.worker_minimum import WorkerMinimum
from lightning_async_localsgd.protocol.layout import Layout
from lightning_async_localsgd.protocol.messages import ALREADY_APPLIED, Push, Reply
from lightning_async_localsgd.protocol.rejections import STEP_MISSED
from lightning_async_localsgd.server.beginning import PATIENCE
from tests.harness import Workers, hello, make_coordinator

LAYOUT = Layout.of(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
SPLIT = LAYOUT.parameter_numel


class Beginners(Workers):
    """Workers that take synchronous steps: the weights are minus the sum of the means.

    Attributes:
        weights: weights of each worker's process.
        means: means that each worker was answered with.

    """

    def __init__(self, workers: int = 3, steps: int = 4, total: int | None = 60, **options: Any) -> None:
        made = make_coordinator(workers, layout=LAYOUT, total=total, beginning=steps, dynamic=True, **options)
        super().__init__(made)
        self.means: dict[int, list[Tensor]] = {worker: [] for worker in range(workers)}
        self.join_all(workers)

    def dispatch(self, now: float) -> dict[int, Reply]:
        replies = super().dispatch(now)
        for worker, reply in replies.items():
            if reply.averaged:
                mean = self.coordinator.beginning.averages.mean
                assert mean is not None
                self.means.setdefault(worker, []).append(mean.clone())
        return replies

    def gradient(self, worker: int, now: float, value: Tensor | float = 1.0, **changes: Any) -> dict[int, Reply]:
        """Hand in the gradient of a worker's step, with a sample for each local step."""
        given = value.clone() if isinstance(value, Tensor) else value  # The harness overwrites what it has sent.
        return self.push(worker, now, given, **{"contents": "gradient", **changes})

    def step(self, now: float, value: float = 1.0) -> dict[int, Reply]:
        """Take a step with all live workers."""
        replies: dict[int, Reply] = {}
        for worker in self.coordinator.live:
            replies = self.gradient(worker, now, value)
        return replies

    def hand_over(self, worker: int, now: float, weights: float = 7.0, **changes: Any) -> dict[int, Reply]:
        """Say that a worker has taken the last step, with its weights if it was asked for them."""
        contents = "weights" if self.replies[worker].send_weights else "gradient"
        return self.push(worker, now, weights, contents=contents, **{"steps": 0, "samples": 0, **changes})


def test_gradients_are_averaged_by_samples_and_buffers_alike() -> None:
    workers = Beginners()
    assert all(
        reply.synchronous and not reply.averaged and reply.local_steps == 1 for reply in workers.replies.values()
    )
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(LAYOUT.numel, generator=generator) for _ in range(3)]
    samples = [8, 8, 4]
    assert workers.gradient(1, 1.0, gradients[1], samples=8) == {}
    assert workers.gradient(0, 1.1, gradients[0], samples=8) == {}
    replies = workers.gradient(2, 1.2, gradients[2], samples=4)
    assert set(replies) == {0, 1, 2}
    mean = workers.means[0][0]
    expected = sum(s * g for s, g in zip(samples, gradients, strict=True)) / 20
    assert torch.allclose(mean[:SPLIT], expected[:SPLIT])
    assert torch.allclose(mean[SPLIT:], (sum(gradients) / 3)[SPLIT:])
    assert {(r.synchronous, r.averaged, r.version, r.progress, r.progress_per_step) for r in replies.values()} == {
        (True, True, 3, 3.0, 3.0)
    }
    assert torch.equal(workers.theta, torch.zeros(LAYOUT.numel)), "only the workers know the weights"
    assert workers.coordinator.budget.done == 3


def test_order_of_arrival_does_not_change_a_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(LAYOUT.numel, generator=generator) for _ in range(3)]
    means = []
    for order in ([0, 1, 2], [2, 0, 1]):
        workers = Beginners()
        for worker in order:
            workers.gradient(worker, 1.0, gradients[worker], samples=worker + 1)
        means.append(workers.means[0][0])
    assert torch.equal(*means)


def test_contributions_follow_speeds_and_end_with_the_beginning() -> None:
    workers = Beginners(steps=20, total=120)
    speeds = [4.0, 2.0, 1.0]
    shares = []
    for number in range(20):
        if not workers.replies[0].synchronous or workers.replies[0].local_steps == 0:
            break
        shares.append([workers.replies[worker].local_steps for worker in range(3)])
        for worker in range(3):
            steps = workers.replies[worker].local_steps
            workers.gradient(worker, number + 1.0, timed_steps=steps, compute_seconds=steps / speeds[worker])
    assert shares[0] == [1, 1, 1]
    assert shares[1] == [4, 2, 1]
    assert 60 <= sum(map(sum, shares)) == workers.coordinator.budget.done < 63, "each worker contributes to the last"
    assert all(min(share) >= 1 for share in shares)


def test_weights_are_handed_over_and_rounds_begin() -> None:
    workers = Beginners(steps=2)
    workers.step(1.0)
    replies = workers.step(2.0)
    assert {(r.synchronous, r.averaged, r.local_steps, r.stop) for r in replies.values()} == {(True, True, 0, False)}
    assert [worker for worker, reply in replies.items() if reply.send_weights] == [0]
    assert workers.hand_over(1, 3.0) == {}
    assert workers.hand_over(0, 3.1, weights=7.0) == {}
    replies = workers.hand_over(2, 3.2)
    assert set(replies) == {0, 1, 2}
    assert all(not r.synchronous and not r.averaged and r.local_steps == 10 for r in replies.values())
    assert torch.equal(workers.theta, torch.full((LAYOUT.numel,), 7.0))
    assert workers.coordinator.beginning.averages.mean is None
    workers.push(1, 4.0, 1.0)
    assert not torch.equal(workers.theta, torch.full((LAYOUT.numel,), 7.0))
    assert workers.model.version == 7
    assert workers.coordinator.budget.done == 16


def test_lost_workers_do_not_keep_others_waiting() -> None:
    workers = Beginners()
    workers.gradient(0, 1.0, 1.0)
    workers.gradient(1, 1.0, 3.0)
    assert workers.leave(2, 1.5) == {}, "it may come back at once"
    assert workers.coordinator.deadline() == 1.5 + PATIENCE
    replies = workers.dispatch(7.0)
    assert set(replies) == {0, 1}
    assert float(workers.means[0][0][0]) == 2.0
    # A gradient that had arrived counts, though its worker has left.
    workers.gradient(0, 8.0, 1.0)
    assert workers.leave(0, 8.5) == {}
    assert workers.coordinator.deadline() is None, "worker 1 is still computing"
    workers.gradient(1, 20.0, 3.0)
    assert float(workers.means[1][1][0]) == 2.0
    # The worker that has missed steps comes back, and waits for the end of the beginning.
    assert workers.gradient(2, 20.5, 100.0) == {}
    assert workers.outcomes[-1].refused == STEP_MISSED.text
    while workers.replies[1].local_steps > 0:
        workers.gradient(1, 21.0, 1.0)
        assert not workers.replies[2].averaged
    assert workers.replies[1].send_weights
    replies = workers.hand_over(1, 22.0)
    assert set(replies) == {1, 2}
    assert not replies[2].synchronous
    assert replies[2].refused == STEP_MISSED.text


def test_worker_that_returns_in_time_takes_part_and_a_late_joiner_waits() -> None:
    workers = Beginners(steps=1)
    coordinator = workers.coordinator
    late = coordinator.membership.new_number(0.0)
    assert workers.join(late, 1.0) == {}
    workers.gradient(0, 1.1, 1.0)
    assert workers.leave(2, 1.2) == {}
    assert coordinator.revive(2, "s2", 1.3)
    assert workers.gradient(1, 1.4, 1.0) == {}, "the worker that is back is waited for"
    assert set(workers.gradient(2, 1.5, 4.0)) == {0, 1, 2}
    assert float(workers.means[2][0][0]) == 2.0
    for worker in (0, 1):
        workers.hand_over(worker, 2.0)
    replies = workers.hand_over(2, 2.0)
    assert set(replies) == {0, 1, 2, late}
    assert not any(reply.synchronous for reply in replies.values())


@pytest.mark.parametrize("lost", ["answer", "connection"])
def test_answer_that_was_lost_comes_again_with_the_same_mean(lost: str) -> None:
    workers = Beginners(steps=5)
    coordinator = workers.coordinator
    for worker in range(3):
        workers.sequences[worker] += 1
    pushes = [
        dataclasses.replace(_gradient(worker, 1, workers.replies[worker]), samples=worker + 1) for worker in range(3)
    ]

    def send(worker: int, now: float) -> dict[int, Reply]:
        assert coordinator.push(pushes[worker], torch.full((LAYOUT.numel,), float(worker)), now) is None
        return workers.dispatch(now)

    send(0, 1.0)
    if lost == "connection":  # while the worker waits
        assert coordinator.join(hello(0, layout=LAYOUT, reconnecting=True), 1.1) is None
        send(1, 1.2)
        assert send(2, 1.3) == {}, "the worker is expected to send its gradient again"
        replies = send(0, 1.4)
        assert set(replies) == {0, 1, 2}
        assert replies[0].refused == ALREADY_APPLIED
        assert replies[0].averaged
        assert coordinator.budget.done == 3
        return
    coordinator.broadcast = "a learning rate"
    send(1, 1.1)
    first = send(2, 1.2)[0]
    assert first.broadcast == "a learning rate"
    coordinator.broadcast = "another one"
    workers.gradient(1, 1.5, 9.0)
    assert coordinator.join(hello(0, layout=LAYOUT, reconnecting=True), 1.6) is None
    again = send(0, 1.7)
    assert set(again) == {0}
    ignored = {"refused": None, "wait_seconds": 0.0}
    assert dataclasses.replace(again[0], **ignored) == dataclasses.replace(first, **ignored)
    assert torch.equal(workers.means[0][0], workers.means[0][1])
    workers.gradient(0, 2.0, 9.0)
    assert set(workers.gradient(2, 2.1, 9.0)) == {0, 1, 2}
    assert coordinator.budget.done == 6


def _gradient(worker: int, sequence: int, reply: Reply) -> Push:
    return Push(
        worker, f"s{worker}", sequence, reply.incarnation, reply.version, reply.local_steps, 1, 0, 0.0, 0.0, False,
        False, contents="gradient",
    )  # fmt: skip


@pytest.mark.parametrize("noticed", [False, True])
def test_first_dispatch_that_was_lost_comes_again(noticed: bool) -> None:
    workers = Beginners()
    workers.gradient(1, 1.0)
    if noticed:
        assert workers.leave(0, 1.05) == {}
    assert workers.coordinator.join(hello(0, layout=LAYOUT), 1.1) is None
    again = workers.dispatch(1.1)
    assert set(again) == {0}
    assert again[0].synchronous
    assert not again[0].averaged
    workers.gradient(2, 1.2)
    assert set(workers.gradient(0, 1.3)) == {0, 1, 2}


def test_invalid_gradients_are_left_out_and_their_workers_stay_in_step() -> None:
    workers = Beginners(steps=50, total=600)
    workers.gradient(0, 1.0, float("nan"))
    workers.gradient(1, 1.0, 2.0)
    replies = workers.gradient(2, 1.0, 4.0)
    assert set(replies) == {0, 1, 2}
    assert float(workers.means[0][0][0]) == 3.0
    assert replies[0].averaged
    assert "NaN" in (replies[0].refused or "")
    # Without any gradient, no optimizer moves.
    for worker in range(3):
        workers.gradient(worker, 2.0, float("inf"))
    parameters = sum(entry.kind == "parameter" for entry in LAYOUT.entries)
    assert workers.replies[1].absent == f"0-{parameters - 1}"
    for number in range(3, 9):
        if 0 in workers.coordinator.live and 1 in workers.coordinator.live:
            workers.gradient(1, float(number), float("nan"))
        for worker in (0, 2):
            workers.gradient(worker, float(number), 1.0)
    assert "the same weights" in workers.coordinator.membership.quarantined[1]
    assert workers.replies[0].averaged


def test_optimizer_of_worker_0_is_not_reset_in_the_beginning(caplog: pytest.LogCaptureFixture) -> None:
    workers = Beginners(steps=50, total=600)
    for number in range(1, 6):
        for worker in range(3):
            workers.gradient(worker, float(number), float("nan") if worker == 0 else 1.0)
        assert workers.replies[0].averaged
        assert not workers.replies[0].reset_optimizer, "the states of all optimizers have to stay equal"
    [error] = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert "worker 0: 5 of its last 5 pushes were refused" in error
    assert "the same weights" in error
    assert "reset" not in error
    assert workers.coordinator.live == [0, 1, 2]


def test_parameters_without_a_gradient_stay_without_one_only_if_no_worker_has_one() -> None:
    workers = Beginners()
    for worker, absent in enumerate(["0-1", "1-3", "1"]):
        workers.gradient(worker, 1.0, absent=absent)
    assert workers.replies[0].absent == "1"
    workers.gradient(0, 2.0, absent="9")
    assert "9" in (workers.outcomes[-1].refused or "")


def test_worker_that_is_to_hand_over_weights_dies() -> None:
    workers = Beginners(steps=1)
    workers.step(1.0)
    assert workers.replies[0].send_weights
    workers.hand_over(1, 2.0)
    workers.hand_over(2, 2.1)
    assert workers.leave(0, 2.2) == {}
    replies = workers.dispatch(8.0)
    assert set(replies) == {1}
    assert replies[1].send_weights
    assert replies[1].local_steps == 0
    assert not replies[1].averaged
    replies = workers.hand_over(1, 9.0, weights=5.0)
    assert set(replies) == {1, 2}
    assert not replies[1].synchronous
    assert torch.equal(workers.theta, torch.full((LAYOUT.numel,), 5.0))


def test_invalid_weights_are_refused_and_another_worker_is_asked() -> None:
    workers = Beginners(steps=1)
    workers.step(1.0)
    for worker in (1, 2):
        workers.hand_over(worker, 2.0)
    replies = workers.hand_over(0, 2.1, weights=float("nan"))
    assert set(replies) == {1}
    replies = workers.hand_over(1, 2.2, weights=5.0)
    assert set(replies) == {0, 1, 2}
    assert torch.equal(workers.theta, torch.full((LAYOUT.numel,), 5.0))


def test_training_that_goes_on_without_finite_weights_says_so(caplog: pytest.LogCaptureFixture) -> None:
    workers = Beginners(steps=1)
    workers.step(1.0)
    for worker in (1, 2, 0):
        workers.hand_over(worker, 2.0, weights=float("nan"))
    workers.hand_over(1, 2.1, weights=float("nan"))
    assert workers.replies[0].synchronous
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    replies = workers.hand_over(2, 2.2, weights=float("nan"))
    assert not any(reply.synchronous for reply in replies.values())
    assert torch.equal(workers.theta, torch.zeros(LAYOUT.numel))
    [error] = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert "no worker has handed in finite weights at the end of the synchronous beginning" in error


def test_stop_within_the_beginning_ends_with_the_last_weights() -> None:
    workers = Beginners()
    workers.step(1.0)
    # Rank 0 stops training after its step. The others are computing the next one.
    assert workers.push(0, 2.0, 3.0, contents="weights", steps=0, samples=0, final=True, stop=True) == {}
    assert torch.equal(workers.theta, torch.full((LAYOUT.numel,), 3.0))
    assert set(workers.coordinator.recalled()) == {1, 2}
    workers.gradient(1, 2.1)
    replies = workers.gradient(2, 2.2)
    assert set(replies) == {1, 2}
    assert replies[1].send_weights
    workers.hand_over(1, 3.0, weights=4.0)
    replies = workers.hand_over(2, 3.1)
    assert set(replies) == {0, 1, 2}
    assert all(reply.stop for reply in replies.values())
    assert torch.equal(workers.theta, torch.full((LAYOUT.numel,), 4.0))


def test_beginning_that_is_longer_than_the_run_uses_the_budget_up() -> None:
    workers = Beginners(steps=100, total=11)
    for number in range(3):
        workers.step(number + 1.0)
    assert workers.replies[0].local_steps == 0, "two steps are left for three workers"
    for worker in (1, 2, 0):
        workers.hand_over(worker, 9.0)
    # The ordinary rounds take the rest.
    for _ in range(4):
        for worker in range(3):
            reply = workers.replies[worker]
            if not reply.stop and workers.coordinator.membership.live[worker].computing:
                workers.push(worker, 10.0)
    assert workers.coordinator.budget.done == 11
    assert all(reply.stop for reply in workers.replies.values())


def test_state_continues_within_a_step() -> None:
    workers = Beginners(steps=5)
    workers.step(1.0)
    workers.gradient(1, 2.0, 4.0)
    workers.coordinator.beginning.load_weights(0, torch.full((LAYOUT.numel,), 2.5))
    state = workers.coordinator.state_dict()
    assert state["beginning"]["on"]
    resumed = Workers(make_coordinator(3, layout=LAYOUT, total=60, beginning=5))
    resumed.coordinator.load_state_dict(state)
    resumed.join_all(3)
    assert torch.equal(resumed.theta, torch.full((LAYOUT.numel,), 2.5))
    assert all(reply.synchronous and reply.progress == 4.0 for reply in resumed.replies.values())
    for worker in range(3):
        resumed.push(worker, 1.0, 2.0, contents="gradient")
    mean = resumed.coordinator.beginning.averages.mean
    assert mean is not None
    assert float(mean[0]) == 2.5, "the gradient in the checkpoint counts, and once"
    assert resumed.coordinator.budget.done == 7
    # A checkpoint from after the beginning does not begin synchronously again.
    past = Workers(make_coordinator(3, layout=LAYOUT, total=60, beginning=5))
    past.coordinator.load_state_dict({**state, "beginning": {**state["beginning"], "on": False}})
    past.join_all(3)
    assert not any(reply.synchronous for reply in past.replies.values())


def test_rounds_are_refused_in_the_beginning_and_gradients_after_it() -> None:
    workers = Beginners(steps=1)
    workers.push(0, 1.0)
    assert "round" in (workers.outcomes[-1].refused or "")
    workers.gradient(1, 1.0, contents="nonsense")
    assert "nonsense" in (workers.outcomes[-1].refused or "")
    workers.gradient(2, 1.0)
    workers.step(2.0)
    for worker in (0, 1, 2):
        workers.hand_over(worker, 3.0)
    assert not workers.replies[0].synchronous
    workers.gradient(0, 4.0)
    assert workers.outcomes[-1].refused == STEP_MISSED.text


@pytest.mark.parametrize("room", [3, 5, 7, 100])
@pytest.mark.parametrize("speeds", [[1.0, 1.0, 1.0], [9.7, 3.1, 1.0], [1.0, 1.9, 200.0], [0.3, 0.3, 0.31]])
def test_shares_are_in_proportion_and_within_the_room(speeds: list[float], room: int) -> None:
    shares = SynchronousBeginning(10, 3).shares(dict(enumerate(speeds)), room)
    assert all(share >= 1 for share in shares.values())
    assert sum(shares.values()) <= max(room, 3)
    seconds = [shares[worker] / speed for worker, speed in enumerate(speeds)]
    assert max(seconds) <= 1.0 / min(speeds) + 1e-9, "no worker is later than the slowest with one step"


def test_automatic_length() -> None:
    assert automatic_length(0, 500, starts_fresh=True) == 50
    assert automatic_length(80, 500, starts_fresh=True) == 80
    assert automatic_length(80, 500, starts_fresh=False) == 0
    assert automatic_length(0, 10**6, starts_fresh=True) == 1000
    assert automatic_length(2000, None, starts_fresh=True) == 2000


def test_pause_holds_the_step_and_loses_nothing() -> None:
    workers = Beginners(minimum=WorkerMinimum(3))
    workers.gradient(0, 1.0, 1.0)
    workers.gradient(1, 1.0, 2.0)
    assert workers.leave(2, 1.5) == {}
    assert workers.coordinator.deadline() is None
    assert workers.dispatch(100.0) == {}, "two of three workers are too few"
    assert workers.coordinator.revive(2, "s2", 101.0)
    assert set(workers.gradient(2, 102.0, 6.0)) == {0, 1, 2}
    assert float(workers.means[0][0][0]) == 3.0


def test_worker_with_other_dtypes_cannot_begin_synchronously_but_may_join_later() -> None:
    half = hello(1, layout=LAYOUT, dtypes="bfloat16")
    beginning = make_coordinator(2, layout=LAYOUT, total=60, beginning=4).beginning
    reason = "worker 1 has tensors of bfloat16 and rank 0 of float32, but in the synchronous beginning"
    assert str(beginning.check_dtypes(half)).startswith(reason)
    assert beginning.check_dtypes(hello(1, layout=LAYOUT, dtypes="float32")) is None
    begun = Beginners(2)
    assert begun.coordinator.beginning.check_dtypes(half) is None, "it waits for the end of the beginning"
    assert make_coordinator(2, layout=LAYOUT, total=60).beginning.check_dtypes(half) is None
