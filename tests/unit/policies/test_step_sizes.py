"""Units of progress: local steps, or samples if workers have batch sizes of their own."""

from __future__ import annotations

import dataclasses

from lightning_async_localsgd.policies.step_sizes import StepSizes
from lightning_async_localsgd.protocol.messages import Push

PUSH = Push(1, "s", 1, "this", 0, 3, 40, 0, 0.0, 0.0, final=False, stop=False)


def test_units_are_steps_without_own_sizes() -> None:
    sizes = StepSizes()
    sizes.announce(1, 16)
    assert not sizes.counts_samples
    assert (sizes.unit, sizes.of(1), sizes.smallest([0, 1])) == (1, 1, 1)
    assert sizes.units(PUSH) == 3
    assert sizes.equal_steps([0, 1]) == {0: None, 1: None}


def test_units_are_samples_with_own_sizes() -> None:
    sizes = StepSizes(reference=64)
    sizes.announce(1, 16)
    assert sizes.counts_samples
    assert (sizes.unit, sizes.of(0), sizes.of(1), sizes.smallest([0, 1]), sizes.smallest([])) == (64, 64, 16, 16, 64)
    assert sizes.units(PUSH) == 40, "the last batch of an epoch may be smaller"
    assert sizes.units(dataclasses.replace(PUSH, steps=0)) == 0, "an optimizer that skips all steps makes no progress"
    assert sizes.equal_steps([0, 1]) == {0: 64.0, 1: 16.0}


def test_reference_of_one_sample_counts_samples() -> None:
    sizes = StepSizes(reference=1)
    sizes.announce(0, 4)
    assert sizes.counts_samples
    assert sizes.of(0) == 4
