"""Lightning's callbacks, loggers and profilers, with two ranks of unequal speed."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_async_localsgd.lightning.callback import format_table
from lightning_async_localsgd.server.event_file import read_pushes
from tests.lightning_contract import callbacks_job
from tests.lightning_models import quiet_trainer
from tests.processes import Outcome, jobs

NAMES = [name for name in callbacks_job.RUNS if not name.startswith("failing")]


def run(out: Path, *names: str) -> Outcome:
    """Run some of the job's runs."""
    with jobs() as started:
        code, text = started.finish(started.start([sys.executable, callbacks_job.__file__, out, *names]), timeout=280)
    return Outcome(code, text, out)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    """Run all runs that do not fail."""
    found = run(tmp_path_factory.mktemp("callbacks"), *NAMES)
    if found.code != 0:
        pytest.fail(f"the job ended with {found.code}:\n{found.text[-6000:]}")
    return found


def noted(outcome: Outcome, name: str) -> list[dict[str, Any]]:
    return [rank[name] for rank in outcome.ranks]


@pytest.mark.parametrize("name", NAMES)
def test_all_ranks_finish_with_one_model(outcome: Outcome, name: str) -> None:
    ranks = noted(outcome, name)
    assert len(ranks) == 2
    assert len({rank["digest"] for rank in ranks}) == 1
    assert all(rank["state"] == "finished" for rank in ranks)
    assert all(rank["steps"] > 0 for rank in ranks)


def test_early_stopping_on_rank_0_ends_all_ranks(outcome: Outcome) -> None:
    for rank in noted(outcome, "early_stopping"):
        assert (rank["waited"], rank["best"]) == (2, 1.0), "all ranks have the state of rank 0"
        assert rank["steps"] < 1000
        assert rank["patience"] == 2, "user code sees the callback on all ranks"
    for rank in noted(outcome, "early_stopping_on_training"):
        assert rank["waited"] == 1
        assert rank["steps"] < 1000


def test_several_reporting_callbacks_all_report(outcome: Outcome) -> None:
    """Their number and their positions do not change what the loop does."""
    first, _ = noted(outcome, "reporters")
    assert first["validated"] == [4, 8, 12, 16, 20, 24]
    assert first["order_kept"]
    folder = outcome.out / "reporters"
    pushes = read_pushes(folder / "events.jsonl")
    events = [json.loads(line) for line in (folder / "recording.jsonl").read_text().splitlines()]
    assert sum(push["steps"] for push in pushes) == 48
    assert (events[0]["kind"], events[-1]["kind"]) == ("begin", "end")
    assert sum(event["kind"] == "push" for event in events) == len(pushes)
    (written,) = folder.rglob("async_localsgd_summary.json")
    summary = json.loads(written.read_text())
    assert summary["steps"] == 48
    # Other runs of this job print tables, too, and a run with a time limit may happen to end with the same steps.
    assert outcome.text.count(format_table(summary)) == 1, "two callbacks write one table"


def files(folder: Path) -> set[str]:
    """Return all files except workers' optimizer states in the run's folder."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("worker-"))
    return {str(path.relative_to(folder)) for path in found}


def test_rank_0_saves_checkpoints_and_all_ranks_know_their_paths(outcome: Outcome) -> None:
    folder = outcome.out / "checkpoints"
    ranks = noted(outcome, "checkpoints")
    for name in ("best", "score", "last", "top", "training", "folder"):
        assert ranks[0][name] == ranks[1][name], name
    assert ranks[0]["folder"] == str(folder / "best")
    # The best two by a metric that only rises, and the last.
    assert ranks[0]["top"].keys() == files(folder / "best") - {"last.ckpt"}
    assert len(ranks[0]["top"]) == 2
    assert ranks[0]["score"] == max(ranks[0]["top"].values())
    assert Path(ranks[0]["best"]).name == max(ranks[0]["top"], key=ranks[0]["top"].__getitem__)
    assert Path(ranks[0]["last"]) == folder / "best" / "last.ckpt"
    # Steps of the run are counted, not those of rank 0. During one step of rank 0, the run may take several.
    assert sorted(int(name[5:-5]) // 10 for name in files(folder / "steps")) == [1, 2, 3, 4, 5, 6]
    assert files(folder / "times"), "one each tenth of a second"
    assert files(folder / "training") == {Path(ranks[0]["training"]).name}
    assert files(folder) == {
        str(path.relative_to(folder)) for part in ("best", "steps", "times", "training") for path in
        (folder / part).glob("*.ckpt")
    }  # fmt: skip
    assert torch.load(ranks[0]["last"], weights_only=True)["global_step"] == 60


def test_time_limit_or_stop_on_one_rank_ends_all_ranks(outcome: Outcome) -> None:
    for name in ("timer_of_one_rank", "max_time", "should_stop_on_rank_0", "should_stop_on_rank_1"):
        assert sum(rank["steps"] for rank in noted(outcome, name)) < 1000, name


def test_each_logger_writes_one_directory(outcome: Outcome) -> None:
    folder = outcome.out / "monitors"
    ranks = noted(outcome, "monitors")
    written = files(folder)
    assert {name for name in written if name.startswith("csv")} == {
        "csv/version_0/metrics.csv", "csv/version_0/async_localsgd_summary.json",
        "csv/version_0/async_localsgd_events.jsonl",
    }  # fmt: skip
    board = [name for name in written if name.startswith("board/version_0/events")]
    assert len(board) == 1
    assert written == {*board, *(name for name in written if name.startswith("csv")), "board/version_0/hparams.yaml"}
    with (folder / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    named = {name for row in rows for name, value in row.items() if value}
    assert {"train_loss_step", "train_loss_epoch", "val_loss", "lr-SGD", "lr-SGD-momentum"} <= named
    assert any(name.startswith("DeviceStatsMonitor.on_train_batch_end") for name in named)
    # The x-axis counts steps of the run, and ends with the budget.
    assert max(int(row["step"]) for row in rows) <= 40
    assert ranks[0]["rates"] >= 2


def test_progress_bars_show_steps_of_the_run(outcome: Outcome) -> None:
    assert re.search(r"\b80/80\b", outcome.text), "steps of both ranks"
    assert re.search(r"\b40/40\b", outcome.text)


def test_number_of_accumulated_batches_follows_the_epochs(outcome: Outcome) -> None:
    for rank in noted(outcome, "accumulation"):
        assert rank["factors"] == [1, 2]
        assert rank["batches"] > rank["steps"]


def test_backbone_is_unfrozen_on_all_ranks(outcome: Outcome) -> None:
    for rank in noted(outcome, "finetuning"):
        assert rank["trainable"]
        assert rank["moved"]
        assert rank["groups"] == 2


def test_only_rank_0_tries_learning_rates(outcome: Outcome) -> None:
    for name in ("rate_finder", "tuner"):
        ranks = noted(outcome, name)
        assert ranks[0]["lr"] == ranks[1]["lr"] != 1e-3
        assert all(rank["tried"] == 20 for rank in ranks)
        assert not list((outcome.out / name).glob(".lr_find*"))
    assert [rank["sweep"] for rank in noted(outcome, "tuner")] == [20, 0]


def test_profilers_write_one_file_per_rank(outcome: Outcome) -> None:
    assert files(outcome.out / "profilers") == {
        f"fit-{kind}-{n}.txt" for kind in ("simple", "advanced") for n in (0, 1)
    }


def test_exception_of_rank_0_is_printed_and_ends_the_job(tmp_path: Path) -> None:
    found = run(tmp_path, "failing_0")
    assert found.code != 0
    assert "RuntimeError: a fault of rank 0's own" in found.text
    assert not list(tmp_path.glob("rank_*.json"))
    for name in ("exception", "saved"):
        path = next((tmp_path / "failing_0" / name).glob("*.ckpt"))
        assert "async_localsgd" in torch.load(path, weights_only=True), name


def test_exception_of_another_rank_is_printed_and_ends_only_that_rank(tmp_path: Path) -> None:
    found = run(tmp_path, "failing_1")
    assert "RuntimeError: a fault of rank 1's own" in found.text
    assert found.code == 0, "the other rank has met the budget"
    assert found.rank(0)["failing_1"]["state"] == "finished"
    assert not (tmp_path / "rank_1.json").exists()
    assert not list((tmp_path / "failing_1" / "exception").glob("*"))


class ModelWithBatchSize(BoringModel):
    """Has the attribute that batch size finders change."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 2


def test_batch_size_finders_are_rejected_like_with_ddp(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="Batch size finder is not supported with distributed"):
        quiet_trainer(callbacks=[BatchSizeFinder()], default_root_dir=tmp_path).fit(ModelWithBatchSize())
    with pytest.raises(ValueError, match="Tuning the batch size is currently not supported with distributed"):
        Tuner(quiet_trainer(default_root_dir=tmp_path)).scale_batch_size(ModelWithBatchSize())
