"""What others have reported as broken in Lightning's tracker about resuming, saving and sampling: right here.

The numbers in docstrings are those of the reports.
"""

from __future__ import annotations

import csv
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lightning_contract import continuing_job as job
from tests.processes import Outcome, jobs

Ranks = list[dict[str, Any]]
EPOCH_STEPS = job.SAMPLES // job.BATCH // 2
"""Optimizer steps of an epoch that each of two ranks would take under DDP."""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    out = tmp_path_factory.mktemp("continuing")
    with jobs() as started:
        text = started.run(job.__file__, out, timeout=240)
    return Outcome(0, text, out)


def seen(ranks: Ranks, *names: str) -> list[list[Any]]:
    """Return the notes of all batches of both ranks."""
    for name in names:
        ranks = [rank[name] for rank in ranks]
    return [batch for rank in ranks for batch in rank["seen"]]


def case(outcome: Outcome, name: str) -> Ranks:
    return [rank[name] for rank in outcome.ranks]


def batches_of(batches: list[list[Any]], epoch: int) -> list[tuple[float, ...]]:
    return sorted(tuple(batch[3]) for batch in batches if batch[0] == epoch)


def saved(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def test_run_resumed_within_an_epoch_goes_on_where_it_was(outcome: Outcome) -> None:
    """Lightning #19367, #19815, #8828: batch indices, steps and data, with several batches in an optimizer step."""
    ranks = case(outcome, "within_an_epoch")
    checkpoint = saved(outcome.out / "within_an_epoch" / "whole" / "step=3.ckpt")
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    first = ranks[0]["resumed"]["seen"][0]
    assert first[:3] == [0, progress["processed"], 3]
    steps = [batch[2] for batch in ranks[0]["resumed"]["seen"]]
    assert steps == sorted(steps)
    # All data of the epoch that no merged round has used, and nothing else.
    left = sum(stop - start for _, start, stop in checkpoint["async_localsgd"]["leases"]["0"]["free"])
    batches = seen(ranks, "resumed")
    for epoch, count in ((0, left), (1, job.SAMPLES // job.BATCH)):
        assert len(set(batches_of(batches, epoch))) == len(batches_of(batches, epoch)) == count
    for rank in ranks:
        assert rank["resumed"]["global_step"] == rank["whole"]["global_step"] == EPOCH_STEPS


def test_validation_has_the_same_batches_after_a_resume(outcome: Outcome) -> None:
    """Lightning #14579."""
    main, other = case(outcome, "within_an_epoch")
    order = [[float(n), float(n + 1)] for n in range(0, 8, job.BATCH)]
    for run in ("whole", "resumed"):
        found = main[run]["validated"]
        assert found == order * (len(found) // len(order))
        assert found
        assert other[run]["validated"] == []


def test_schedule_is_at_the_global_step_in_every_batch_of_a_resumed_run(outcome: Outcome) -> None:
    """Lightning #14699, #12894: with several batches in an optimizer step."""
    for run in ("whole", "resumed"):
        for _, _, global_step, _, steps_of_schedule in seen(case(outcome, "within_an_epoch"), run):
            assert steps_of_schedule == global_step


def test_last_and_best_have_the_same_names_after_each_resume(outcome: Outcome) -> None:
    """Lightning #18931: no ``-v1``."""
    for rank in case(outcome, "last"):
        for number, fit in enumerate(rank["fits"]):
            assert fit["files"] == ["epoch=0.ckpt", "last.ckpt"]
            assert fit["paths"] == ["epoch=0.ckpt", "last.ckpt"]
            assert {batch[0] for batch in fit["seen"]} == {number}
            assert fit["global_step"] == (number + 1) * EPOCH_STEPS


def test_files_that_are_written_later_are_complete_and_only_the_kept_ones_are_left(outcome: Outcome) -> None:
    """Lightning #19045."""
    main, other = case(outcome, "best_written_later")
    assert len(main["best"]) == 2
    assert main["best"] == other["best"]
    kept = outcome.out / "best_written_later" / "kept"
    assert sorted(path.name for path in kept.iterdir()) == ["last.ckpt", *main["best"]]
    for path in kept.iterdir():
        assert "async_localsgd" in saved(path)
    assert saved(kept / main["best"][-1])["global_step"] == EPOCH_STEPS


def test_global_step_counts_the_steps_of_both_optimizers(outcome: Outcome) -> None:
    """Lightning #17958: as with DDP."""
    assert [rank["global_step"] for rank in case(outcome, "two_optimizers")] == [4 * EPOCH_STEPS] * 2
    found = list((outcome.out / "two_optimizers" / "kept").iterdir())
    steps = sorted(saved(path)["global_step"] for path in found)
    assert sorted(path.name for path in found) == sorted(f"step={step}.ckpt" for step in steps)
    # One in each interval of eight. Steps of another rank may have arrived at the same time as the eighth.
    intervals = [step // 8 for step in steps]
    assert intervals == sorted(set(intervals))
    assert max(intervals) == 4 * EPOCH_STEPS // 8


def test_epoch_means_count_each_batch_once_whatever_the_shares_of_the_ranks(outcome: Outcome) -> None:
    """Lightning #21838."""
    ranks = case(outcome, "epoch_means")
    assert len(ranks[0]["seen"]) != len(ranks[1]["seen"])
    with (outcome.out / "epoch_means" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["samples"]]
    samples = [float(row["samples"]) for row in rows]
    assert sum(samples) == 3 * job.SAMPLES
    total = sum(float(row["number"]) * count for row, count in zip(rows, samples, strict=True))
    assert total == pytest.approx(3 * sum(range(job.SAMPLES)))


def test_sampler_is_told_the_epoch_also_after_a_resume(outcome: Outcome) -> None:
    """Lightning #21454, and with a loader process the first epoch after a resume."""
    ordered = {epoch: list(map(float, job.order_of(epoch))) for epoch in range(3)}
    batches = {
        epoch: [tuple(order[at : at + job.BATCH]) for at in range(0, job.SAMPLES, job.BATCH)]
        for epoch, order in ordered.items()
    }
    whole, resumed = (seen(case(outcome, "set_epoch"), run) for run in ("whole", "resumed"))
    for epoch in range(3):
        assert batches_of(whole, epoch) == sorted(batches[epoch])
    # Batches of the first epoch that another worker had not pushed when rank 0's epoch ended come first.
    leases = saved(outcome.out / "set_epoch" / "whole" / "epoch=0.ckpt")["async_localsgd"]["leases"]["0"]
    left = [batches[epoch][number] for epoch, start, stop in leases["free"] for number in range(start, stop)]
    assert {batch[0] for batch in resumed} == {1, 2}
    assert sorted(tuple(batch[3]) for batch in resumed) == sorted([*left, *batches[1], *batches[2]])


@pytest.mark.parametrize("sampler", ["batches of batches", "groups"])
def test_batch_samplers_of_any_class_are_shared(outcome: Outcome, sampler: str) -> None:
    """Lightning #20272, #21122: DDP refuses both."""
    batches = seen(case(outcome, "batch_samplers"), sampler)
    size = 4 if sampler == "batches of batches" else 2
    for epoch in (0, 1):
        found = batches_of(batches, epoch)
        assert {len(batch) for batch in found} == {size}
        assert list(chain.from_iterable(found)) == list(map(float, range(job.SAMPLES)))
