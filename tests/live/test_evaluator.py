"""An evaluator validates the global model while rank 0 trains."""

from __future__ import annotations

import json
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.lightning_contract.launching import TORCHRUN, free_port
from tests.processes import Jobs

pytestmark = pytest.mark.slow

JOB = Path(__file__).with_name("evaluator_job.py")

BY_STEPS = {"max_steps": 120, "max_epochs": -1, "val_check_interval": 30, "check_val_every_n_epoch": None}

TOKEN = "0123456789abcdef"


def run(started: Jobs, out: Path, **options: Any) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """Run the job. Return its output, what rank 0 noted, and all validations."""
    text = started.run(JOB, out, json.dumps(options))
    lines = (out / "validations.jsonl").read_text().splitlines()
    return text, json.loads((out / "rank_0.json").read_text()), [json.loads(line) for line in lines]


def test_evaluator_validates_at_the_ends_of_epochs(started: Jobs, tmp_path: Path) -> None:
    _, rank_0, validations = run(started, tmp_path, trainer={"max_epochs": 4}, samples=256)
    # An epoch of 256 samples has 16 steps of each of the two workers. The final model is validated by rank 0.
    assert [seen["step"] for seen in validations] == [16, 32, 48, 64]
    assert [seen["epoch"] for seen in validations] == [0, 1, 2, 3]
    assert [seen["pid"] == rank_0["pid"] for seen in validations] == [False, False, False, True]
    # The metrics arrive at their steps, on the axis of the loggers.
    assert rank_0["losses"] == [[seen["step"] - 1, pytest.approx(seen["val_loss"])] for seen in validations]
    # Each checkpoint has the weights that were validated, and the name of the validation.
    names = [f"epoch={seen['epoch']}-step={seen['step']}.ckpt" for seen in validations]
    assert list(rank_0["digests"]) == names
    assert list(rank_0["digests"].values()) == [seen["digest"] for seen in validations]
    assert list(rank_0["saved"].values()) == [pytest.approx(seen["val_loss"]) for seen in validations]
    assert rank_0["plateau_steps"] == 4


def test_rank_0_validates_what_a_dead_evaluator_has_not(started: Jobs, tmp_path: Path) -> None:
    text, rank_0, validations = run(started, tmp_path, trainer=BY_STEPS, dies_at=2)
    assert text.count("the evaluator left the run") == 1
    assert [step for step, _ in rank_0["losses"]] == [29, 59, 89, 119]
    assert [seen["pid"] == rank_0["pid"] for seen in validations] == [False, True, True, True]
    assert rank_0["losses"] == [
        [step - 1, pytest.approx(seen["val_loss"])] for step, seen in zip((30, 60, 90, 120), validations, strict=True)
    ]
    assert set(rank_0["digests"].values()) == {seen["digest"] for seen in validations}


def test_evaluator_joins_by_hand_and_early_stopping_follows_it(started: Jobs, tmp_path: Path) -> None:
    port = free_port()
    options = {
        "trainer": {**BY_STEPS, "max_steps": 3000},
        "strategy": {},
        "exchange": {"port": port},
        "awaits_evaluator": True,
        "stops_on": "worse",
        "patience": 3,
    }
    command = [sys.executable, JOB, tmp_path, json.dumps(options)]
    ranks = started.start(command, ASYNC_LOCALSGD_TOKEN=TOKEN)
    joined = started.start(
        command, ASYNC_LOCALSGD_TOKEN=TOKEN, ASYNC_LOCALSGD_JOIN=f"tcp://127.0.0.1:{port}",
        ASYNC_LOCALSGD_ROLE="evaluator",
    )  # fmt: skip
    code, text = started.finish(ranks)
    assert code == 0, text[-6000:]
    joined_code, joined_text = started.finish(joined)
    assert joined_code == 0, joined_text[-6000:]
    rank_0 = json.loads((tmp_path / "rank_0.json").read_text())
    assert text.count("an evaluator has joined the run") == 1
    assert rank_0["steps"] < 3000
    # Four results without an improvement end training, and no model is validated after that.
    lines = [json.loads(line) for line in (tmp_path / "validations.jsonl").read_text().splitlines()]
    assert len(rank_0["losses"]) == len(lines)
    assert [seen["pid"] == rank_0["pid"] for seen in lines] == [False] * 4


def test_evaluator_without_data_ends_the_run_on_all_ranks(started: Jobs, tmp_path: Path) -> None:
    options = {"trainer": BY_STEPS, "evaluator_without_data": True}
    code, text = started.finish(started.start([sys.executable, JOB, tmp_path, json.dumps(options)]))
    assert code == 1
    reason = f"the evaluator on host {socket.gethostname()} has no validation data"
    assert f"rank 0 ended with ExchangeError: {reason}" in text
    assert text.count(reason) >= 3, "the evaluator and both ranks"


def test_validation_is_skipped_while_an_earlier_one_is_out(started: Jobs, tmp_path: Path) -> None:
    # The first result comes after step 65, so the validation at step 60 is skipped. Those at 90 and 120 are not.
    text, rank_0, validations = run(started, tmp_path, trainer=BY_STEPS, skips_until=65)
    assert text.count("still validates the model of step 30, so the validation at step 60 is skipped") == 1
    assert [seen["step"] for seen in validations] == [30, 90, 120]
    assert [seen["pid"] == rank_0["pid"] for seen in validations] == [False, False, True]
    assert rank_0["losses"] == [[seen["step"] - 1, pytest.approx(seen["val_loss"])] for seen in validations]
    assert list(rank_0["digests"].values()) == [seen["digest"] for seen in validations]


def test_evaluator_does_not_count_as_a_worker_in_a_pause(started: Jobs, tmp_path: Path) -> None:
    strategy = {"evaluator": True, "min_workers": 2}
    text, rank_0, validations = run(started, tmp_path, trainer=BY_STEPS, strategy=strategy, worker_1_dies_at=20)
    assert text.count("training is paused") == 1
    assert [seen["step"] for seen in validations] == [30, 60, 90, 120]
    assert [seen["pid"] == rank_0["pid"] for seen in validations] == [False, False, False, True]


def test_groups_do_not_wait_for_an_evaluator(started: Jobs, tmp_path: Path) -> None:
    strategy = {"evaluator": True, "quorum": "all", "dynamic_local_steps": False}
    _, rank_0, validations = run(started, tmp_path, trainer=BY_STEPS, strategy=strategy)
    assert [seen["step"] for seen in validations] == [30, 60, 90, 120]
    assert [seen["pid"] == rank_0["pid"] for seen in validations] == [False, False, False, True]


def test_torchrun_with_an_evaluator(started: Jobs, tmp_path: Path) -> None:
    command = [*TORCHRUN, JOB, tmp_path, json.dumps({"trainer": BY_STEPS})]
    code, text = started.finish(started.start(command))
    assert code == 0, text[-6000:]
    assert_validated(tmp_path)


def test_slurm_with_an_evaluator(started: Jobs, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, JOB, tmp_path, json.dumps({"trainer": BY_STEPS})]
    tasks = [started.start(command, **slurm_task(rank, port)) for rank in (0, 1)]
    for task in tasks:
        code, text = started.finish(task)
        assert code == 0, text[-6000:]
    assert_validated(tmp_path)


def slurm_task(rank: int, port: int) -> dict[str, str]:
    """Return the variables of a task of a job with two tasks on one node."""
    return {
        "SLURM_JOB_ID": "123457", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1", "SLURM_NODELIST": "127.0.0.1", "SLURM_TASKS_PER_NODE": "2", "MASTER_PORT": str(port),
        "SLURM_PROCID": str(rank), "SLURM_NODEID": "0", "SLURM_LOCALID": str(rank),
    }  # fmt: skip


def assert_validated(out: Path) -> None:
    """Check that an evaluator has validated all models but the final one."""
    rank_0 = json.loads((out / "rank_0.json").read_text())
    validations = [json.loads(line) for line in (out / "validations.jsonl").read_text().splitlines()]
    assert [seen["step"] for seen in validations] == [30, 60, 90, 120]
    assert [seen["pid"] == rank_0["pid"] for seen in validations] == [False, False, False, True]


def test_evaluator_with_another_model_ends_the_run_on_all_ranks(started: Jobs, tmp_path: Path) -> None:
    options = {"trainer": BY_STEPS, "evaluator_with_other_model": True}
    code, text = started.finish(started.start([sys.executable, JOB, tmp_path, json.dumps(options)]))
    assert code == 1
    reason = "ExchangeError: the model of the evaluator differs from rank 0's; every rank must build the same model"
    ended = (
        rf"the evaluator on host {re.escape(socket.gethostname())} \(pid \d+\) ended with exit code 1 before training: "
    )
    assert len(re.findall(ended + re.escape(reason), text)) >= 2, "both ranks"
    assert "parameter 0: 'net.0.weight' float32 [3, 8] here, 'net.0.weight' float32 [16, 8] there" in text
    assert "the evaluator ends: the model of the evaluator differs" in text
    assert "2147483647" not in text
