"""How pushes are merged is checked as early as it can be known, and what makes no sense is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_async_localsgd import AsyncLocalSGDStrategy, DelayedNesterov, ExchangeOptions, MergeOptions
from lightning_async_localsgd.lightning.data.batch_sizes import batch_tokens
from lightning_async_localsgd.outer import Buffer, HeLoCo, LookAhead, MomentumRestart
from lightning_async_localsgd.staleness import ExponentialCosine, Polynomial

TOKEN = "a secret of sufficient length"


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: MergeOptions(weights="tokens"), ValueError, "merge.weights='tokens'"),
        (lambda: MergeOptions(average="median"), ValueError, "merge.average='median'"),
        (lambda: MergeOptions(clip_norm=0.0), ValueError, "merge.clip_norm=0.0 .*None clips nothing"),
        (lambda: MergeOptions(clip_norm=True), ValueError, "merge.clip_norm=True"),
        (lambda: MergeOptions(clip_norm=float("nan")), ValueError, "merge.clip_norm=nan"),
        (lambda: MergeOptions(quorum_seconds=-1.0), ValueError, "merge.quorum_seconds=-1.0 .*None sets no limit"),
        (lambda: MergeOptions(quorum_seconds=float("inf")), ValueError, "merge.quorum_seconds=inf"),
        (lambda: AsyncLocalSGDStrategy(quorum=0), ValueError, "quorum=0"),
        (lambda: AsyncLocalSGDStrategy(quorum=-2), ValueError, "quorum=-2"),
        (lambda: AsyncLocalSGDStrategy(quorum=True), ValueError, "quorum=True"),
        (lambda: AsyncLocalSGDStrategy(quorum=2.0), ValueError, "quorum=2.0"),
        (lambda: AsyncLocalSGDStrategy(quorum="most"), ValueError, "quorum='most'.*'all'"),
        (lambda: AsyncLocalSGDStrategy(sync_warmup_steps=-1), ValueError, "sync_warmup_steps=-1"),
        (lambda: AsyncLocalSGDStrategy(sync_warmup_steps=0.5), ValueError, "sync_warmup_steps=0.5"),
        (lambda: AsyncLocalSGDStrategy(sync_warmup_steps=True), ValueError, "sync_warmup_steps=True"),
        (lambda: AsyncLocalSGDStrategy(sync_warmup_steps="long"), ValueError, "sync_warmup_steps='long'.*'auto'"),
        (lambda: AsyncLocalSGDStrategy(staleness="polynomial"), TypeError, "staleness='polynomial'.*Polynomial"),
        (lambda: AsyncLocalSGDStrategy(staleness=Polynomial), TypeError, "staleness=<class"),
        (lambda: AsyncLocalSGDStrategy(merge={"weights": "samples"}), TypeError, "merge={'weights'.*MergeOptions"),
    ],
)
def test_values_outside_their_range(make: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *[
            (
                {"quorum": 2, "outer_optimizer": outer_optimizer},
                ["quorum=2", type(outer_optimizer).__name__, "quorum=1", "Nesterov"],
            )
            for outer_optimizer in (DelayedNesterov(), Buffer(), MomentumRestart(DelayedNesterov(), every=3))
        ],
        ({"quorum": "all", "outer_optimizer": HeLoCo(DelayedNesterov())}, ["quorum='all'", "HeLoCo"]),
        ({"merge": MergeOptions(quorum_seconds=3.0)}, ["merge.quorum_seconds=3", "quorum=1"]),
        (
            {"sync_warmup_steps": 100, "merge": MergeOptions(quorum_seconds=30.0)},
            ["merge.quorum_seconds=30", "quorum=1"],
        ),
        ({"merge": MergeOptions(average="rda")}, ["merge.average='rda'", "quorum >= 2"]),
        ({"merge": MergeOptions(average="rda"), "sync_warmup_steps": 5}, ["merge.average='rda'", "DelayedNesterov"]),
        ({"quorum": "all", "grace": 2.0}, ["grace=2.0", "quorum='all'"]),
        ({"quorum": "all", "staleness": Polynomial()}, ["staleness=Polynomial", "quorum='all'", "leave it out"]),
        (
            {"merge": MergeOptions(clip_norm=3.0, max_update_norm=3)},
            ["merge.clip_norm=3", "max_update_norm=3", "smaller clip_norm"],
        ),
    ],
)
def test_options_that_make_no_sense_together(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        AsyncLocalSGDStrategy(**options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"quorum": "all"},
        {"quorum": "all", "grace": 0},
        {"quorum": "all", "outer_optimizer": torch.optim.SGD},
        {"quorum": 2, "outer_optimizer": LookAhead(lr=0.5)},
        {"quorum": 3, "merge": MergeOptions(average="rda", weights="tokens^2/steps", quorum_seconds=30.0)},
        {"quorum": "all", "staleness": Polynomial(), "merge": MergeOptions(quorum_seconds=30.0)},
        {"quorum": "all", "sync_warmup_steps": 10},
        {"sync_warmup_steps": "auto"},
        {"quorum": 2, "sync_warmup_steps": 100, "staleness": ExponentialCosine(0.1, 0.0), "grace": 3.0},
        {"merge": MergeOptions(weights="samples", clip_norm=1.0), "staleness": Polynomial()},
        {"merge": MergeOptions(weights="samples", clip_norm=3.0, max_update_norm=2.0)},
        {"merge": MergeOptions(clip_norm=1.0, max_update_norm=2.0)},
        # Batch sizes of single workers give pushes weights.
        {"merge": MergeOptions(clip_norm=3.0, max_update_norm=2.0), "batch_size": {1: 8}},
    ],
)
def test_options_that_do(options: dict[str, Any]) -> None:
    strategy = AsyncLocalSGDStrategy(**options)
    policy = strategy.merge_policy
    policy.check_workers(4, False, strategy.outer_optimizer, strategy.grace)
    for name, value in options.items():
        if name in ("quorum", "sync_warmup_steps", "staleness", "merge"):
            assert getattr(policy, {"merge": "options"}.get(name, name)) == value


def test_with_a_quorum_the_outer_optimizer_is_nesterov_unless_another_is_given() -> None:
    assert repr(AsyncLocalSGDStrategy(quorum="all").outer_optimizer) == "Nesterov(lr=0.7, momentum=0.9)"
    assert repr(AsyncLocalSGDStrategy(quorum=2).outer_optimizer) == "Nesterov(lr=0.7, momentum=0.9)"
    assert isinstance(AsyncLocalSGDStrategy(sync_warmup_steps=9).outer_optimizer, DelayedNesterov)


@pytest.mark.parametrize(
    ("workers", "options", "words"),
    [
        (3, {"quorum": 4}, ["quorum=4", "3 worker(s)", "'all'"]),
        (1, {"quorum": 2}, ["quorum=2", "1 worker(s)"]),
        (1, {"sync_warmup_steps": 10}, ["sync_warmup_steps=10", "sync_warmup_steps=0"]),
        (1, {"staleness": Polynomial()}, ["staleness=Polynomial", "single worker"]),
        (3, {"quorum": 3, "staleness": Polynomial()}, ["staleness=Polynomial", "quorum=3 of 3"]),
        (
            3,
            {"staleness": ExponentialCosine(0.1, 0.0), "outer_optimizer": torch.optim.SGD},
            ["staleness=ExponentialCosine", "outer_optimizer=", "momentum"],
        ),
        (
            3,
            {"staleness": ExponentialCosine(0.1, 0.0), "outer_optimizer": DelayedNesterov(momentum=0.0)},
            ["staleness=ExponentialCosine", "DelayedNesterov(lr=0.7, momentum=0.0", "momentum > 0"],
        ),
    ],
)
def test_options_that_do_not_fit_the_number_of_workers_are_refused(
    workers: int, options: dict[str, Any], words: list[str]
) -> None:
    strategy = AsyncLocalSGDStrategy(**options)
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        strategy.merge_policy.check_workers(workers, False, strategy.outer_optimizer, strategy.grace)
    for word in words:
        assert word in str(caught.value)


def test_quorum_is_checked_when_the_trainer_is_made_unless_workers_may_join() -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    with pytest.raises(ValueError, match=r"quorum=4 .*3 worker"):
        L.Trainer(strategy=AsyncLocalSGDStrategy(quorum=4), devices=3, **quiet)
    with pytest.raises(ValueError, match=r"staleness=.*single worker"):
        L.Trainer(strategy=AsyncLocalSGDStrategy(staleness=Polynomial()), devices=1, **quiet)
    L.Trainer(
        strategy=AsyncLocalSGDStrategy(staleness=Polynomial(), exchange=ExchangeOptions(token=TOKEN)),
        devices=1,
        **quiet,
    )


def test_single_worker_may_use_a_quorum_of_all() -> None:
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        strategy=AsyncLocalSGDStrategy(local_steps=3, quorum="all", merge=MergeOptions(clip_norm=1e-3)),
        accelerator="cpu", devices=1, max_steps=9, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    module = BoringModel()
    before = torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    trainer.fit(module)
    # Three rounds, each at most so long; the momentum adds to the first ones.
    moved = float((torch.nn.utils.parameters_to_vector(module.parameters()).detach() - before).norm())
    assert 0 < moved <= 1.001e-3 * 0.7 * (1.9 + 2.71 + 3.44)


@pytest.mark.parametrize(
    ("batch", "tokens"),
    [
        (torch.zeros(4, 16, dtype=torch.long), 64),
        ({"weights": torch.zeros(4, 16), "ids": torch.zeros(4, 8, dtype=torch.int32)}, 32),
        ([torch.zeros(4, 16), torch.zeros(4, dtype=torch.long)], 4),
        ((torch.zeros(4, 16, dtype=torch.bool), [torch.zeros(4, 3, dtype=torch.uint8)]), 12),
        (torch.zeros(5, 16), 5),
        ("text", 1),
    ],
)
def test_tokens_of_a_batch(batch: Any, tokens: int) -> None:
    assert batch_tokens(batch) == tokens
