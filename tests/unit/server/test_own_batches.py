"""Workers with batch sizes of their own on the server: samples are counted, and pushes are weighed by them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async_localsgd.outer import Nesterov, TorchOptimizer
from lightning_async_localsgd.protocol.buffers import BufferPool
from lightning_async_localsgd.protocol.exchange import ExchangeError
from lightning_async_localsgd.protocol.messages import DOES_NOT_FIT
from lightning_async_localsgd.server.coordinator import Coordinator
from lightning_async_localsgd.server.merge_policy import MergeOptions, MergePolicy
from lightning_async_localsgd.server.server import Server
from tests.harness import Workers, hello, make_coordinator
from tests.unit.server.serving import RecordingChannel

REFERENCE = 32


class SizedWorkers(Workers):
    """Workers whose steps have samples of their own number."""

    def __init__(self, coordinator: Coordinator, sizes: list[int]) -> None:
        super().__init__(coordinator)
        self.sizes = sizes

    def join(self, worker: int, now: float, dispatch: bool = True) -> dict[int, Any]:
        self.sequences[worker] = 0
        self.sessions[worker] = f"s{worker}.{now}"
        message = hello(worker, self.sessions[worker], self.layout, step_samples=self.sizes[worker])
        assert self.coordinator.join(message, now) is None
        return self.dispatch(now) if dispatch else {}

    def work(self, worker: int, now: float, seconds: float = 1.0, gradient: float = 1.0) -> int:
        """Push a whole round, and return its samples."""
        steps = self.replies[worker].local_steps
        samples = steps * self.sizes[worker]
        self.push(worker, now, gradient, samples=samples, timed_steps=steps, compute_seconds=steps * seconds)
        return samples


def make(sizes: list[int], **options: Any) -> SizedWorkers:
    options = {"grace": 0.0, "reference": REFERENCE, "workers": len(sizes), **options}
    return SizedWorkers(make_coordinator(**options), sizes)


def test_worker_without_the_option_cannot_join_a_run_with_it_nor_the_other_way_round() -> None:
    own, plain = make_coordinator(1, reference=REFERENCE), make_coordinator(1)
    reason = own.join(hello(0), 0.0)
    assert reason is not None
    assert "the run has the option batch_size and worker 0 has not; use the same option on every host" in reason
    reason = plain.join(hello(0, step_samples=16), 0.0)
    assert reason is not None
    assert "the run has not the option batch_size and worker 0 has" in reason
    assert own.join(hello(0, step_samples=16), 0.0) is None


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("quorum", [1, "all"])
@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 70), min_size=2, max_size=4),
    order=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["work", "leave", "join"])), max_size=40),
    total=st.integers(1, 4000),
)
def test_run_has_its_samples_whoever_dies_or_comes_back(
    quorum: Any, overlap: bool, sizes: list[int], order: list[tuple[int, str]], total: int
) -> None:
    policy = MergePolicy(quorum=quorum)
    outer = Nesterov(lr=0.1, momentum=0.0) if quorum == "all" else TorchOptimizer(torch.optim.SGD, lr=0.1)
    workers = make(sizes, total=total, policy=policy, outer_optimizer=outer, overlap=overlap)
    now = 0.0
    workers.join_all(len(sizes), now)
    coordinator, everyone = workers.coordinator, range(len(sizes))
    turns = [(worker % len(sizes), act) for worker, act in order]
    turns += [(worker, "join") for worker in everyone] + [(worker, "work") for worker in everyone] * (3 * total)
    for worker, act in turns:
        now += 1.0
        if coordinator.finished:
            break
        session = coordinator.membership.live.get(worker)
        if act == "leave" and session is not None and len(coordinator.live) > 1:
            workers.leave(worker, now)
        elif act == "join" and session is None:
            workers.join(worker, now)
        elif act == "work" and session is not None and session.computing:
            workers.work(worker, now, seconds=0.5 + worker)
    assert coordinator.finished
    assert coordinator.budget.done == sum(one.samples for one in coordinator.totals.values())
    assert total <= coordinator.budget.done < total + max(sizes)


def test_rounds_take_equally_long_and_progress_is_in_samples() -> None:
    workers = make([64, 16], total=100_000, local_steps=10)
    workers.join_all(2)
    assert workers.work(0, 1.0, seconds=0.1) == 640
    assert workers.work(1, 1.0, seconds=0.05) == 160
    workers.work(0, 2.0, seconds=0.1)
    workers.work(1, 2.0, seconds=0.05)
    # Worker 0 has 640 samples a second, worker 1 has 320. Both have rounds of a second.
    assert [workers.replies[worker].local_steps for worker in range(2)] == [10, 20]
    assert workers.coordinator.snapshot().progress == 1760
    assert workers.replies[0].progress_per_step == pytest.approx(96.0), "in 0.1 s"
    assert workers.replies[1].progress_per_step == pytest.approx(48.0), "in 0.05 s"


def test_workers_of_unknown_speed_are_expected_to_take_one_step_each() -> None:
    workers = make([64, 16], total=None)
    workers.join_all(2)
    assert [workers.replies[worker].progress_per_step for worker in range(2)] == [80.0, 80.0]


def test_last_rounds_in_lock_step_have_equally_many_steps() -> None:
    options: dict[str, Any] = {
        "policy": MergePolicy(quorum="all"),
        "outer_optimizer": Nesterov(lr=0.1, momentum=0.0),
        "dynamic": False,
    }
    workers = make([48, 16], total=12 * 64, local_steps=10, **options)
    workers.join_all(2)
    for _ in range(2):
        assert len({reply.local_steps for reply in workers.replies.values()}) == 1
        for worker in range(2):
            workers.work(worker, 1.0)
    assert workers.coordinator.finished
    assert workers.coordinator.budget.done == 12 * 64


@pytest.mark.parametrize("weights", ["equal", "samples"])
def test_pushes_are_weighed_by_what_they_were_trained_on(weights: Any) -> None:
    policy = MergePolicy(quorum="all", options=MergeOptions(weights=weights))
    workers = make([48, 16], total=None, policy=policy, outer_optimizer=TorchOptimizer(torch.optim.SGD, lr=1.0))
    workers.join_all(2)
    workers.work(0, 1.0, gradient=1.0)
    workers.work(1, 1.0, gradient=3.0)
    # Both have taken ten steps, of 48 and of 16 samples.
    assert workers.theta[0].item() == pytest.approx(-(3 * 1.0 + 1 * 3.0) / 4)


def test_a_push_with_fewer_steps_does_not_weigh_less() -> None:
    policy = MergePolicy(quorum="all")
    workers = make([48, 16], total=None, policy=policy, outer_optimizer=TorchOptimizer(torch.optim.SGD, lr=1.0))
    workers.join_all(2)
    workers.push(0, 1.0, 1.0, steps=2, samples=96)
    workers.push(1, 1.0, 3.0, steps=10, samples=160)
    assert workers.theta[0].item() == pytest.approx(-(3 * 1.0 + 1 * 3.0) / 4), "it is shorter already"


def test_weights_without_groups_are_relative_to_the_live_workers() -> None:
    workers = make([48, 16], total=None, outer_optimizer=TorchOptimizer(torch.optim.SGD, lr=1.0))
    workers.join_all(2)
    workers.work(0, 1.0, gradient=1.0)
    assert workers.theta[0].item() == pytest.approx(-1.0), "no other size is known"
    workers.work(1, 1.0, gradient=1.0)
    assert workers.theta[0].item() == pytest.approx(-1.5)
    workers.work(0, 2.0, gradient=1.0)
    assert workers.theta[0].item() == pytest.approx(-3.0)


def test_equal_sizes_give_what_counted_steps_give() -> None:
    models = []
    for reference in (0, REFERENCE):
        sizes = [reference, reference, reference]
        workers = make(sizes, total=90 * (reference or 1), reference=reference)
        workers.join_all(3)
        for turn in range(30):
            for worker in range(3):
                if workers.coordinator.membership.live[worker].computing:
                    workers.work(worker, float(turn), seconds=1.0 + worker, gradient=0.1 * worker + 0.01 * turn)
        assert workers.coordinator.finished
        models.append((workers.theta.clone(), [outcome.steps for outcome in workers.outcomes]))
    assert torch.equal(models[0][0], models[1][0])
    assert models[0][1] == models[1][1]


def test_beginning_counts_samples() -> None:
    workers = make([64, 16], total=10_000, beginning=10)
    workers.join_all(2)
    coordinator, steps = workers.coordinator, 0
    while coordinator.beginning.on and all(reply.local_steps for reply in workers.replies.values()):
        for worker in range(2):
            count = workers.replies[worker].local_steps
            workers.push(
                worker,
                float(steps),
                contents="gradient",
                samples=count * workers.sizes[worker],
                timed_steps=count,
                compute_seconds=count * (1.0 if worker == 0 else 0.25),
            )
        steps += 1
    # Worker 1 contributes four steps to one of worker 0, as soon as speeds are known.
    assert workers.coordinator.totals[1].steps > 2 * workers.coordinator.totals[0].steps
    done = coordinator.budget.done
    assert 10 * 2 * REFERENCE - 128 <= done <= 10 * 2 * REFERENCE + 128
    assert done == sum(one.samples for one in coordinator.totals.values())


def test_state_says_in_what_it_counts() -> None:
    workers = make([64, 16], total=10_000)
    workers.join_all(2)
    workers.work(0, 1.0)
    state = json.loads(json.dumps(workers.coordinator.state_dict()["budget"]))
    assert state == {"done": 640, "unit": REFERENCE}


def test_worker_whose_step_changes_is_counted_with_the_new_one() -> None:
    workers = make([64, 16], total=None)
    workers.join_all(2)
    workers.leave(1, 1.0)
    workers.sizes[1] = 8
    workers.join(1, 2.0)
    assert workers.coordinator.membership.sizes.of(1) == 8


def test_worker_whose_first_batches_do_not_fit_ends_the_run() -> None:
    workers = make([64, 16], total=None)
    server = Server(workers.coordinator, BufferPool(workers.layout.numel), threaded=False)
    channels = [RecordingChannel(), RecordingChannel()]
    for worker, channel in enumerate(channels):
        server.join(hello(worker, layout=workers.layout, step_samples=workers.sizes[worker]), channel)
    assert [len(channel.replies) for channel in channels] == [1, 1]
    text = f"a batch of 16 samples of worker 1 {DOES_NOT_FIT} of cuda:0 on host b"
    server.lost(1, "s1", f"it ended with {text}")
    with pytest.raises(ExchangeError, match=text):
        server.raise_failure()
    late = RecordingChannel()
    server.join(hello(1, "again", workers.layout, step_samples=16), late)
    assert late.refusals == [text]


def test_later_and_for_others_it_is_a_lost_worker() -> None:
    workers = make([64, 16], total=None)
    workers.join_all(2)
    membership = workers.coordinator.membership
    assert membership.is_unfit(1, f"it {DOES_NOT_FIT}")
    assert not membership.is_unfit(1, "it ended with an error")
    assert not membership.is_unfit(2, f"it {DOES_NOT_FIT}"), "a late joiner"
    workers.work(1, 1.0)
    assert not membership.is_unfit(1, f"it {DOES_NOT_FIT}")
    plain = make_coordinator(1)
    plain.join(hello(0), 0.0)
    assert not plain.membership.is_unfit(0, f"it {DOES_NOT_FIT}"), "without the option, the text is the user's own"
