"""Tests that every outer optimizer has to pass."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_async_localsgd import outer, staleness
from lightning_async_localsgd.outer import (
    SGD,
    Adam,
    Buffer,
    DelayedNesterov,
    HeLoCo,
    LookAhead,
    Momentum,
    MomentumRestart,
    Nesterov,
    OuterOptimizer,
    TorchOptimizer,
    resolve_outer_optimizer,
)

SHAPES = {"a": (2, 3), "b": (4,)}

MAKE: dict[str, Callable[[], OuterOptimizer]] = {
    "SGD": lambda: SGD(lr=0.3),
    "Momentum": lambda: Momentum(lr=0.1, momentum=0.8),
    "Nesterov": lambda: Nesterov(lr=0.1),
    "Nesterov(momentum=0)": lambda: Nesterov(lr=0.1, momentum=0.0),
    "Adam": lambda: Adam(lr=0.1, betas=(0.8, 0.99), eps=1e-3),
    "TorchOptimizer": lambda: TorchOptimizer(torch.optim.RMSprop, lr=0.1, momentum=0.5),
    "Buffer": Buffer,
    "Buffer(period=3)": lambda: Buffer(lr=0.4, momentum=0.5, period=3),
    "DelayedNesterov": DelayedNesterov,
    "DelayedNesterov(period=3)": lambda: DelayedNesterov(lr=0.4, period=3, activation=0.1),
    "LookAhead": lambda: LookAhead(lr=0.3),
    "HeLoCo(LookAhead)": lambda: HeLoCo(LookAhead(lr=0.3)),
    "HeLoCo(DelayedNesterov)": lambda: HeLoCo(DelayedNesterov()),
    "MomentumRestart(Nesterov)": lambda: MomentumRestart(Nesterov(lr=0.1), every=3),
    "MomentumRestart(DelayedNesterov)": lambda: MomentumRestart(DelayedNesterov(), every=2),
    "MomentumRestart(Buffer)": lambda: MomentumRestart(Buffer(), every=2),
    "MomentumRestart(HeLoCo)": lambda: MomentumRestart(HeLoCo(LookAhead(lr=0.3)), every=3),
}
every_optimizer = pytest.mark.parametrize("name", MAKE)


def flat_and_views(order: str = "ab") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    flat, views, offset = torch.zeros(10), {}, 0
    for name in order:
        numel = torch.Size(SHAPES[name]).numel()
        views[name] = flat[offset : offset + numel].view(SHAPES[name])
        offset += numel
    return flat, views


class Run:
    """An outer optimizer with a model, and pushes that depend only on their number."""

    def __init__(self, name: str, workers: int = 3, order: str = "ab") -> None:
        self.outer_optimizer = MAKE[name]()
        self.order = order
        self.theta, self.views = flat_and_views(order)
        for view in self.views.values():
            view.fill_(1.0)
        self.outer_optimizer.setup(self.theta, self.views, workers)

    def push(self, number: int, workers: int = 0) -> None:
        """Apply push ``number``. If ``workers`` is not 0, first set the number of live workers."""
        if workers:
            self.outer_optimizer.set_workers(workers)
        gradient, views = flat_and_views(self.order)
        generator = torch.Generator().manual_seed(number)
        for name in "ab":
            views[name].copy_(torch.randn(SHAPES[name], generator=generator))
        kept = gradient.clone()
        self.outer_optimizer.step(gradient, views)
        assert torch.equal(gradient, kept)

    def save(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        file = io.BytesIO()
        torch.save(({name: view.clone() for name, view in self.views.items()}, self.outer_optimizer.state_dict()), file)
        file.seek(0)
        theta, state = torch.load(file, weights_only=True)
        return theta, state

    def restore(self, theta: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        for name, view in self.views.items():
            view.copy_(theta[name])
        self.outer_optimizer.load_state_dict(state)


# For each push: the number of live workers set before it, or 0 for no change.
histories = st.lists(st.sampled_from([0, 0, 0, 1, 2, 3, 5]), min_size=1, max_size=12)


@every_optimizer
@settings(max_examples=8)
@given(histories, st.data())
def test_restored_run_continues_like_one_that_was_never_stopped(
    name: str, history: list[int], data: st.DataObject
) -> None:
    """Also if the restored model has its parameters in another order, up to the rounding of sums over elements."""
    stop = data.draw(st.integers(0, len(history)))
    uninterrupted = Run(name)
    workers = 3
    for number, change in enumerate(history[:stop]):
        uninterrupted.push(number, change)
        workers = change or workers
    again, reordered = Run(name, workers), Run(name, workers, "ba")
    for run in (again, reordered):
        run.restore(*uninterrupted.save())
    for number, change in list(enumerate(history))[stop:]:
        for run in (uninterrupted, again, reordered):
            run.push(number, change)
    assert torch.equal(uninterrupted.theta, again.theta)
    for key, view in uninterrupted.views.items():
        torch.testing.assert_close(reordered.views[key], view, rtol=1e-5, atol=1e-6)


@every_optimizer
@settings(max_examples=5)
@given(histories, st.integers(1, 5))
def test_restoring_with_another_number_of_workers_equals_a_change_of_workers(
    name: str, history: list[int], workers: int
) -> None:
    saved = Run(name)
    for number, change in enumerate(history):
        saved.push(number, change)
    restored = Run(name, workers)
    restored.restore(*saved.save())
    saved.outer_optimizer.set_workers(workers)
    assert torch.equal(saved.theta, restored.theta)
    saved.push(99)
    restored.push(99)
    assert torch.equal(saved.theta, restored.theta)


@every_optimizer
@settings(max_examples=5)
@given(histories)
def test_same_events_give_the_same_finite_bits(name: str, history: list[int]) -> None:
    runs = [Run(name), Run(name)]
    for run in runs:
        for number, change in enumerate(history):
            run.push(number, change)
    assert torch.equal(runs[0].theta, runs[1].theta)
    assert torch.isfinite(runs[0].theta).all()


@every_optimizer
def test_saved_state_shares_no_memory_with_the_optimizer(name: str) -> None:
    run = Run(name)
    for number in range(4):
        run.push(number)
    state = run.outer_optimizer.state_dict()
    kept = copy.deepcopy(state)
    run.outer_optimizer.load_state_dict(state)
    for number in range(4, 8):
        run.push(number)
    actual, expected = Run(name), Run(name)
    for restored, saved in ((actual, state), (expected, kept)):
        restored.outer_optimizer.load_state_dict(saved)
        restored.push(9)
    assert torch.equal(actual.theta, expected.theta)


@every_optimizer
def test_missing_key_in_a_state_is_named(name: str) -> None:
    run = Run(name)
    for number in range(4):
        run.push(number)
    state = run.outer_optimizer.state_dict()
    for key in state:
        with pytest.raises(ValueError, match=key):
            run.outer_optimizer.load_state_dict({name: value for name, value in state.items() if name != key})


@every_optimizer
def test_momentum_is_flat_or_none(name: str) -> None:
    run = Run(name)
    for number in range(3):
        run.push(number)
    momentum = run.outer_optimizer.momentum_buffer
    if name in ("SGD", "Nesterov(momentum=0)"):
        assert momentum is None
        with pytest.raises(
            ValueError, match=r"no momentum that can be restarted; use an outer optimizer with momentum > 0"
        ):
            run.outer_optimizer.restart_momentum()
        return
    assert momentum is not None
    assert momentum.shape == run.theta.shape
    if name in ("Adam", "TorchOptimizer"):
        assert momentum.any()
        with pytest.raises(ValueError, match="no momentum that can be restarted"):
            run.outer_optimizer.restart_momentum()
    else:
        run.outer_optimizer.restart_momentum()
        assert not momentum.any()
        assert not torch.isnan(momentum).any()


def test_documentation_lists_every_optimizer_and_stage() -> None:
    text = (Path(__file__).parents[3] / "docs" / "outer-optimizers.md").read_text()
    classes = [value for value in (*vars(outer).values(), *vars(staleness).values()) if inspect.isclass(value)]
    bases = (outer.OuterOptimizer, staleness.Staleness)
    for cls in classes:
        if issubclass(cls, bases) and cls not in bases:
            named = re.findall(rf"^\| `{cls.__name__}\(([^)]*)\)`", text, re.MULTILINE)
            assert len(named) == 1, cls
            if cls not in (TorchOptimizer, staleness.Composed):
                assert [name.strip() for name in named[0].split(",") if name] == list(inspect.signature(cls).parameters)


@every_optimizer
def test_only_periodic_optimizers_average_pushes(name: str) -> None:
    outer_optimizer = MAKE[name]()
    assert outer_optimizer.averages_pushes is any(word in name for word in ("Buffer", "DelayedNesterov"))


@every_optimizer
def test_can_be_copied_pickled_and_evaluated(name: str) -> None:
    outer_optimizer = MAKE[name]()
    for again in (copy.deepcopy(outer_optimizer), resolve_outer_optimizer(outer_optimizer)):
        assert again is not outer_optimizer
        assert repr(again) == repr(outer_optimizer)
    assert repr(pickle.loads(pickle.dumps(outer_optimizer))) == repr(outer_optimizer)
    if not isinstance(outer_optimizer, TorchOptimizer) or type(outer_optimizer) is not TorchOptimizer:
        assert repr(eval(repr(outer_optimizer))) == repr(outer_optimizer)


@every_optimizer
def test_use_before_setup_raises(name: str) -> None:
    with pytest.raises(RuntimeError, match="before setup"):
        MAKE[name]().step(torch.zeros(1), {})
    with pytest.raises(RuntimeError, match="before setup"):
        MAKE[name]().state_dict()


@pytest.mark.parametrize(
    ("make", "gain"),
    [
        (lambda: DelayedNesterov(lr=0.6, momentum=0.8), 0.6 / 0.2),
        (lambda: DelayedNesterov(lr=0.6, momentum=0.8, period=2, activation=0.25), 0.6 / 0.2),
        (lambda: HeLoCo(DelayedNesterov(lr=0.6, momentum=0.8)), 0.6 / 0.2),
        (lambda: Buffer(lr=0.6, momentum=0.8), 0.6 / 0.2),
        (lambda: Buffer(lr=0.6, momentum=0.8, period=2), 0.6 / 0.2 * 4 / 2),
        (lambda: SGD(lr=0.6), 0.6 * 4),
        (lambda: Momentum(lr=0.6, momentum=0.8), 0.6 / 0.2 * 4),
        (lambda: Nesterov(lr=0.6, momentum=0.8), 0.6 / 0.2 * 4),
        (lambda: LookAhead(lr=0.6, momentum=0.8), 0.6 * 1.8 * 4),
        (lambda: HeLoCo(LookAhead(lr=0.6, momentum=0.8)), 0.6 * 1.8 * 4),
    ],
)
def test_steady_movement_of_k_equal_pushes(make: Callable[[], OuterOptimizer], gain: float) -> None:
    """The table under "Learning rates" in docs/outer-optimizers.md, for k = 4."""
    outer_optimizer, theta, push = make(), torch.zeros(1), torch.ones(1)
    outer_optimizer.setup(theta, {"w": theta}, workers=4)
    for _ in range(100):
        theta.zero_()
        for _ in range(4):
            outer_optimizer.step(push, {"w": push})
    assert -float(theta) == pytest.approx(gain, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: SGD(lr=1.0), True),
        (lambda: SGD(lr=0.5), False),
        (lambda: Nesterov(lr=1.0, momentum=0.0), True),
        (lambda: Nesterov(lr=1.0), False),
        (lambda: Momentum(lr=1.0), False),
        (lambda: Adam(lr=1.0), False),
        (lambda: Buffer(lr=1.0, momentum=0.0), True),
        (lambda: Buffer(lr=1.0, momentum=0.0, period=2), False),
        (lambda: Buffer(lr=1.0), False),
        (lambda: LookAhead(lr=1.0, momentum=0.0), True),
        (lambda: LookAhead(lr=1.0), False),
        (lambda: HeLoCo(LookAhead(lr=1.0)), False),
        (lambda: MomentumRestart(LookAhead(lr=1.0), every=1), False),
    ],
)
def test_replaces_model(make: Callable[[], OuterOptimizer], expected: bool) -> None:
    outer_optimizer = make()
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(7, generator=generator)
    outer_optimizer.setup(theta, {"w": theta}, workers=1)
    assert outer_optimizer.replaces_model is expected
    exact = True
    for _ in range(4):
        gradient = torch.randn(7, generator=generator)
        replaced = theta - gradient
        outer_optimizer.step(gradient, {"w": gradient})
        exact = exact and torch.equal(theta, replaced)
    assert exact is expected


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SGD(lr=0.0), ValueError, r"SGD: lr must be a number > 0, got 0.0; 1/\(number of workers\)"),
        (lambda: SGD(lr=True), ValueError, "SGD: lr .* got True"),
        (lambda: Momentum(lr=-1), ValueError, "Momentum: lr must be a number > 0, got -1; "),
        (lambda: Momentum(lr=0.1, momentum=1.0), ValueError, r"Momentum: momentum must be in \[0, 1\), got 1.0; 0.9"),
        (lambda: Nesterov(lr=float("nan")), ValueError, "Nesterov: lr .* got nan"),
        (lambda: Nesterov(lr=0.1, momentum="0.9"), ValueError, "Nesterov: momentum .* got '0.9'"),
        (lambda: Adam(lr=float("inf")), ValueError, "Adam: lr .* got inf"),
        (lambda: Adam(lr=0.1, betas=(0.9,)), ValueError, r"Adam: betas must be two numbers, got \(0.9,\); "),
        (lambda: Adam(lr=0.1, betas=(0.9, 1.0)), ValueError, r"Adam: betas\[1\] must be in \[0, 1\), got 1.0; "),
        (lambda: Adam(lr=0.1, eps=0), ValueError, "Adam: eps must be a number > 0, got 0; "),
        (lambda: Buffer(lr=0), ValueError, "Buffer: lr must be a number > 0, got 0; "),
        (lambda: Buffer(momentum=-0.5), ValueError, "Buffer: momentum must be in"),
        (lambda: Buffer(period=0), ValueError, 'Buffer: period must be an integer >= 1 or "auto", got 0; '),
        (lambda: Buffer(period=2.0), ValueError, "Buffer: period .* got 2.0"),
        (lambda: LookAhead(lr=-0.1), ValueError, "LookAhead: lr must be a number > 0, got -0.1; "),
        (lambda: LookAhead(lr=0.1, momentum=1), ValueError, "LookAhead: momentum must be in"),
        (lambda: HeLoCo(SGD(lr=0.1)), TypeError, r"HeLoCo: optimizer must be LookAhead.*got SGD\(lr=0.1\); "),
        (lambda: HeLoCo(LookAhead), TypeError, "HeLoCo: optimizer must be an outer optimizer, got <class"),
        (
            lambda: HeLoCo(LookAhead(lr=0.1, momentum=0)),
            ValueError,
            "HeLoCo: optimizer must have momentum > 0",
        ),
        (
            lambda: HeLoCo(MomentumRestart(LookAhead(lr=0.1), 2)),
            TypeError,
            r"use MomentumRestart\(HeLoCo\(...\), every=...\)",
        ),
        (lambda: MomentumRestart(LookAhead(lr=0.1), 0), ValueError, "MomentumRestart: every must be an integer >= 1"),
        (lambda: MomentumRestart(LookAhead(lr=0.1), 1.5), ValueError, "MomentumRestart: every .* got 1.5"),
        (
            lambda: MomentumRestart(None, 2),
            TypeError,
            "MomentumRestart: optimizer must be an outer optimizer, got None",
        ),
        (lambda: MomentumRestart(SGD(lr=0.1), 2), ValueError, r"MomentumRestart: SGD\(lr=0.1\) has no momentum"),
        (lambda: MomentumRestart(Adam(lr=0.1), 2), ValueError, r"MomentumRestart: Adam\(.*\) has no momentum"),
        (lambda: MomentumRestart(Buffer(momentum=0), 2), ValueError, r"MomentumRestart: Buffer\(.*has no momentum"),
        (lambda: MomentumRestart(DelayedNesterov(momentum=0), 2), ValueError, "has no momentum that can be"),
    ],
)
def test_invalid_arguments_are_rejected(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_wrappers_reject_the_state_of_another_optimizer() -> None:
    theta = torch.zeros(2)
    look_ahead, delayed = HeLoCo(LookAhead(lr=0.1)), HeLoCo(DelayedNesterov())
    for outer_optimizer in (look_ahead, delayed):
        outer_optimizer.setup(theta, {"w": theta}, 2)
    message = r"written with HeLoCo\(LookAhead\(...\)\), this run has HeLoCo\(DelayedNesterov\(...\)\)"
    with pytest.raises(ValueError, match=message):
        delayed.load_state_dict(look_ahead.state_dict())


def test_given_hyperparameters_take_precedence_over_a_checkpoint() -> None:
    theta = torch.zeros(1)
    old, new = SGD(lr=1.0), SGD(lr=0.5)
    for outer_optimizer in (old, new):
        outer_optimizer.setup(theta, {"w": theta}, 1)
    new.load_state_dict(old.state_dict())
    assert not new.replaces_model
    new.step(torch.ones(1), {"w": torch.ones(1)})
    assert float(theta) == -0.5
    # Values that are not given, such as a torch optimizer's defaults, are restored from the checkpoint.
    saved = TorchOptimizer(functools.partial(torch.optim.SGD, momentum=0.5), lr=1.0)
    now = TorchOptimizer(torch.optim.SGD, lr=0.25)
    for outer_optimizer in (saved, now):
        outer_optimizer.setup(theta, {"w": theta}, 1)
    now.load_state_dict(saved.state_dict())
    (group,) = now.state_dict()["groups"]
    assert (group["lr"], group["momentum"]) == (0.25, 0.5)
