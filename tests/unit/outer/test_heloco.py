from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async_localsgd.outer import DelayedNesterov, HeLoCo, LookAhead
from lightning_async_localsgd.outer.base import CHUNK
from lightning_async_localsgd.outer.heloco import KEEP_COSINE, correction_weights

confidences = st.floats(0.0, 1.0)


def corrected_cosine(cosine: float, confidence: float) -> tuple[float, float]:
    """Return the corrected push's cosine with the momentum and its length, for unit vectors in a plane."""
    push_weight, direction_weight = correction_weights(cosine, confidence)
    along, across = push_weight * cosine + direction_weight, push_weight * math.sqrt(1.0 - cosine * cosine)
    length = math.hypot(along, across)
    return along / length, length


@given(st.floats(KEEP_COSINE, 1.0), confidences)
def test_agreeing_push_is_unchanged(cosine: float, confidence: float) -> None:
    assert correction_weights(cosine, confidence) == (1.0, 0.0)


@given(st.floats(-1.0, 0.0, exclude_max=True), confidences)
def test_opposing_part_of_a_push_is_reduced(cosine: float, confidence: float) -> None:
    push_weight, direction_weight = correction_weights(cosine, confidence)
    beta = min(0.5 * -cosine * confidence, 0.5)
    assert (push_weight, direction_weight) == (1.0, -beta * cosine)
    # At most half of the opposing component is removed, and the orthogonal component stays.
    assert 0.0 <= direction_weight <= 0.5 * -cosine
    after, length = corrected_cosine(cosine, confidence)
    assert after <= 1e-12
    assert length <= 1.0 + 1e-12


@given(st.floats(0.0, KEEP_COSINE, exclude_max=True), confidences)
def test_nearly_orthogonal_push_is_rotated_towards_the_momentum(cosine: float, confidence: float) -> None:
    after, length = corrected_cosine(cosine, confidence)
    assert length == pytest.approx(1.0, rel=1e-12)
    assert after == pytest.approx(cosine + confidence * cosine * (1.0 - cosine / KEEP_COSINE), abs=1e-12)
    assert cosine - 1e-12 <= after <= KEEP_COSINE + 1e-12


@given(confidences)
@pytest.mark.parametrize("boundary", [0.0, KEEP_COSINE])
def test_correction_is_continuous(boundary: float, confidence: float) -> None:
    below, above = (correction_weights(boundary + side * 1e-9, confidence) for side in (-1.0, 1.0))
    assert below == pytest.approx(above, abs=1e-8)
    assert correction_weights(boundary, confidence) == pytest.approx((1.0, 0.0), abs=1e-12)


def corrected(gradient: torch.Tensor, momentum: torch.Tensor) -> torch.Tensor:
    """Correct one tensor in fp64, by the equations in the docstring of HeLoCo."""
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
@settings(max_examples=40)
@given(st.lists(st.tuples(*[st.floats(-1.0, 1.0)] * 3), min_size=2, max_size=8), st.integers(0, 2**16))
def test_each_tensor_is_corrected_and_then_applied_by_the_wrapped_optimizer(
    kind: type, cosines: list[tuple[float, float, float]], seed: int
) -> None:
    """Two trained tensors and a frozen one, with pushes that have given cosines with the momentum."""
    inner = {LookAhead: lambda: LookAhead(lr=0.3), DelayedNesterov: lambda: DelayedNesterov(period=2)}[kind]
    theta, plain_theta = torch.zeros(12), torch.zeros(12)
    outer_optimizer, plain = HeLoCo(inner()), inner()
    shapes = {"a": (0, 6, (2, 3)), "b": (6, 10, (4,)), "frozen": (10, 12, (2,))}
    for each, flat in ((outer_optimizer, theta), (plain, plain_theta)):
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
            expected[i:j] = corrected(noise, m)
        kept = gradient.clone()
        outer_optimizer.step(gradient, {name: gradient[i:j].view(shape) for name, (i, j, shape) in shapes.items()})
        assert torch.equal(gradient, kept)
        plain.step(expected.float(), {})
        torch.testing.assert_close(theta, plain_theta, rtol=1e-4, atol=1e-5)
        # Both continue from the same momentum, so that rounding errors near a boundary do not accumulate.
        outer_optimizer.load_state_dict({"name": kind.__name__, "optimizer": plain.state_dict()})
        theta.copy_(plain_theta)


def test_agreeing_pushes_change_no_bit_and_allocate_no_memory() -> None:
    theta, plain_theta = torch.zeros(3), torch.zeros(3)
    outer_optimizer, plain = HeLoCo(LookAhead(lr=0.3)), LookAhead(lr=0.3)
    outer_optimizer.setup(theta, {"w": theta}, 2)
    plain.setup(plain_theta, {"w": plain_theta}, 2)
    for _ in range(3):
        outer_optimizer.step(torch.tensor([1.0, 2.0, 3.0]), {})
        plain.step(torch.tensor([1.0, 2.0, 3.0]), {})
    assert torch.equal(theta, plain_theta)
    assert outer_optimizer._corrected is None


def test_very_large_and_very_small_pushes_stay_finite() -> None:
    theta = torch.zeros(4)
    outer_optimizer = HeLoCo(LookAhead(lr=1.0))
    outer_optimizer.setup(theta, {"w": theta}, 2)
    for size in (1e-30, -1e-30, 1e25, -1e25):
        outer_optimizer.step(torch.full((4,), size), {})
        assert torch.isfinite(theta).all()


def test_cosine_of_a_tensor_is_computed_over_all_its_chunks() -> None:
    theta = torch.zeros(CHUNK + 2)
    outer_optimizer = HeLoCo(LookAhead(lr=1.0, momentum=0.5))
    outer_optimizer.setup(theta, {"w": theta}, 2)
    outer_optimizer.step(torch.ones(CHUNK + 2), {})
    assert outer_optimizer.momentum_buffer is not None
    gradient = torch.ones(CHUNK + 2)
    gradient[-2:] = -10.0
    # The last elements point against the momentum, but the whole tensor does not.
    before = theta.clone()
    outer_optimizer.step(gradient, {})
    m = 0.5 * 0.5 + 0.5 * gradient
    assert torch.equal(theta, before - (gradient + 0.5 * m))
