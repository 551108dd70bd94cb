"""Values that describe a virtual cluster, and the errors for values that are not possible."""

from __future__ import annotations

import math
import random
import re
import statistics
from typing import Any

import pytest

from lightning_async_localsgd.simulation.devices import Arrival, Cluster, Death, Link, Slowdown, StepSeconds


def test_jitter_has_the_given_mean_and_standard_deviation() -> None:
    generator = random.Random(3)
    drawn = [StepSeconds(2.0, jitter=0.3).draw(generator) for _ in range(20_000)]
    assert statistics.fmean(drawn) == pytest.approx(2.0, rel=0.02)
    assert statistics.stdev(drawn) / statistics.fmean(drawn) == pytest.approx(0.3, rel=0.05)
    assert min(drawn) > 0


def test_without_jitter_no_random_number_is_drawn() -> None:
    generator = random.Random(3)
    before = generator.getstate()
    assert StepSeconds(2.0).draw(generator) == 2.0
    assert generator.getstate() == before


def test_link_seconds_are_latency_plus_size_over_bandwidth() -> None:
    assert Link().seconds(10**9) == 0.0
    assert Link(latency=0.5).seconds(10**9) == 0.5
    assert Link(0.5, 1e8).seconds(10**9) == 10.5


def test_numbers_can_be_given_instead_of_objects() -> None:
    cluster = Cluster(
        [1, StepSeconds(2.0, 0.1)], exchange_seconds=[0.5, Link(1.0, 1e6)], schedule=[Arrival(9.0, 3.0, 0)]
    )
    assert [device.seconds for device in cluster.devices] == [1.0, 2.0, 3.0]
    assert [link.latency for link in cluster.links] == [0.5, 1.0, 0.0]
    assert cluster.initial_workers == 2


def test_slowdown_factor_applies_only_within_its_period() -> None:
    cluster = Cluster([1.0, 1.0], schedule=[Slowdown(1, 20.0, math.inf, 0.5), Slowdown(1, 5.0, 20.0, 3.0)])
    assert [cluster.slowdown_factor(1, now) for now in (4.9, 5.0, 19.9, 20.0, 1e9)] == [1.0, 3.0, 3.0, 0.5, 0.5]
    assert cluster.slowdown_factor(0, 10.0) == 1.0


def test_single_link_applies_to_all_workers_including_arrivals() -> None:
    assert Cluster([1.0, 1.0, 1.0], Link(0.1, 1e3)).links == [Link(0.1, 1e3)] * 3
    arrivals = [Arrival(5.0, 1.0), Arrival(6.0, 1.0, 0.5), Arrival(7.0, 1.0, 0)]
    assert [link.latency for link in Cluster([1.0], 2.0, arrivals).links] == [2.0, 2.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([],), ["seconds_per_step", "empty"]),
        ((2.0,), ["seconds_per_step=2.0", "list"]),
        (("12",), ["seconds_per_step='12'"]),
        (([1.0, 0.0],), ["seconds_per_step[1]=0.0", "> 0"]),
        (([1.0, -1.0],), ["seconds_per_step[1]=-1.0"]),
        (([math.inf],), ["seconds_per_step[0]=inf", "finite"]),
        (([math.nan],), ["seconds_per_step[0]=nan"]),
        (([True],), ["seconds_per_step[0]=True"]),
        (([1.0, 1.0], [0.1]), ["exchange_seconds has 1", "seconds_per_step has 2"]),
        (([1.0], -0.1), ["exchange_seconds=-0.1"]),
        (([1.0], "fast"), ["exchange_seconds='fast'"]),
        (([1.0], [math.nan]), ["exchange_seconds[0]=nan"]),
        (
            ([1.0], 0.0, [Slowdown(1, 0.0, 1.0, 2.0)]),
            ["worker 1 does not exist", "define 1 worker(s), numbered from 0"],
        ),
        (
            ([1.0], 0.0, [Death(3, 1.0), Arrival(0.5, 1.0)]),
            ["worker 3 does not exist", "define 2 worker(s), numbered from 0"],
        ),
        (([1.0], 0.0, [Slowdown(0, 0.0, 5.0, 2.0), Slowdown(0, 4.0, 9.0, 3.0)]), ["overlap", "start=4.0"]),
        (([1.0], 0.0, [Death(0, 1.0), Death(0, 2.0)]), ["at=2.0", "worker 0 is already dead then"]),
        (([1.0], 0.0, [Death(0, 1.0, 3.0), Death(0, 2.0)]), ["at=2.0", "worker 0 is already dead then"]),
        (([1.0], 0.0, [Death(1, 1.0), Arrival(2.0, 1.0)]), ["worker 1 arrives later"]),
        (([1.0], [0.5], [Arrival(2.0, 1.0)]), ["schedule contains Arrival(at=2.0", "Arrival(exchange_seconds=...)"]),
        (
            ([1.0], 0.0, [Slowdown(1, 0.0, 2.0, 3.0), Arrival(2.0, 1.0)]),
            ["schedule contains Slowdown", "arrives only at 2"],
        ),
        (
            ([1.0], 0.0, [Slowdown(0, 5.0, 6.0, 3.0), Death(0, 5.0)]),
            ["schedule contains Slowdown", "dies for good at 5"],
        ),
        (([1.0], 0.0, ["Death"]), ["'Death'", "Slowdown, Death or Arrival"]),
    ],
)
def test_impossible_cluster_is_refused_with_option_and_value(arguments: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        Cluster(*arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: StepSeconds(0.0), "StepSeconds.seconds=0.0"),
        (lambda: StepSeconds(1.0, jitter=-0.1), "StepSeconds.jitter=-0.1"),
        (lambda: StepSeconds(1.0, jitter=math.inf), "StepSeconds.jitter=inf"),
        (lambda: Link(latency=-1.0), "Link.latency=-1.0"),
        (lambda: Link(bytes_per_second=0.0), "Link.bytes_per_second=0.0"),
        (lambda: Link(bytes_per_second=math.nan), "Link.bytes_per_second=nan"),
        (lambda: Slowdown(0, 5.0, 5.0, 2.0), "Slowdown.end=5.0"),
        (lambda: Slowdown(0, 5.0, 6.0, 0.0), "Slowdown.factor=0.0"),
        (lambda: Slowdown(-1, 5.0, 6.0, 2.0), "Slowdown.worker=-1"),
        (lambda: Death(0, -1.0), "Death.at=-1.0"),
        (lambda: Death(0, 5.0, back_at=5.0), "Death.back_at=5.0"),
        (lambda: Arrival(1.0, 0.0), "Arrival.seconds_per_step=0.0"),
        (lambda: Arrival(math.inf, 1.0), "Arrival.at=inf"),
    ],
)
def test_invalid_value_is_refused_with_its_name(make: Any, word: str) -> None:
    with pytest.raises(ValueError, match=r".+ must be .+") as caught:
        make()
    assert word in str(caught.value)
