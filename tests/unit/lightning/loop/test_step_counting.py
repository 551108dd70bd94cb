"""Steps of optimizers, and of optimizers that wrap others, count once."""

from __future__ import annotations

import pytest
import torch

from lightning_async_localsgd.lightning.loop.step_counting import StepCounter


class Wrapper(torch.optim.Optimizer):
    """Steps another optimizer, as a whole or by a method of its own."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise RuntimeError("no closure")
        self.inner.step()

    def second_step(self) -> None:
        self.inner.step()


@pytest.fixture
def counted() -> list[int]:
    return []


def test_step_of_a_wrapper_counts_once_whichever_method_takes_it(counted: list[int]) -> None:
    inner = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer = Wrapper(inner)
    counter = StepCounter(optimizer, lambda: counted.append(1))
    optimizer.step()
    assert len(counted) == 1
    optimizer.second_step()
    assert len(counted) == 2
    with pytest.raises(RuntimeError, match="no closure"):
        optimizer.step(lambda: None)
    counter.end_batch()
    optimizer.second_step()
    assert len(counted) == 3
    counter.close()
    optimizer.step()
    assert len(counted) == 3
