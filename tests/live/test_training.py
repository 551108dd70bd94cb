"""Complete runs of ranks of unequal speed: budget, final model, validation, logs, checkpoints."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_async_localsgd.server.event_file import read_pushes
from tests.lightning_models import loader, quiet_trainer
from tests.live.conftest import Outcome, run_all
from tests.live.job import Model

Job = Callable[..., Outcome]
Outcomes = dict[str, Outcome]

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "manual": {"manual": True, "cosine": True},
    "accumulate": {"trainer": {"max_steps": 30, "accumulate_grad_batches": 2}},
    "bf16-true": {"trainer": {"max_steps": 30, "precision": "bf16-true"}},
    "no-grace-no-dylu": {"strategy": {"grace": 0.0, "dynamic_local_steps": False}},
    "grace-seconds": {"strategy": {"grace": 0.5}},
    "overlap": {"exchange": {"overlap": True}},
    "overlap-short": {"exchange": {"overlap": True}, "local_steps": 1},
}

STOPPED = {"at_step": 12, "fate": "stop", "trainer": {"max_steps": 100_000}}


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Run two ranks that are forked."""
    runs = {**KINDS, **{f"stopped by {victim}": {"victim": victim, **STOPPED} for victim in (0, 1)}}
    out = tmp_path_factory.mktemp("forked")
    return run_all(out, {name: {"ranks": 2, "start_method": "fork", **options} for name, options in runs.items()})


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Run two ranks, the second of which is launched as a script."""
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

    # The fast rank took far more than a quarter of the steps, the slow rank far less. No rank ended at max_steps.
    assert ranks[0]["steps"] > 110 > 60 > ranks[3]["steps"] > 0

    # There is no process group in training. Afterwards, collectives are real, and all ranks have the same results.
    assert not any(flag for rank in ranks for flag in rank["group"])
    for rank in ranks:
        assert rank["validate"] == ranks[0]["validate"]
        assert rank["validate"]["ranks"] == pytest.approx(1.5), "the mean over ranks 0 to 3"
        assert rank["test"] == ranks[0]["test"]
        assert rank["best"] == ranks[0]["best"] != ""
        assert not rank["group_after"]

    # Only rank 0 validated. Its last validation was that of the final model.
    assert ranks[0]["validated"]
    assert not any(rank["validated"] for rank in ranks[1:])
    assert ranks[0]["validated"][-1] == ranks[0]["digest"]

    # The schedule follows the progress of the run. It ends at the same rate on all ranks, whatever their steps.
    assert len({rank["rates"][-1] for rank in ranks}) == 1
    assert ranks[0]["rates"][-1] < 1e-4 < 0.009 < max(ranks[3]["rates"])

    # All threads have ended, except that of the event file, which is closed at teardown, after the notes were made.
    left = {name for rank in ranks for name in rank["threads"]} - {"async_localsgd-events"}
    assert not any(name.startswith("async_localsgd") for name in left)

    columns = logged(outcome)
    for name in ("staleness", "local_steps", "wait_seconds", "exchange_seconds", "steps_per_second"):
        assert f"async/{name}/mean" in columns
        assert all(f"async/{name}/worker_{n}" in columns for n in range(4)), name
    of_run = ("version", "update_norm", "momentum_cosine", "alive_workers", "merging_workers", "refused_pushes/total")
    for name in of_run:
        assert f"async/{name}" in columns
    assert columns["async/alive_workers"][-1] == 4
    assert columns["async/version"] == sorted(columns["async/version"])
    assert columns["async/bytes_sent"][-1] > 0 < columns["async/bytes_received"][-1]
    steps = [worker["mean_local_steps"] for worker in outcome.summary["workers"]]
    assert steps[0] > steps[3], "rounds of slower workers have fewer steps"


def test_spawned_ranks_meet_the_budget_with_one_model(job: Job) -> None:
    outcome = job(ranks=2, start_method="spawn")
    assert_all_hold_the_same_final_model(outcome, 2)
    assert_budget_met(outcome, 120)


@pytest.mark.parametrize("name", ["tcp", "encrypted"])
def test_ranks_that_use_tcp_meet_the_budget_with_one_model(launched: Outcomes, name: str) -> None:
    outcome = launched[name]
    assert_all_hold_the_same_final_model(outcome, 2)
    assert_budget_met(outcome, 120)


@pytest.mark.parametrize("name", KINDS)
def test_run_with_options_meets_the_budget_with_one_model(forked: Outcomes, name: str) -> None:
    outcome, options = forked[name], KINDS[name]
    assert_all_hold_the_same_final_model(outcome, 2)
    assert_budget_met(outcome, 2 * options.get("trainer", {"max_steps": 60})["max_steps"])
    if options.get("strategy", {}).get("dynamic_local_steps") is False:
        pushes = read_pushes(outcome.out / "events.jsonl")
        for worker in (0, 1):  # Rounds before a validation, and the last ones, may be shorter.
            assert next(push["steps"] for push in pushes if push["worker"] == worker) == 10


def test_epochs_are_counted_over_all_workers(launched: Outcomes) -> None:
    outcome = launched["epochs"]
    assert_all_hold_the_same_final_model(outcome, 2)
    assert_budget_met(outcome, 3 * 640 // 16)


@pytest.mark.parametrize("victim", [0, 1])
def test_stop_on_any_rank_ends_all_ranks(forked: Outcomes, victim: int) -> None:
    outcome = forked[f"stopped by {victim}"]
    assert_all_hold_the_same_final_model(outcome, 2)
    assert 12 <= sum(rank["steps"] for rank in outcome.ranks) < 1000
    assert sum(worker["steps"] for worker in outcome.summary["workers"]) == sum(r["steps"] for r in outcome.ranks)


def test_checkpoints_hold_the_global_model_and_the_server(launched: Outcomes, tmp_path: Path) -> None:
    outcome = launched["checkpoints"]
    for path in (outcome.out / "checkpoints" / "last.ckpt", outcome.out / "after.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        server = checkpoint["async_localsgd"]
        assert server["model"]["outer_optimizer"] == "DelayedNesterov"
        assert set(server["model"]["outer"]["momentum"]) >= {"net.0.weight", "net.3.bias"}
        assert 0 < server["budget"]["done"] <= 120
        assert sum(worker["steps"] for worker in server["workers"].values()) == server["budget"]["done"]
        assert sum(worker["rounds"] for worker in server["workers"].values()) == server["model"]["version"]
        plain = Model.load_from_checkpoint(path)
        assert torch.equal(plain.net[0].weight, checkpoint["state_dict"]["net.0.weight"])
    checkpoint = torch.load(outcome.out / "after.ckpt", weights_only=True)
    assert checkpoint["async_localsgd"]["budget"]["done"] == 120
    after = checkpoint["state_dict"]

    # A Trainer on a single device loads it.
    module = Model()
    trainer = quiet_trainer("auto", default_root_dir=tmp_path)
    trainer.validate(module, loader(64, shuffle=False), ckpt_path=outcome.out / "after.ckpt", verbose=False)
    assert torch.equal(module.net[0].weight, after["net.0.weight"])


def test_run_resumes_from_its_checkpoint_with_other_limits_and_ranks(job: Job) -> None:
    first = job(ranks=2, trainer={"max_steps": 40}, cosine=True, local_steps=5)
    versions = first.summary["version"]
    # Rank 0 alone may have taken as many steps as the new limit already. The limit is for all ranks together.
    limit = max(41, first.rank(0)["steps"])
    again = {"start_method": "fork", "cosine": True, "ckpt_path": str(first.out / "after.ckpt")}
    second = job(ranks=2, trainer={"max_steps": limit}, **again)
    assert second.summary["version"] > versions
    assert sum(worker["steps"] for worker in second.summary["workers"]) == 2 * limit
    assert_all_hold_the_same_final_model(second, 2)
    # With another number of workers, the relative progress stays the same.
    third = job(ranks=3, trainer={"max_steps": limit}, **again)
    assert sum(worker["steps"] for worker in third.summary["workers"]) - 80 == 3 * limit - 3 * 40
    # The schedule continues instead of starting again.
    assert all(rate < 0.5e-2 for rank in second.ranks for rate in rank["rates"][:1])
