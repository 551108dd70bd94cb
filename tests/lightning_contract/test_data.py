"""Leases of training data: ranks of any speed together use each sample once an epoch."""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_async_localsgd.lightning.data.sampling import EpochOrder
from tests.processes import Jobs, jobs

JOB = Path(__file__).with_name("data_job.py")
Ranks = list[dict[str, Any]]
MIDDLE: list[Path] = []
"""The checkpoint of the case "saved"."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ranks]:
    """Run all cases and return the notes of both ranks by case. A batch of rank 1 takes five times as long."""
    folder = tmp_path_factory.mktemp("data")
    with jobs() as started:
        started.run(JOB, folder, "{}", timeout=240)
    MIDDLE[:] = [folder / "middle.ckpt"]
    cases: dict[str, Ranks] = {}
    for path in sorted(folder.glob("*.json")):
        cases.setdefault(path.stem[:-2], []).append(json.loads(path.read_text()))
    return cases


def epochs(ranks: Ranks) -> list[list[list[Any]]]:
    """Return the batches of all ranks, by epoch."""
    count = max(len(rank["seen"]) for rank in ranks)
    return [[batch for rank in ranks for batch in (rank["seen"][n : n + 1] or [[]])[0]] for n in range(count)]


def samples(batches: list[list[float]]) -> list[float]:
    return sorted(chain.from_iterable(batches))


@pytest.mark.parametrize("case", ["shuffled", "workers"])
def test_each_sample_is_used_once_an_epoch(seen: dict[str, Ranks], case: str) -> None:
    for batches in epochs(seen[case]):
        assert samples(batches) == list(range(103))
        # 103 samples in batches of four: one batch is short, not one on each rank.
        assert sorted(map(len, batches)) == [3] + [4] * 25


@pytest.mark.parametrize("case", ["drop_last", "persistent"])
def test_drop_last_drops_one_batch_not_one_per_rank(seen: dict[str, Ranks], case: str) -> None:
    for batches in epochs(seen[case]):
        used = samples(batches)
        assert [len(batch) for batch in batches] == [4] * 25
        assert len(set(used)) == len(used) == 100


def test_leases_of_a_dead_worker_go_to_the_others(started: Jobs, tmp_path: Path) -> None:
    started.run(JOB, tmp_path, json.dumps({"cases": ["long"], "dies_at": 7}))
    mine = json.loads((tmp_path / "long_0.json").read_text())["seen"]
    theirs = [*chain.from_iterable(json.loads((tmp_path / "dead_1.json").read_text())["seen"])]
    worker = json.loads((tmp_path / "async_localsgd_summary.json").read_text())["workers"][1]
    # Only batches of rounds that the dead worker has pushed count. Later ones, some of them loaded already, do not.
    assert 0 < worker["steps"] < 7
    counted = [*chain.from_iterable(mine), *theirs[: worker["steps"]]]
    assert sorted(chain.from_iterable(counted)) == sorted(list(range(103)) * 6)


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("one_batch", "2 ranks cannot share the training data, because an epoch has only one batch"),
        (
            "one_step",
            "has only 3 batches for all of them together, which is one local step with accumulate_grad_batches=3",
        ),
    ],
)
def test_epoch_of_one_local_step_is_rejected(started: Jobs, tmp_path: Path, case: str, named: str) -> None:
    code, text = started.finish(started.start([sys.executable, JOB, tmp_path, json.dumps({"cases": [case]})]))
    assert code == 1
    assert named in text
    assert "use a smaller batch_size" in text


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.usefixtures("seen")
def test_run_resumed_within_an_epoch_does_not_repeat_pushed_data(started: Jobs, tmp_path: Path, workers: int) -> None:
    saved = torch.load(MIDDLE[0], weights_only=True)
    free = saved["async_localsgd"]["leases"]["0"]["free"]
    left = [number for epoch, start, stop in free for number in range(start, stop)]
    assert {epoch for epoch, _, _ in free} == {0}
    assert 0 < len(left) < 26
    started.run(JOB, tmp_path, json.dumps({"cases": ["saved"], "ckpt_path": str(MIDDLE[0]), "devices": workers}))
    ranks = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("saved_*.json"))]
    assert len(ranks) == workers
    first, second = epochs(ranks)
    order = EpochOrder(DataLoader(range(103), batch_size=4, shuffle=True), seed=7, single_worker=False)  # type: ignore[arg-type]
    assert sorted(map(tuple, first)) == sorted(tuple(map(float, order.item(0, number))) for number in left)
    assert samples(second) == list(range(103))


def test_fast_rank_takes_more_batches(seen: dict[str, Ranks]) -> None:
    for case in ("shuffled", "workers", "by_steps"):
        fast, slow = (sum(map(len, rank["seen"])) for rank in seen[case])
        assert fast > slow


def test_order_depends_only_on_seed_and_epoch(seen: dict[str, Ranks]) -> None:
    def set_of(batches: list[list[float]]) -> set[tuple[float, ...]]:
        return {tuple(batch) for batch in batches}

    first, second, third = (set_of(batches) for batches in epochs(seen["shuffled"]))
    # Neither the shares of the ranks nor the number of loading processes changes the batches.
    assert set_of(epochs(seen["shuffled_again"])[0]) == first
    assert [set_of(batches) for batches in epochs(seen["workers"])] == [first, second]
    assert not first & second
    assert not second & third


def test_data_that_is_not_shuffled_stays_in_order(seen: dict[str, Ranks]) -> None:
    (batches,) = epochs(seen["in_order"])
    assert sorted(batches) == [[float(n), float(n + 1)] for n in range(0, 40, 2)]
    for rank in seen["in_order"]:
        assert rank["seen"][0] == sorted(rank["seen"][0])


def test_unbatched_samples_are_used_once_an_epoch(seen: dict[str, Ranks]) -> None:
    for numbers in epochs(seen["unbatched"]):
        assert sorted(numbers) == list(range(31))


def test_samplers_of_the_user_are_wrapped(seen: dict[str, Ranks]) -> None:
    (batches,) = epochs(seen["own_sampler"])
    assert sorted(batches) == [[float(n + 1), float(n)] for n in range(0, 40, 2)]
    for batches in epochs(seen["own_batch_sampler"]):
        assert sorted(batches) == [[float(n), float(39 - n)] for n in range(20)]
    (batches,) = epochs(seen["weighted"])
    # All ranks share one sequence of draws with replacement.
    assert len(samples(batches)) == 60
    assert max(Counter(samples(batches)).values()) > 1


def test_limits_of_batches_hold_for_all_ranks_together(seen: dict[str, Ranks]) -> None:
    for case, batches_of_epoch in (("limited", 10), ("limited_share", 12), ("overfit", 6), ("fast_dev_run", 6)):
        for batches in epochs(seen[case]):
            used = samples(batches)
            assert len(batches) == batches_of_epoch
            assert len(set(used)) == len(used)
    first, second = epochs(seen["overfit"])
    assert samples(first) == samples(second) == list(range(24))


def test_windows_of_accumulated_batches_are_whole(seen: dict[str, Ranks]) -> None:
    for batches in epochs(seen["accumulated"]):
        assert samples(batches) == list(range(98))
    # 25 batches in windows of three: at most one window is short, not one on each rank.
    for epoch in range(2):
        assert sum(len(rank["seen"][epoch]) % 3 != 0 for rank in seen["accumulated"]) <= 1


def test_combined_loader_that_ends_an_epoch_is_used_completely(seen: dict[str, Ranks]) -> None:
    for batches in epochs(seen["cycled"]):
        assert samples([batch["long"] for batch in batches]) == list(range(60))
        assert all(len(batch["short"]) == 2 for batch in batches)
    for batches in epochs(seen["shortest"]):
        assert samples([batch["short"] for batch in batches]) == list(range(20))
        used = samples([batch["long"] for batch in batches])
        assert len(set(used)) == len(used) == 20


def test_data_that_is_not_leased_stays_unchanged(seen: dict[str, Ranks]) -> None:
    for rank in seen["left_alone"]:
        first = rank["seen"][0]
        assert first == [[float(2 * n), float(2 * n + 1)] for n in range(len(first))]
    for rank in seen["stream"]:
        assert rank["seen"][0][0] == [0.0, 1.0, 2.0, 3.0]


def test_warning_if_all_ranks_have_the_same_samples(seen: dict[str, Ranks]) -> None:
    def warned(case: str) -> bool:
        return any("began with the same samples" in text for text in seen[case][0]["warnings"])

    assert warned("stream")
    assert warned("left_alone")
    assert not warned("shuffled")
    assert not any("same samples" in text for case in seen.values() for text in case[1]["warnings"])


def test_stream_that_is_split_by_rank_has_no_duplicates(seen: dict[str, Ranks]) -> None:
    mine, others = (
        {number for epoch in rank["seen"] for batch in epoch for number in batch} for rank in seen["streamed"]
    )
    assert mine
    assert others
    assert not mine & others
    # The fast rank has used all of its shards, which are half of the stream, and has started again.
    assert len(mine) == 48
    assert len(seen["streamed"][0]["epochs"]) > 1
    assert not any("same samples" in text for text in seen["streamed"][0]["warnings"])


def test_steps_and_epochs_are_those_of_ddp(seen: dict[str, Ranks]) -> None:
    for case, steps in (("shuffled", 39), ("drop_last", 26), ("limited", 10), ("accumulated", 10), ("by_steps", 30)):
        assert [rank["global_step"] for rank in seen[case]] == [steps] * 2
    for case, count in (("shuffled", 3), ("drop_last", 2), ("limited", 2), ("reloaded", 3)):
        for rank in seen[case]:
            assert rank["epochs"] == list(range(count))
            assert rank["current_epoch"] == count
    assert sum(sum(map(len, rank["seen"])) for rank in seen["by_steps"]) == 60


def test_hooks_of_a_data_module_are_called_like_with_ddp(seen: dict[str, Ranks]) -> None:
    main, other = (rank["hooks"] for rank in seen["reloaded"])
    loading = ["setup fit", "train_dataloader", "train_dataloader", "train_dataloader", "teardown fit"]
    assert main == ["prepare_data", *loading]
    assert other == loading
    # Each epoch has another dataset.
    for number, batches in enumerate(epochs(seen["reloaded"])):
        assert samples(batches) == list(range(100 * number, 100 * number + 20))
