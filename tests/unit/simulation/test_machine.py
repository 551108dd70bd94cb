"""Times of a virtual machine's rounds: drawn at the dispatch, shorter after a recall, longer after skipped steps."""

from __future__ import annotations

import pytest

from lightning_async_localsgd.simulation.devices import Cluster, Link, Slowdown, StepSeconds
from lightning_async_localsgd.simulation.machine import Machine, SimulatedRound


def round_of(steps: int = 4) -> SimulatedRound:
    """Make a round whose steps of 2 s begin at 10 s and whose upload takes 1 s."""
    return SimulatedRound(10.0, steps, 1.0, lambda now: 2.0)


def test_push_arrives_after_all_steps_and_the_upload() -> None:
    simulated = round_of()
    assert simulated.arrival_time == 19.0
    times = []
    for optimizer_steps in range(1, 5):
        assert not simulated.over
        simulated.record_step(optimizer_steps)
        times.append(simulated.now)
    assert times == [12.0, 14.0, 16.0, 18.0]
    assert simulated.over
    assert simulated.arrival_time == 19.0


@pytest.mark.parametrize(
    ("recalled_at", "steps"), [(0.0, 1), (10.0, 1), (11.9, 1), (12.0, 2), (15.0, 3), (16.0, 4), (18.5, 4)]
)
def test_recalled_worker_pushes_after_its_current_step(recalled_at: float, steps: int) -> None:
    simulated = round_of()
    assert simulated.recall(recalled_at) == (steps < 4)
    assert simulated.arrival_time == 11.0 + 2.0 * steps
    assert simulated.recall(recalled_at) is False


def test_step_that_the_optimizer_skips_is_taken_again() -> None:
    simulated = round_of(2)
    for optimizer_steps in (1, 1, 1, 2):
        assert not simulated.over
        simulated.record_step(optimizer_steps)
    assert simulated.over
    assert (simulated.now, simulated.arrival_time) == (18.0, 19.0)


def test_round_that_ends_early_arrives_after_its_last_computed_step() -> None:
    simulated = round_of()
    assert simulated.arrival_time_if_ended == 11.0
    simulated.record_step(1)
    simulated.record_step(2)
    assert (simulated.arrival_time_if_ended, simulated.arrival_time) == (15.0, 19.0)
    simulated.record_step(3)
    simulated.record_step(4)
    assert simulated.arrival_time_if_ended == simulated.arrival_time == 19.0


def test_drawn_times_are_the_same_on_all_platforms() -> None:
    # They are rounded to twelve digits, because the last bits of logarithm and exponential depend on the platform.
    cluster = Cluster([StepSeconds(1.0, 0.5)] * 3)
    machines = [Machine(number, cluster, 7, 0, {"fp32": 0}) for number in range(3)]
    assert [[machine.start_round(0.0, 1).arrival_time for _ in range(4)] for machine in machines] == [
        [1.38260549811, 0.571037568582, 1.05853072866, 1.09539491379],
        [0.661003017016, 0.822675820559, 1.15817397144, 1.05874874332],
        [1.15199555623, 0.644104623817, 0.599567685696, 0.916449333413],
    ]


def test_step_times_depend_only_on_seed_and_worker_number() -> None:
    def times(number: int, seed: int) -> list[float]:
        machine = Machine(number, Cluster([StepSeconds(1.0, 0.5)] * 3), seed, 0, {"fp32": 0})
        return [machine.start_round(0.0, 5).arrival_time for _ in range(3)]

    assert times(1, 7) == times(1, 7)
    assert times(1, 7) != times(2, 7)
    assert times(1, 7) != times(1, 8)


def test_slowdown_applies_to_steps_that_begin_in_its_period() -> None:
    cluster = Cluster([1.0], Link(0.25, 100.0), [Slowdown(0, 2.0, 3.0, 4.0)])
    machine = Machine(0, cluster, 0, 50, {"fp32": 50, "bf16": 25})
    # The model arrives after 0.75 s. Steps begin at 0.75, 1.75, 2.75 (four times as long) and 6.75 s.
    assert machine.start_round(0.0, 4).arrival_time == 0.75 + 1 + 1 + 4 + 1 + 0.75


def test_a_packed_model_and_push_take_the_time_of_their_bytes() -> None:
    machine = Machine(0, Cluster([1.0], Link(0.25, 100.0)), 0, 25, {"fp32": 100, "bf16": 50})
    assert machine.start_round(0.0, 4).arrival_time == 1.25 + 4 + 0.5
    assert machine.start_round(0.0, 4, encoding="bf16").arrival_time == 0.75 + 4 + 0.5
