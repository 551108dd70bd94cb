"""Outer optimizers and staleness stages in a configuration file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import yaml
from torch.optim import Optimizer

from lightning_async_localsgd.outer import OuterOptimizer
from lightning_async_localsgd.staleness import Staleness

jsonargparse = pytest.importorskip("jsonargparse")

OUTER_OPTIMIZERS = {
    "SGD(lr=0.2)": "{class_path: SGD, init_args: {lr: 0.2}}",
    "Momentum(lr=0.2, momentum=0.8)": "{class_path: Momentum, init_args: {lr: 0.2, momentum: 0.8}}",
    "Nesterov(lr=0.2, momentum=0.9)": "{class_path: Nesterov, init_args: {lr: 0.2}}",
    "Adam(lr=0.2, betas=(0.5, 0.75), eps=0.001)": (
        "{class_path: Adam, init_args: {lr: 0.2, betas: [0.5, 0.75], eps: 0.001}}"
    ),
    "Buffer(lr=0.5, momentum=0.9, period='auto')": "{class_path: Buffer, init_args: {lr: 0.5}}",
    "Buffer(lr=0.7, momentum=0.9, period=3)": "{class_path: Buffer, init_args: {period: 3}}",
    "LookAhead(lr=1.0, momentum=0.9)": "{class_path: LookAhead, init_args: {lr: 1}}",
    "MomentumRestart(HeLoCo(LookAhead(lr=0.3, momentum=0.9)), every=50)": """
class_path: MomentumRestart
init_args:
  every: 50
  optimizer:
    class_path: HeLoCo
    init_args:
      optimizer: {class_path: LookAhead, init_args: {lr: 0.3}}
""",
}

STALENESS_STAGES = {
    "Constant()": "{class_path: Constant}",
    "Polynomial(power=0.5)": "{class_path: Polynomial}",
    "PolynomialThreshold(power=0.25, threshold=4)": (
        "{class_path: PolynomialThreshold, init_args: {power: 0.25, threshold: 4}}"
    ),
    "Hinge(slope=10.0, start=4)": "{class_path: Hinge, init_args: {slope: 10, start: 4}}",
    "Composed([ExponentialCosine(rate=0.1, cutoff=-0.5), DelayCompensation(strength=0.5)])": """
class_path: Composed
init_args:
  stages:
    - {class_path: ExponentialCosine, init_args: {rate: 0.1, cutoff: -0.5}}
    - {class_path: DelayCompensation, init_args: {strength: 0.5}}
""",
}


def parsed(option_type: Any, text: str, module: str) -> Any:
    """Return the object that ``text`` configures, after writing and reading the configuration once."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--option", type=option_type)
    text = text.replace("class_path: ", f"class_path: lightning_async_localsgd.{module}".rstrip(".") + ".")
    printed = parser.dump(parser.parse_object({"option": yaml.safe_load(text)}))
    return parser.instantiate(parser.parse_string(printed)).option


@pytest.mark.parametrize("shown", OUTER_OPTIMIZERS)
def test_outer_optimizers_from_a_config(shown: str) -> None:
    # The type of the strategy's option.
    option = OuterOptimizer | Callable[[Iterable[Any]], Optimizer] | None
    outer_optimizer = parsed(option, OUTER_OPTIMIZERS[shown], "outer")
    assert isinstance(outer_optimizer, OuterOptimizer)
    assert repr(outer_optimizer) == shown


@pytest.mark.parametrize("shown", STALENESS_STAGES)
def test_staleness_stages_from_a_config(shown: str) -> None:
    stage = parsed(Staleness | None, STALENESS_STAGES[shown], "staleness")
    assert isinstance(stage, Staleness)
    assert repr(stage) == shown


def test_strategy_with_outer_optimizer_and_staleness_from_a_config() -> None:
    from lightning.pytorch.strategies import Strategy

    text = """
class_path: AsyncLocalSGDStrategy
init_args:
  outer_optimizer:
    class_path: outer.HeLoCo
    init_args:
      optimizer: {class_path: outer.DelayedNesterov, init_args: {lr: 0.4}}
  staleness:
    class_path: staleness.Composed
    init_args:
      stages: [{class_path: staleness.Polynomial}, {class_path: staleness.DelayCompensation, init_args: {strength: 1}}]
"""
    strategy = parsed(Strategy, text, "")
    inner = "DelayedNesterov(lr=0.4, momentum=0.9, period='auto', activation=0.0)"
    assert repr(strategy.outer_optimizer) == f"HeLoCo({inner})"
    assert repr(strategy.merge_policy.staleness) == "Composed([Polynomial(power=0.5), DelayCompensation(strength=1.0)])"


def test_invalid_value_in_a_config_is_reported() -> None:
    text = (
        "{class_path: MomentumRestart, init_args: {every: 0, optimizer: {class_path: LookAhead, init_args: {lr: 1}}}}"
    )
    with pytest.raises(ValueError, match="MomentumRestart: every must be an integer >= 1, got 0"):
        parsed(OuterOptimizer, text, "outer")
