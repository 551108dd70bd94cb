from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async_localsgd.outer import DelayedNesterov, HeLoCo, LookAhead
from lightning_async_localsgd.outer.base import CHUNK
from lightning_async_localsgd.outer.heloco import KEEP, correction

confidences = st.floats(0.0, 1.0)


def corrected_cosine(cosine: float, confidence: float) -> tuple[float, float]:
    """Cosine with the momentum, and length in |g|, of the corrected push, for unit vectors in the plane."""
    own, other = correction(cosine, confidence)
    along, across = own * cosine + other, own * math.sqrt(1.0 - cosine * cosine)
    length = math.hypot(along, across)
    return along / length, length


@given(st.floats(KEEP, 1.0), confidences)
def test_agreeing_pushes_are_kept(cosine: float, confidence: float) -> None:
    assert correction(cosine, confidence) == (1.0, 0.0)


@given(st.floats(-1.0, 0.0, exclude_max=True), confidences)
def test_of_opposing_pushes_a_part_is_taken_away(cosine: float, confidence: float) -> None:
    own, other = correction(cosine, confidence)
    beta = min(0.5 * -cosine * confidence, 0.5)
    assert (own, other) == (1.0, -beta * cosine)
    # Never more than half of what opposes the momentum, and what is across it stays.
    assert 0.0 <= other <= 0.5 * -cosine
    after, length = corrected_cosine(cosine, confidence)
    assert after <= 1e-12
    assert length <= 1.0 + 1e-12


@given(st.floats(0.0, KEEP, exclude_max=True), confidences)
def test_undecided_pushes_are_rotated(cosine: float, confidence: float) -> None:
    after, length = corrected_cosine(cosine, confidence)
    assert length == pytest.approx(1.0, rel=1e-12)
    assert after == pytest.approx(cosine + confidence * cosine * (1.0 - cosine / KEEP), abs=1e-12)
    assert cosine - 1e-12 <= after <= KEEP + 1e-12


@given(confidences)
@pytest.mark.parametrize("boundary", [0.0, KEEP])
def test_nothing_jumps_where_the_regimes_meet(boundary: float, confidence: float) -> None:
    below, above = (correction(boundary + side * 1e-9, confidence) for side in (-1.0, 1.0))
    assert below == pytest.approx(above, abs=1e-8)
    assert correction(boundary, confidence) == pytest.approx((1.0, 0.0), abs=1e-12)


def by_hand(gradient: torch.Tensor, momentum: torch.Tensor) -> torch.Tensor:
    """The regimes for one tensor in fp64, as the docstring has them."""
    g, m = gradient.double(), momentum.double()
    if not g.any() or not m.any():
        return g
    v = m / m.norm()
    c = float(torch.dot(g, v) / g.norm())
    conf = float(g.norm() / (g.norm() + 3 * m.norm()))
    if c >= 0.2:
        return g
    if c < 0:
        return g - min(0.5 * -c * conf, 0.5) * c * g.norm() * v
    across = g - torch.dot(g, v) * v
    wanted = c + conf * c * (1 - c / 0.2)
    return g.norm() * (wanted * v + math.sqrt(1 - wanted**2) * across / across.norm())


@pytest.mark.parametrize("kind", [LookAhead, DelayedNesterov])
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-1.0, 1.0)] * 3), min_size=2, max_size=8), st.integers(0, 2**16))
def test_filters_each_tensor_and_leaves_the_rest_to_its_rule(
    kind: type, cosines: list[tuple[float, float, float]], seed: int
) -> None:
    """Two tensors and a third that nobody trains, with pushes at chosen cosines to the momentum."""
    inner = {LookAhead: lambda: LookAhead(lr=0.3), DelayedNesterov: lambda: DelayedNesterov(period=2)}[kind]
    theta, other_theta = torch.zeros(12), torch.zeros(12)
    rule, plain = HeLoCo(inner()), inner()
    shapes = {"a": (0, 6, (2, 3)), "b": (6, 10, (4,)), "frozen": (10, 12, (2,))}
    for each, flat in ((rule, theta), (plain, other_theta)):
        each.setup(flat, {name: flat[i:j].view(shape) for name, (i, j, shape) in shapes.items()}, 2)
    generator = torch.Generator().manual_seed(seed)
    for lengths in cosines:
        momentum = plain.momentum_buffer
        assert momentum is not None
        gradient, expected = torch.zeros(12), torch.zeros(12, dtype=torch.float64)
        for (i, j, _), cosine in zip(list(shapes.values())[:2], lengths, strict=False):
            noise = torch.randn(j - i, generator=generator)
            m = momentum[i:j]
            if m.any():
                v = m / m.norm()
                noise -= torch.dot(noise, v) * v
                noise = cosine * v + math.sqrt(1 - cosine**2) * noise / noise.norm()
            gradient[i:j] = noise
            expected[i:j] = by_hand(noise, m)
        kept = gradient.clone()
        rule.step(gradient, {name: gradient[i:j].view(shape) for name, (i, j, shape) in shapes.items()})
        assert torch.equal(gradient, kept)
        plain.step(expected.float(), {})
        torch.testing.assert_close(theta, other_theta, rtol=1e-4, atol=1e-5)
        # From the same momentum on, so that roundings near a boundary don't add up.
        rule.load_state_dict({"name": kind.__name__, "rule": plain.state_dict()})
        theta.copy_(other_theta)


def test_agreement_changes_no_bit_and_takes_no_memory() -> None:
    theta, other = torch.zeros(3), torch.zeros(3)
    rule, plain = HeLoCo(LookAhead(lr=0.3)), LookAhead(lr=0.3)
    rule.setup(theta, {"w": theta}, 2)
    plain.setup(other, {"w": other}, 2)
    for _ in range(3):
        rule.step(torch.tensor([1.0, 2.0, 3.0]), {})
        plain.step(torch.tensor([1.0, 2.0, 3.0]), {})
    assert torch.equal(theta, other)
    assert rule._corrected is None


def test_huge_and_tiny_pushes() -> None:
    theta = torch.zeros(4)
    rule = HeLoCo(LookAhead(lr=1.0))
    rule.setup(theta, {"w": theta}, 2)
    for size in (1e-30, -1e-30, 1e25, -1e25):
        rule.step(torch.full((4,), size), {})
        assert torch.isfinite(theta).all()


def test_a_tensor_longer_than_a_chunk_is_seen_as_a_whole() -> None:
    theta = torch.zeros(CHUNK + 2)
    rule = HeLoCo(LookAhead(lr=1.0, momentum=0.5))
    rule.setup(theta, {"w": theta}, 2)
    rule.step(torch.ones(CHUNK + 2), {})
    assert rule.momentum_buffer is not None
    gradient = torch.ones(CHUNK + 2)
    gradient[-2:] = -10.0
    # Its end points against the momentum, but the tensor does not.
    before = theta.clone()
    rule.step(gradient, {})
    m = 0.5 * 0.5 + 0.5 * gradient
    assert torch.equal(theta, before - (gradient + 0.5 * m))
