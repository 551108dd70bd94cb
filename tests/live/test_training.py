"""Whole runs of unequal ranks in real processes: budget, identical weights, who validates, what is logged."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from tests.live.conftest import Outcome, run_all
from tests.live.job import Regression, dataset

Job = Callable[..., Outcome]
Outcomes = dict[str, Outcome]

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "manual": {"manual": True, "cosine": True},
    "accumulate": {"trainer": {"max_steps": 30, "accumulate_grad_batches": 2}},
    "bf16-true": {"trainer": {"max_steps": 30, "precision": "bf16-true"}},
    "no-grace-no-dylu": {"strategy": {"grace": 0.0, "dynamic_local_steps": False}},
    "grace-seconds": {"strategy": {"grace": 0.5}},
}

STOPPED = {"at_step": 12, "fate": "stop", "trainer": {"max_steps": 100_000}}


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Runs of two ranks that are started with ``fork``."""
    runs = {**KINDS, **{f"stopped by {victim}": {"victim": victim, **STOPPED} for victim in (0, 1)}}
    out = tmp_path_factory.mktemp("forked")
    return run_all(out, {name: {"ranks": 2, "start_method": "fork", **options} for name, options in runs.items()})


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Runs of two ranks whose second one is started as a script."""
    runs: dict[str, dict[str, Any]] = {
        "tcp": {"exchange": {"transport": "tcp"}},
        "encrypted": {"exchange": {"transport": "tcp", "encrypt": True}},
        "epochs": {"trainer": {"max_epochs": 3}, "num_workers": 1},
        "checkpoints": {"local_steps": 5},
    }
    return run_all(tmp_path_factory.mktemp("launched"), {name: {"ranks": 2, **runs[name]} for name in runs})


def assert_all_hold_the_same_final_model(outcome: Outcome, ranks: int) -> None:
    assert len(outcome.ranks) == ranks
    assert len({rank["digest"] for rank in outcome.ranks}) == 1


def assert_budget_met(outcome: Outcome, steps: int) -> None:
    assert sum(worker["steps"] for worker in outcome.summary["workers"]) == steps
    assert outcome.summary["budget"] == steps
    assert sum(rank["steps"] for rank in outcome.ranks) == steps
    assert {rank["global_step"] for rank in outcome.ranks} == {steps // len(outcome.ranks)}


def logged(outcome: Outcome) -> dict[str, list[float]]:
    columns: dict[str, list[float]] = {}
    with (outcome.out / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value:
                    columns.setdefault(name, []).append(float(value))
    return columns


def test_four_unequal_ranks_train_one_model(job: Job) -> None:
    outcome = job(ranks=4, trainer={"max_steps": 100}, val_check_interval=50, evaluate=True)
    assert_all_hold_the_same_final_model(outcome, 4)
    assert_budget_met(outcome, 400)
    ranks = outcome.ranks

    # The fast rank did far more than a quarter, the slow one far less, and Lightning's own limit held nobody.
    assert ranks[0]["steps"] > 110 > 60 > ranks[3]["steps"] > 0

    # No process group while training; real collectives afterwards, with the same outcome on every rank.
    assert not any(flag for rank in ranks for flag in rank["group"])
    for rank in ranks:
        assert rank["validate"] == ranks[0]["validate"]
        assert rank["validate"]["ranks"] == pytest.approx(1.5), "the mean over ranks 0 to 3"
        assert rank["test"] == ranks[0]["test"]
        assert rank["best"] == ranks[0]["best"] != ""
        assert not rank["group_after"]

    # Rank 0 alone validated, at the end the very model that all hold.
    assert ranks[0]["validated"]
    assert not any(rank["validated"] for rank in ranks[1:])
    assert ranks[0]["validated"][-1] == ranks[0]["digest"]

    # The schedule follows the data: it ends at the same rate on every rank, however few steps that rank took.
    assert len({rank["rates"][-1] for rank in ranks}) == 1
    assert ranks[0]["rates"][-1] < 1e-4 < 0.009 < max(ranks[3]["rates"])

    # Threads and sockets are gone with the run.
    # The job's ledger is closed when the trainer is torn down, after what was noted here.
    left = {name for rank in ranks for name in rank["threads"]} - {"async_localsgd-ledger"}
    assert not any(name.startswith("async_localsgd") for name in left)

    columns = logged(outcome)
    for name in ("staleness", "local_steps", "wait_seconds", "exchange_seconds", "steps_per_second"):
        assert f"async/{name}" in columns
        assert all(f"async/{name}/worker_{n}" in columns for n in range(4)), name
    for name in ("version", "update_norm", "momentum_cosine", "alive_workers", "merging_workers", "refused_pushes"):
        assert f"async/{name}" in columns
    assert columns["async/alive_workers"][-1] == 4
    assert columns["async/version"] == sorted(columns["async/version"])
    assert columns["async/bytes_sent"][-1] > 0 < columns["async/bytes_received"][-1]
    steps = [worker["mean_local_steps"] for worker in outcome.summary["workers"]]
    assert steps[0] > steps[3], "slower workers take fewer steps a round"


def test_ranks_that_are_spawned(job: Job) -> None:
    outcome = job(ranks=2, start_method="spawn")
    assert_all_hold_the_same_final_model(outcome, 2)
    assert_budget_met(outcome, 120)


@pytest.mark.parametrize("name", ["tcp", "encrypted"])
def test_over_the_network(launched: Outcomes, name: str) -> None:
    outcome = launched[name]
    assert_all_hold_the_same_final_model(outcome, 2)
    assert_budget_met(outcome, 120)


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_runs(forked: Outcomes, name: str) -> None:
    outcome, options = forked[name], KINDS[name]
    assert_all_hold_the_same_final_model(outcome, 2)
    assert_budget_met(outcome, 2 * options.get("trainer", {"max_steps": 60})["max_steps"])
    if options.get("strategy", {}).get("dynamic_local_steps") is False:
        assert all(worker["mean_local_steps"] > 8 for worker in outcome.summary["workers"])


def test_epochs_count_over_all_workers(launched: Outcomes) -> None:
    outcome = launched["epochs"]
    assert_all_hold_the_same_final_model(outcome, 2)
    assert_budget_met(outcome, 3 * 640 // 16)


@pytest.mark.parametrize("victim", [0, 1])
def test_stop_on_any_rank_ends_all(forked: Outcomes, victim: int) -> None:
    outcome = forked[f"stopped by {victim}"]
    assert_all_hold_the_same_final_model(outcome, 2)
    assert 12 <= sum(rank["steps"] for rank in outcome.ranks) < 1000
    assert sum(worker["steps"] for worker in outcome.summary["workers"]) == sum(r["steps"] for r in outcome.ranks)


def test_checkpoints_hold_the_global_model_and_the_server(launched: Outcomes, tmp_path: Path) -> None:
    outcome = launched["checkpoints"]
    for path in (outcome.out / "checkpoints" / "last.ckpt", outcome.out / "after.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        server = checkpoint["async_localsgd"]
        assert server["model"]["rule"] == "DelayedNesterov"
        assert set(server["model"]["outer"]["momentum"]) >= {"net.0.weight", "net.3.bias"}
        assert 0 < server["budget"]["done"] <= 120
        assert sum(worker["steps"] for worker in server["workers"].values()) == server["budget"]["done"]
        assert sum(worker["rounds"] for worker in server["workers"].values()) == server["model"]["version"]
        plain = Regression.load_from_checkpoint(path)
        assert torch.equal(plain.net[0].weight, checkpoint["state_dict"]["net.0.weight"])
    checkpoint = torch.load(outcome.out / "after.ckpt", weights_only=True)
    assert checkpoint["async_localsgd"]["budget"]["done"] == 120
    after = checkpoint["state_dict"]

    # A plain single-device Trainer goes on from it.
    module = Regression()
    loader = torch.utils.data.DataLoader(dataset(64), batch_size=16)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=200, max_epochs=-1, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.validate(module, loader, ckpt_path=outcome.out / "after.ckpt", verbose=False)
    assert torch.equal(module.net[0].weight, after["net.0.weight"])


def test_a_run_goes_on_from_its_checkpoint(job: Job) -> None:
    first = job(ranks=2, trainer={"max_steps": 40}, cosine=True, local_steps=5)
    versions = first.summary["version"]
    # By its own count rank 0, if it was the faster one, has reached the new limit; what counts is the budget of all.
    limit = max(41, first.rank(0)["steps"])
    again = {"start_method": "fork", "cosine": True, "ckpt_path": str(first.out / "after.ckpt")}
    second = job(ranks=2, trainer={"max_steps": limit}, **again)
    assert second.summary["version"] > versions
    assert sum(worker["steps"] for worker in second.summary["workers"]) == 2 * limit
    assert_all_hold_the_same_final_model(second, 2)
    # With another number of workers what is done stays the same share of the run.
    third = job(ranks=3, trainer={"max_steps": limit}, **again)
    assert sum(worker["steps"] for worker in third.summary["workers"]) - 80 == 3 * limit - 3 * 40
    # The schedule goes on, too: nobody begins anew.
    assert all(rate < 0.5e-2 for rank in second.ranks for rate in rank["rates"][:1])
