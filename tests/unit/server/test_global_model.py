from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_async_localsgd.outer import DelayedNesterov, OuterOptimizer, TorchOptimizer
from lightning_async_localsgd.outer.base import CHUNK
from lightning_async_localsgd.protocol.layout import Binding, Layout
from lightning_async_localsgd.server.global_model import GlobalModel


def make(
    outer_optimizer: OuterOptimizer | None = None, workers: int = 2, module: nn.Module | None = None
) -> GlobalModel:
    module = module or nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model = GlobalModel(Layout.of(module), outer_optimizer or DelayedNesterov(), workers)
    model.load(torch.randn(model.layout.numel))
    return model


def push(model: GlobalModel) -> torch.Tensor:
    return torch.randn(model.layout.numel)


def test_parameters_follow_the_rule_and_buffers_move_their_share() -> None:
    model = make(DelayedNesterov(lr=1.0, momentum=0.0), workers=4)
    split = model.layout.parameter_numel
    before, gradient = model.theta.clone(), push(model)
    kept = gradient.clone()
    model.apply(gradient)
    assert model.version == 1
    assert torch.equal(gradient, kept)
    torch.testing.assert_close(model.theta[:split], before[:split] - gradient[:split] / 4)
    torch.testing.assert_close(model.theta[split:], before[split:] * 0.75 + gradient[split:] / 4)


def test_stale_statistics_never_make_a_variance_negative() -> None:
    module = nn.BatchNorm1d(1)
    model = make(workers=4, module=module)
    binding = Binding(model.layout, module)
    base = torch.ones(model.layout.numel)
    model.load(base)
    # Nine stale pushes, each from a worker that measured 0.01 where it had been sent 1.0.
    binding.load(base)
    module.running_var.fill_(0.01)
    gradient = torch.empty_like(base)
    binding.subtract_from(base, gradient)
    for _ in range(9):
        model.apply(gradient)
    assert 0.01 <= float(model.layout.views(model.theta)["running_var"]) < 0.1


def test_buffers_equal_everywhere_stay_bit_for_bit() -> None:
    model = make(workers=3)
    split = model.layout.parameter_numel
    before, gradient = model.theta.clone(), push(model)
    gradient[split:] = before[split:]
    for _ in range(5):
        model.apply(gradient)
    assert torch.equal(model.theta[split:], before[split:])


def test_single_worker_keeps_its_weights_bit_for_bit() -> None:
    model = make(TorchOptimizer(torch.optim.SGD, lr=1.0), workers=1)
    local = torch.randn(model.layout.numel) * 1e-3
    model.apply(model.theta - local, result=local)
    assert torch.equal(model.theta, local)
    model.set_workers(2)
    with pytest.raises(ValueError, match="does not replace the model"):
        model.apply(push(model), result=local)
    with pytest.raises(ValueError, match="does not replace the model"):
        make(workers=1).apply(push(model), result=local)


def test_inspect_measures_without_changing() -> None:
    model = make(DelayedNesterov(period=1), workers=1)
    split = model.layout.parameter_numel
    first, second = push(model), push(model)
    assert model.inspect(first).momentum_cosine is None
    model.apply(first)
    theta, kept = model.theta.clone(), second.clone()
    seen = model.inspect(second)
    assert seen.diverged is None
    assert seen.norm == pytest.approx(float(second[:split].norm()), rel=1e-6)
    cosine = torch.nn.functional.cosine_similarity(first[:split], second[:split], dim=0)
    assert seen.momentum_cosine == pytest.approx(float(cosine), rel=1e-4, abs=1e-6)
    assert torch.equal(model.theta, theta)
    assert torch.equal(second, kept)
    assert model.version == 1
    assert make(TorchOptimizer(torch.optim.SGD, lr=1.0)).inspect(second).momentum_cosine is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [0, CHUNK, -1])
def test_single_bad_element_is_found(bad: float, index: int) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(CHUNK + 3))
    module.register_buffer("mean", torch.zeros(2))
    model = make(module=module)
    gradient = torch.zeros(model.layout.numel)
    gradient[index] = bad
    seen = model.inspect(gradient)
    assert seen.diverged is not None
    assert math.isnan(seen.norm)


def test_buffers_that_hold_no_number_from_the_start_do_not_need_to() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(2))
    module.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(2))
    module.register_buffer("least", torch.tensor([math.inf, math.inf]))
    module.register_buffer("mean", torch.tensor([1.0, math.nan]))
    model = GlobalModel(Layout.of(module), DelayedNesterov(lr=1.0, momentum=0.0), 2)
    binding = Binding(model.layout, module)
    model.read(binding)
    values = model.layout.views(model.theta)

    def round_with(**buffers: list[float]) -> str | None:
        """A worker that has learned nothing but these values."""
        base, gradient = model.theta.clone(), torch.empty_like(model.theta)
        binding.load(base.clone())
        for name, value in buffers.items():
            module.get_buffer(name).copy_(torch.tensor(value))
        binding.subtract_from(base, gradient)
        found = model.inspect(gradient).diverged
        if found is None:
            model.apply(gradient)
        return found

    assert round_with(least=[3.0, math.inf]) is None
    assert values["mask"].tolist() == [[0.0, -math.inf], [0.0, 0.0]], "what is equal everywhere stays"
    assert values["least"].tolist() == [3.0, math.inf], "what was measured first is taken as it is"
    assert round_with(least=[1.0, 5.0], mean=[3.0, 2.0]) is None
    assert values["least"].tolist() == [2.0, 5.0]
    assert values["mean"].tolist() == [2.0, 2.0]
    # A worker that had not measured anything yet changes nothing.
    assert round_with(least=[math.inf, math.nan]) is None
    assert values["least"].tolist() == [2.0, 5.0]
    # Where there was a number from the start there has to be one.
    assert round_with(mean=[math.inf, 0.0]) == "buffer 'mean'"
    assert round_with(mask=[[math.nan, 0.0], [0.0, 0.0]]) == "buffer 'mask'"
    gradient = torch.zeros_like(model.theta)
    gradient[1] = math.nan
    assert model.inspect(gradient).diverged == "parameter 'weight'"
    # So it is in a run that goes on from a checkpoint.
    state = model.state_dict()
    again = GlobalModel(model.layout, DelayedNesterov(lr=1.0, momentum=0.0), 2)
    again.load_state_dict(state)
    gradient = again.theta.clone()
    gradient[: model.layout.parameter_numel] = 0.0
    assert again.inspect(gradient).diverged is None
    again.apply(gradient)
    assert torch.equal(again.theta, model.theta)


def test_huge_but_finite_elements_are_finite() -> None:
    model = make()
    gradient = torch.full((model.layout.numel,), 3e38)
    seen = model.inspect(gradient)
    assert seen.diverged is None
    assert seen.norm == pytest.approx(3e38 * math.sqrt(model.layout.parameter_numel), rel=1e-6)


@pytest.mark.parametrize(
    "outer_optimizer",
    [
        DelayedNesterov(period=3, activation=0.1),
        TorchOptimizer(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True),
        TorchOptimizer(torch.optim.AdamW, lr=0.1),
    ],
    ids=str,
)
@pytest.mark.parametrize("pushes_before", [0, 4])
def test_save_restore_continue_is_never_having_stopped(outer_optimizer: OuterOptimizer, pushes_before: int) -> None:
    import copy

    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    steady = make(copy.deepcopy(outer_optimizer), module=module)
    pushes = [push(steady) for _ in range(9)]
    for gradient in pushes[:pushes_before]:
        steady.apply(gradient)

    file = io.BytesIO()
    torch.save(steady.state_dict(), file)
    file.seek(0)
    restored = make(copy.deepcopy(outer_optimizer), module=module)
    restored.apply(push(restored))
    restored.load_state_dict(torch.load(file, weights_only=True))

    for gradient in pushes[pushes_before:]:
        steady.apply(gradient)
        restored.apply(gradient)
    assert torch.equal(steady.theta, restored.theta)
    assert restored.version == len(pushes)


def test_state_is_a_copy_and_compact() -> None:
    model = make()
    state = model.state_dict()
    kept = {name: tensor.clone() for name, tensor in state["theta"].items()}
    for tensor in state["theta"].values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4
    for _ in range(3):
        model.apply(push(model))
    assert all(torch.equal(kept[name], tensor) for name, tensor in state["theta"].items())
    assert state["version"] == 0


def test_state_without_theta_keeps_the_present_model() -> None:
    model, other = make(), make()
    model.apply(push(model))
    state = model.state_dict()
    del state["theta"]
    theta = other.theta.clone()
    other.load_state_dict(state)
    assert torch.equal(other.theta, theta)
    assert other.version == 1


def broken(change: str) -> dict[str, Any]:
    state = make().state_dict()
    if change == "missing":
        del state["theta"]["0.weight"]
    elif change == "unknown":
        state["theta"]["extra"] = torch.zeros(1)
    elif change == "shape":
        state["theta"]["0.weight"] = torch.zeros(3, 2)
    elif change == "momentum":
        del state["outer"]["momentum"]["0.bias"]
    elif change == "kind":
        state["theta"]["0.weight"] = 3
    else:
        del state[change]
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"global model does not match this model: missing \['0.weight'\]"),
        ("unknown", r"unexpected \['extra'\]"),
        ("shape", r"'0.weight' is \[3, 2\], expected \[2, 3\]"),
        ("kind", "'0.weight' is int"),
        ("momentum", r"'momentum' of DelayedNesterov does not match this model: missing \['0.bias'\]"),
        ("version", "lacks.*version"),
        ("outer", "lacks.*outer"),
    ],
)
def test_foreign_states_are_refused_by_name(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().load_state_dict(broken(change))


def test_state_of_another_rule_is_refused() -> None:
    sgd = TorchOptimizer(torch.optim.SGD, lr=1.0)
    with pytest.raises(ValueError, match="outer_optimizer=DelayedNesterov, this run has TorchOptimizer"):
        make(sgd).load_state_dict(make().state_dict())
    adam = make(TorchOptimizer(torch.optim.Adam, lr=1.0))
    with pytest.raises(ValueError, match="outer optimizer Adam, this run has SGD"):
        make(sgd).load_state_dict(adam.state_dict())


@pytest.mark.parametrize("flat", [torch.zeros(3), torch.zeros(12, dtype=torch.float64), torch.zeros(2, 6)])
def test_only_flat_fp32_vectors_of_the_right_length(flat: torch.Tensor) -> None:
    model = make()
    assert model.layout.numel == 16
    for method in (model.load, model.copy_to, model.inspect, model.apply):
        with pytest.raises(ValueError, match="flat fp32 vector of 16 elements"):
            method(flat)


def test_workers_must_be_positive() -> None:
    with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
        make().set_workers(0)
    with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
        make(workers=0)


# ------------------------------------------------------------------- second moments


def with_moments(workers: int = 4) -> GlobalModel:
    layout = Layout([("w", (3,), "torch.float32", "parameter"), ("b", (2,), "torch.float32", "buffer"),
                     ("w:second_moment", (3,), "torch.float32", "moment")])  # fmt: skip
    return GlobalModel(layout, DelayedNesterov(lr=1.0, momentum=0.0), workers)


def moments_of(model: GlobalModel) -> list[float]:
    return model.layout.views(model.theta)["w:second_moment"].tolist()


def push_of(*moments: float) -> torch.Tensor:
    return torch.tensor([0.0] * 5 + list(moments))


def test_first_known_moment_is_taken_and_later_ones_move_their_share() -> None:
    model = with_moments(workers=4)
    model.load(model.theta.nan_to_num())
    assert moments_of(model) == [0.0, 0.0, 0.0]
    model = with_moments(workers=4)
    assert all(math.isnan(value) for value in moments_of(model))
    model.apply(push_of(math.nan, 8.0, 4.0))
    assert math.isnan(moments_of(model)[0])
    model.apply(push_of(2.0, math.nan, 8.0))
    assert moments_of(model) == [2.0, 8.0, 5.0]
    model.apply(push_of(4.0, 8.0, 5.0))
    assert moments_of(model) == [2.5, 8.0, 5.0]
    model.apply(push_of(4.5, 0.0, 5.0), pushes=2)
    assert moments_of(model) == [3.5, 4.0, 5.0]


@pytest.mark.parametrize("value", [-1e-9, math.inf, -math.inf])
def test_impossible_moment_is_refused_by_name(value: float) -> None:
    model = with_moments()
    for push in (push_of(0.0, value, 1.0), push_of(math.nan, value, 1.0)):
        inspected = model.inspect(push)
        assert math.isnan(inspected.norm)
        assert inspected.diverged == "moment 'w:second_moment'"
    for push in (push_of(0.0, 1e30, 1.0), push_of(math.nan, math.nan, 1.0)):
        assert model.inspect(push).diverged is None


def test_unknown_moment_is_not_taken_for_a_divergence_of_the_parameters() -> None:
    model = with_moments()
    push = push_of(math.nan, math.nan, math.nan)
    push[1] = math.nan
    assert model.inspect(push).diverged == "parameter 'w'"
    push[1] = 0.0
    push[4] = math.inf
    assert model.inspect(push).diverged == "buffer 'b'"


def test_moments_are_saved_apart_from_the_model() -> None:
    model, restored, without = with_moments(), with_moments(), with_moments()
    model.apply(push_of(1.0, math.nan, 3.0))
    state = model.state_dict()
    assert set(state["theta"]) == {"w", "b"}
    restored.load_state_dict({key: value for key, value in state.items() if key != "theta"})
    assert str(moments_of(restored)) == "[1.0, nan, 3.0]"
    without.apply(push_of(1.0, 1.0, 1.0))
    without.load_state_dict({**state, "moments": {}})
    assert all(math.isnan(value) for value in moments_of(without))


def test_state_without_theta_of_another_model_is_refused() -> None:
    state = {key: value for key, value in make(DelayedNesterov(momentum=0.0)).state_dict().items() if key != "theta"}
    other = make(DelayedNesterov(momentum=0.0), module=nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"missing \['weight', 'bias'\].*belongs to another model"):
        other.load_state_dict(state)
