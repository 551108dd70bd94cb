"""All hooks of modules, callbacks and datamodules are called where DDP calls them."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.lightning_contract import hooks_job
from tests.processes import Outcome, jobs

STRATEGIES = ("ddp", "async_localsgd")

Calls = dict[str, int]

OF_RANK_0 = (".on_validation_", ".validation_step", ".on_save_checkpoint", ".state_dict")
"""In fit the other ranks neither validate, besides the sanity check, nor save."""

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
"""Called once for every training batch, of which ranks take unequal shares."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outcome]]:
    """Both strategies' runs."""
    with jobs() as started:
        found = {}
        for strategy in STRATEGIES:
            out = tmp_path_factory.mktemp(strategy)
            code, text = started.finish(started.start([sys.executable, hooks_job.__file__, out, strategy]))
            assert code == 0, text[-6000:]
            found[strategy] = Outcome(code, text, out)
        yield found


def calls(outcomes: dict[str, Outcome], rank: int, stage: str) -> list[Calls]:
    return [outcomes[strategy].rank(rank)[stage] for strategy in STRATEGIES]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_outside_fit_nothing_differs(outcomes: dict[str, Outcome], stage: str, rank: int) -> None:
    ddp, ours = calls(outcomes, rank, stage)
    assert len(ddp) > 20
    assert ours == ddp


def test_rank_0_calls_all_hooks_in_fit(outcomes: dict[str, Outcome]) -> None:
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


def test_every_training_batch_is_some_rank_s(outcomes: dict[str, Outcome]) -> None:
    ranks = [calls(outcomes, rank, "fit") for rank in (0, 1)]
    ddp, ours = (sum(rank[at]["BoringModel.training_step"] for rank in ranks) for at in (0, 1))
    assert ours == ddp
