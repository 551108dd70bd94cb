"""All hooks of modules, callbacks and data modules are called like with DDP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lightning_contract import hooks_job
from tests.processes import Outcome, jobs

STRATEGIES = ("ddp", "async_localsgd")

Calls = dict[str, int]

OF_RANK_0 = (".on_validation_", ".validation_step", ".on_save_checkpoint", ".state_dict")
"""Hooks that only rank 0 calls in fit, except for the sanity check: other ranks neither validate nor save."""

OF_BATCHES = (
    *(".on_train_batch_start", ".on_train_batch_end", ".training_step", ".optimizer_step", ".optimizer_zero_grad"),
    *(
        ".on_before_batch_transfer",
        ".transfer_batch_to_device",
        ".on_after_batch_transfer",
        ".configure_gradient_clipping",
    ),
    *(".on_before_zero_grad", ".on_before_backward", ".backward", ".on_after_backward", ".on_before_optimizer_step"),
)
"""Hooks that are called for each training batch, of which ranks take unequal shares."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outcome]]:
    """Run the job with both strategies."""
    with jobs() as started:
        found = {}
        for strategy in STRATEGIES:
            out = tmp_path_factory.mktemp(strategy)
            found[strategy] = Outcome(0, started.run(hooks_job.__file__, out, strategy), out)
        yield found


def calls(outcomes: dict[str, Outcome], rank: int, stage: str) -> list[Calls]:
    """Return the calls on one rank in one stage, by strategy."""
    return [outcomes[strategy].rank(rank)[stage] for strategy in STRATEGIES]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_hooks_outside_fit_are_those_of_ddp(outcomes: dict[str, Outcome], stage: str, rank: int) -> None:
    ddp, ours = calls(outcomes, rank, stage)
    assert len(ddp) > 20
    assert ours == ddp


def test_hooks_of_rank_0_in_fit_are_those_of_ddp(outcomes: dict[str, Outcome]) -> None:
    ddp, ours = calls(outcomes, 0, "fit")
    assert len(ddp) > 50
    assert ours.keys() == ddp.keys()
    assert {name for name in ddp if ddp[name] != ours[name]} <= {name for name in ddp if name.endswith(OF_BATCHES)}


def test_other_ranks_neither_validate_nor_save(outcomes: dict[str, Outcome]) -> None:
    ddp, ours = calls(outcomes, 1, "fit")
    of_rank_0 = {name for name in ddp if any(part in name for part in OF_RANK_0)}
    assert ddp.keys() - ours.keys() <= of_rank_0
    assert ours.keys() <= ddp.keys()
    differing = {name for name in ours if ddp[name] != ours[name]}
    assert differing <= of_rank_0 | {name for name in ddp if name.endswith(OF_BATCHES)}


def test_ranks_together_train_on_as_many_batches_as_with_ddp(outcomes: dict[str, Outcome]) -> None:
    ranks = [calls(outcomes, rank, "fit") for rank in (0, 1)]
    ddp, ours = (sum(rank[at]["BoringModel.training_step"] for rank in ranks) for at in (0, 1))
    assert ours == ddp
