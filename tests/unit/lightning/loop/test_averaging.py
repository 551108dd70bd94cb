"""Averages that cannot begin, or have not begun."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from lightning.pytorch import callbacks

from lightning_async_localsgd import AsyncLocalSGDStrategy
from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy as Simulated
from tests.lightning_models import EMAWeightAveraging, Regression, loader, quiet_trainer

pytestmark = pytest.mark.skipif(EMAWeightAveraging is None, reason="Lightning has no EMAWeightAveraging")


def warned(strategy: Any, averaging: Any, **options: Any) -> list[str]:
    trainer = quiet_trainer(strategy, callbacks=[averaging], limit_val_batches=0, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Regression(), loader(64))
    return [str(warning.message) for warning in caught if "verag" in str(warning.message)]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({"update_starting_at_step": 10}, {"max_steps": 10}),
        ({"update_starting_at_step": 7, "update_every_n_steps": 5}, {"max_steps": 10}),
        ({"update_every_n_steps": 0, "update_starting_at_epoch": 2}, {"max_epochs": 2}),
    ],
)
@pytest.mark.parametrize("simulated", [False, True])
def test_average_that_cannot_begin_is_named_at_the_start_and_at_the_end(
    arguments: dict[str, Any], options: dict[str, Any], simulated: bool
) -> None:
    strategy = Simulated([0.1, 0.2], local_steps=2) if simulated else AsyncLocalSGDStrategy(local_steps=2)
    start, end = warned(strategy, EMAWeightAveraging(**arguments), **options)
    assert "cannot begin, because this run ends after" in start
    assert f"update_starting_at_step={arguments.get('update_starting_at_step')}" in start
    assert "has averaged no model in this run" in end


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({"update_starting_at_step": 9}, {"max_steps": 10}),
        ({"update_starting_at_step": 4, "update_every_n_steps": 5}, {"max_steps": 10}),
        ({"update_every_n_steps": 0, "update_starting_at_epoch": 1}, {"max_epochs": 2}),
    ],
)
def test_average_that_begins_causes_no_warning(arguments: dict[str, Any], options: dict[str, Any]) -> None:
    assert not warned(AsyncLocalSGDStrategy(local_steps=2), EMAWeightAveraging(**arguments), **options)


def test_rule_of_the_user_that_never_selects_a_step_is_named_at_the_end() -> None:
    class Never(callbacks.WeightAveraging):  # type: ignore[misc] # not in all releases of Lightning
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return False

    [end] = warned(AsyncLocalSGDStrategy(local_steps=2), Never(), max_steps=4)
    assert "Never has averaged no model in this run" in end
