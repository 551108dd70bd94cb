from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async_localsgd.outer.base import CHUNK
from lightning_async_localsgd.staleness import (
    Composed,
    Constant,
    DelayCompensation,
    ExponentialCosine,
    Hinge,
    Polynomial,
    PolynomialThreshold,
    Staleness,
)

staleness_values = st.integers(0, 10_000)
cosines = st.none() | st.floats(-1.0, 1.0)
powers = st.floats(0.01, 5.0)

stages: st.SearchStrategy[Staleness] = st.recursive(
    st.one_of(
        st.just(Constant()),
        st.builds(Polynomial, powers),
        st.builds(PolynomialThreshold, powers, st.integers(0, 20)),
        st.builds(Hinge, st.floats(0.01, 20.0), st.integers(0, 20)),
        st.builds(ExponentialCosine, st.floats(0.0, 5.0), st.floats(-1.0, 1.0, exclude_max=True)),
        st.builds(DelayCompensation, st.floats(0.01, 2.0)),
    ),
    lambda inner: st.builds(Composed, st.lists(inner, min_size=1, max_size=3)),
    max_leaves=4,
)


@given(stages, staleness_values, cosines)
def test_factors_are_between_zero_and_one(stage: Staleness, staleness: int, cosine: float | None) -> None:
    assert 0.0 <= stage.weigh(staleness, cosine) <= 1.0


@given(stages, staleness_values, staleness_values, cosines)
def test_factor_never_grows_with_the_staleness(
    stage: Staleness, staleness: int, more: int, cosine: float | None
) -> None:
    assert stage.weigh(staleness + more, cosine) <= stage.weigh(staleness, cosine)


@given(stages)
def test_push_on_the_current_model_without_a_momentum_has_factor_one(stage: Staleness) -> None:
    assert stage.weigh(0, None) == 1.0


@given(powers, staleness_values, cosines)
def test_polynomial(power: float, staleness: int, cosine: float | None) -> None:
    assert Polynomial(power).weigh(staleness, cosine) == pytest.approx(math.exp(-power * math.log1p(staleness)))


@given(powers, st.integers(0, 20), staleness_values)
def test_polynomial_threshold(power: float, threshold: int, staleness: int) -> None:
    expected = Polynomial(power).weigh(staleness, None) if staleness <= threshold else 0.0
    assert PolynomialThreshold(power, threshold).weigh(staleness, None) == expected


def test_poly_and_polythres_of_the_paper() -> None:
    assert Polynomial().weigh(3, None) == 0.5
    assert PolynomialThreshold().weigh(10, None) == pytest.approx(11**-0.5)
    assert PolynomialThreshold().weigh(11, None) == 0.0


@given(st.floats(0.01, 20.0), st.integers(0, 20), staleness_values)
def test_hinge(slope: float, start: int, staleness: int) -> None:
    expected = 1.0 if staleness <= start else 1.0 / (slope * (staleness - start) + 1.0)
    assert Hinge(slope, start).weigh(staleness, None) == pytest.approx(expected)


@given(st.floats(0.0, 5.0), st.floats(-1.0, 1.0, exclude_max=True), staleness_values, cosines)
def test_exponential_cosine(rate: float, cutoff: float, staleness: int, cosine: float | None) -> None:
    dropped = cosine is not None and cosine < cutoff
    expected = 0.0 if dropped else math.exp(-rate * staleness)
    assert ExponentialCosine(rate, cutoff).weigh(staleness, cosine) == expected


def test_push_at_the_cutoff_is_not_dropped() -> None:
    assert ExponentialCosine(0.0, 0.25).weigh(5, 0.25) == 1.0
    assert ExponentialCosine(0.0, -1.0).weigh(5, -1.0) == 1.0


@settings(max_examples=40)
@given(st.floats(0.01, 2.0), st.integers(1, 50), st.integers(0, 2**16))
def test_delay_compensation(strength: float, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradient, theta, base = torch.randn(3, size, generator=generator)
    kept = theta.clone(), base.clone()
    g = gradient.double()
    expected = g + strength * g * g * (theta.double() - base.double())
    DelayCompensation(strength).correct(gradient, theta, base)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(theta, kept[0])
    assert torch.equal(base, kept[1])


def test_delay_compensation_of_an_unchanged_model_does_not_change_bits() -> None:
    gradient = torch.tensor([1e30, -3.0, -0.0, 1e-40])
    kept = gradient.clone()
    theta = torch.ones(4)
    DelayCompensation(2.0).correct(gradient, theta, theta.clone())
    assert torch.equal(gradient, kept)


def test_delay_compensation_covers_all_chunks() -> None:
    gradient = torch.ones(CHUNK + 3)
    DelayCompensation(0.5).correct(gradient, torch.ones(CHUNK + 3), torch.zeros(CHUNK + 3))
    assert torch.equal(gradient, torch.full((CHUNK + 3,), 1.5))


@given(st.lists(stages, min_size=1, max_size=4), staleness_values, cosines)
def test_composition_multiplies_factors_and_combines_needs(
    several: list[Staleness], staleness: int, cosine: float | None
) -> None:
    composed = Composed(several)
    factors = [stage.weigh(staleness, cosine) for stage in several]
    assert composed.weigh(staleness, cosine) == pytest.approx(math.prod(factors))
    assert composed.needs_base is any(stage.needs_base for stage in several)
    assert composed.needs_momentum is any(stage.needs_momentum for stage in several)
    if 0.0 in factors:
        assert composed.weigh(staleness, cosine) == 0.0


def test_corrections_are_applied_in_order() -> None:
    first, second = DelayCompensation(0.5), DelayCompensation(0.25)
    theta, base = torch.tensor([3.0]), torch.tensor([1.0])
    expected = torch.tensor([2.0])
    first.correct(expected, theta, base)
    second.correct(expected, theta, base)
    gradient = torch.tensor([2.0])
    Composed([Polynomial(), first, Composed([second])]).correct(gradient, theta, base)
    assert torch.equal(gradient, expected)
    assert float(gradient) == 24.0


def test_needs_of_each_stage() -> None:
    others = [Constant(), Polynomial(), PolynomialThreshold(), Hinge(1.0, 2), ExponentialCosine(1.0, 0.0)]
    assert [stage.needs_base for stage in others] == [False] * 5
    assert DelayCompensation(0.1).needs_base
    assert [stage.needs_momentum for stage in others] == [False] * 4 + [True]


@given(stages)
def test_stages_can_be_evaluated_and_copied(stage: Staleness) -> None:
    assert repr(eval(repr(stage))) == repr(stage)
    assert repr(copy.deepcopy(stage)) == repr(stage)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Polynomial(0.0), ValueError, "Polynomial: power must be a number > 0, got 0.0; 0.5 is usual"),
        (lambda: Polynomial(-0.5), ValueError, "power"),
        (lambda: Polynomial("0.5"), ValueError, "power .* got '0.5'"),
        (lambda: PolynomialThreshold(power=0), ValueError, "PolynomialThreshold: power must be"),
        (lambda: PolynomialThreshold(threshold=-1), ValueError, "PolynomialThreshold: threshold must be an integer >="),
        (lambda: PolynomialThreshold(threshold=1.5), ValueError, "threshold .* got 1.5"),
        (lambda: Hinge(slope=0, start=4), ValueError, "Hinge: slope must be a number > 0, got 0; "),
        (lambda: Hinge(slope=1.0, start=-4), ValueError, "Hinge: start must be an integer >= 0, got -4; "),
        (lambda: ExponentialCosine(-1.0, 0.0), ValueError, "ExponentialCosine: rate must be a number >= 0, got -1.0"),
        (lambda: ExponentialCosine(1.0, 1.0), ValueError, r"ExponentialCosine: cutoff must be in \[-1, 1\), got 1.0"),
        (lambda: ExponentialCosine(1.0, None), ValueError, "cutoff .* got None"),
        (lambda: DelayCompensation(0.0), ValueError, "DelayCompensation: strength must be a number > 0, got 0.0; "),
        (lambda: DelayCompensation(float("nan")), ValueError, "strength .* got nan"),
        (lambda: Composed([]), ValueError, r"Composed: stages must not be empty, got \[\]; "),
        (lambda: Composed([Polynomial]), TypeError, "Composed: stages must be a list of staleness stages"),
        (lambda: Composed(Polynomial()), TypeError, r"Composed: stages .* got Polynomial\(power=0.5\); "),
    ],
)
def test_invalid_arguments_are_rejected(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
