"""Ordinary short runs with the defaults, against data-parallel training with the same number of epochs.

Data-parallel training on k ranks is a run on one device with k times the batch.
"""

from __future__ import annotations

import functools

import pytest

from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy
from tests.short_tasks import BATCH, EPOCHS, TASKS

CLUSTERS = {
    "2 equal": [0.1] * 2,
    "4 equal": [0.1] * 4,
    "4 unequal": [0.1, 0.13, 0.26, 0.574],
}


@functools.cache
def data_parallel(name: str, seed: int, ranks: int) -> list[float]:
    return TASKS[name].fit(seed, BATCH * ranks, strategy="auto")


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("name", TASKS)
def test_defaults_are_as_good_as_data_parallel_training(name: str, cluster: str, seed: int) -> None:
    seconds = CLUSTERS[cluster]
    losses = TASKS[name].fit(seed, strategy=SimulatedAsyncLocalSGDStrategy(seconds, exchange_seconds=0.001))
    reference = data_parallel(name, seed, len(seconds))
    assert len(losses) == len(reference) == EPOCHS
    assert losses[-1] <= 1.25 * reference[-1], (losses, reference)
    assert max(losses[1:]) <= losses[0], losses
