"""The times of a virtual machine's round: planned when it is dispatched, cut short or stretched while it lasts."""

from __future__ import annotations

import pytest

from lightning_async_localsgd.simulation.devices import Cluster, Link, Slowdown, StepSeconds
from lightning_async_localsgd.simulation.machine import Machine, PlannedRound


def planned(steps: int = 4) -> PlannedRound:
    """Steps of 2 s that begin at 10 s; the upload takes 1 s."""
    return PlannedRound(10.0, steps, 1.0, lambda now: 2.0)


def test_a_round_takes_its_steps_and_the_upload() -> None:
    turn = planned()
    assert turn.arrives == 19.0
    times = []
    for done in range(1, 5):
        assert not turn.over
        turn.take(done)
        times.append(turn.now)
    assert times == [12.0, 14.0, 16.0, 18.0]
    assert turn.over
    assert turn.arrives == 19.0


@pytest.mark.parametrize(
    ("called_at", "steps"), [(0.0, 1), (10.0, 1), (11.9, 1), (12.0, 2), (15.0, 3), (16.0, 4), (18.5, 4)]
)
def test_who_is_called_in_hands_in_after_the_step_that_it_is_at(called_at: float, steps: int) -> None:
    turn = planned()
    assert turn.cut(called_at) == (steps < 4)
    assert turn.arrives == 11.0 + 2.0 * steps
    assert turn.cut(called_at) is False


def test_a_step_that_the_optimizer_skips_is_taken_once_more() -> None:
    turn = planned(2)
    for done in (1, 1, 1, 2):
        assert not turn.over
        turn.take(done)
    assert turn.over
    assert (turn.now, turn.arrives) == (18.0, 19.0)


def test_a_round_that_ends_early_arrives_after_the_step_that_was_played_last() -> None:
    turn = planned()
    assert turn.arrives_so_far == 11.0
    turn.take(1)
    turn.take(2)
    assert (turn.arrives_so_far, turn.arrives) == (15.0, 19.0)
    turn.take(3)
    turn.take(4)
    assert turn.arrives_so_far == turn.arrives == 19.0


def test_drawn_times_are_the_same_on_every_machine() -> None:
    # They are rounded to twelve digits, since the last bits of logarithm and exponential are the platform's affair.
    cluster = Cluster([StepSeconds(1.0, 0.5)] * 3)
    machines = [Machine(number, cluster, 7, 0) for number in range(3)]
    assert [[machine.plan(0.0, 1).arrives for _ in range(4)] for machine in machines] == [
        [1.38260549811, 0.571037568582, 1.05853072866, 1.09539491379],
        [0.661003017016, 0.822675820559, 1.15817397144, 1.05874874332],
        [1.15199555623, 0.644104623817, 0.599567685696, 0.916449333413],
    ]


def test_a_machines_steps_depend_on_the_seed_and_its_number_only() -> None:
    def times(number: int, seed: int) -> list[float]:
        machine = Machine(number, Cluster([StepSeconds(1.0, 0.5)] * 3), seed, 0)
        return [machine.plan(0.0, 5).arrives for _ in range(3)]

    assert times(1, 7) == times(1, 7)
    assert times(1, 7) != times(2, 7)
    assert times(1, 7) != times(1, 8)


def test_a_slowdown_is_of_the_steps_that_begin_in_it() -> None:
    cluster = Cluster([1.0], Link(0.25, 100.0), [Slowdown(0, 2.0, 3.0, 4.0)])
    machine = Machine(0, cluster, 0, 50)
    # The model arrives after 0.75 s; steps begin at 0.75, 1.75, 2.75 (four times as long) and 6.75.
    assert machine.plan(0.0, 4).arrives == 0.75 + 1 + 1 + 4 + 1 + 0.75
