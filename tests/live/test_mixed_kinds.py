"""Workers of one run may have unequal precision."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_async_localsgd.protocol.traits import TRAITS
from tests.lightning_contract.launching import TORCHRUN, free_port, succeed
from tests.processes import Jobs

pytestmark = pytest.mark.slow

JOB = Path(__file__).with_name("mixed_job.py")

TOKEN = "of-workers-of-many-kinds"


def notes(out: Path, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((out / f"rank_{rank}.json").read_text()) for rank in range(ranks)]


def assert_same_model(ranks: list[dict[str, Any]], dtypes: list[torch.dtype]) -> None:
    """Check that all ranks have rank 0's model, each in its own dtype."""
    assert [rank["dtype"] for rank in ranks] == [str(dtype) for dtype in dtypes]
    for name, values in ranks[0]["state"].items():
        for rank, dtype in zip(ranks, dtypes, strict=True):
            own, expected = torch.tensor(rank["state"][name]), torch.tensor(values)
            rounded = expected if "num_batches" in name else expected.to(dtype).to(own.dtype)
            assert torch.equal(own if "num_batches" in name else own.to(dtypes[0]).to(own.dtype), rounded), name


@pytest.mark.parametrize("launcher", ["popen", "torchrun"])
def test_ranks_of_unequal_precision_train_one_model(started: Jobs, tmp_path: Path, launcher: str) -> None:
    options = json.dumps({"precision": ["32-true", "bf16-mixed", "bf16-true"], "tests": True})
    command = [sys.executable] if launcher == "popen" else [*TORCHRUN[:-1], "--nproc-per-node=3"]
    text = succeed(started, started.start([*command, JOB, tmp_path, options]))
    ranks = notes(tmp_path, 3)
    assert_same_model(ranks, [torch.float32, torch.float32, torch.bfloat16])
    summary = ranks[0]["summary"]
    assert [worker["precision"] for worker in summary["workers"]] == ["32-true", "bf16-mixed", "bf16-true"]
    assert all(worker["rounds"] > 1 for worker in summary["workers"])
    assert summary["refused_pushes"] == 0
    # Only what differs is a column of the table.
    assert re.search(r"^worker +precision +steps +rounds", text, re.MULTILINE), text[-2000:]
    assert re.search(r"^ +2 +bf16-true +\d+", text, re.MULTILINE)
    # Metrics that are computed in unequal dtypes have one mean.
    assert {rank["backend"] for rank in ranks} == {"gloo"}
    assert [rank["loss_dtype"] for rank in ranks] == ["torch.float32", "torch.float32", "torch.bfloat16"]
    assert len({rank["test_loss_epoch"] for rank in ranks}) == 1
    assert ranks[0]["gathered"] == pytest.approx(ranks[1]["gathered"])
    assert [rank["auroc"] for rank in ranks] == pytest.approx([ranks[0]["auroc"]] * 3, abs=0.01)
    assert ranks[0]["test_loss_epoch"] == pytest.approx(ranks[0]["gathered"], rel=0.05)


def test_worker_of_another_precision_joins_and_one_is_restarted(started: Jobs, tmp_path: Path) -> None:
    port = free_port()
    options = {"exchange": {"port": port}, "max_steps": 1_000_000, "strategy": {"expected_workers": 3}}
    own = [sys.executable, JOB, tmp_path, json.dumps({**options, "precision": ["bf16-true", "32-true"], "kill": 1})]
    joins = [sys.executable, JOB, tmp_path, json.dumps({**options, "precision": ["64-true"]})]
    address = f"tcp://127.0.0.1:{port}"
    text = succeed(
        started,
        started.start(own, ASYNC_LOCALSGD_TOKEN=TOKEN),
        started.start(joins, ASYNC_LOCALSGD_TOKEN=TOKEN, ASYNC_LOCALSGD_JOIN=address),
    )
    ranks = notes(tmp_path, 3)
    summary = ranks[0]["summary"]
    assert [worker["precision"] for worker in summary["workers"]] == ["bf16-true", "32-true", "64-true"]
    assert [worker["sessions"] for worker in summary["workers"]] == [1, 2, 1]
    assert all(worker[name] for worker in summary["workers"] for name in TRAITS)
    assert re.search(r"^ +1 +32-true +\d+", text, re.MULTILINE), text[-2000:]
    assert ranks[2]["dtype"] == "torch.float64"
    # The precision of rank 0 does not limit what the others hold.
    rounded = torch.tensor(ranks[1]["state"]["net.3.weight"]).bfloat16()
    assert torch.equal(rounded, torch.tensor(ranks[0]["state"]["net.3.weight"]).bfloat16())
    assert ranks[1]["dtype"] == "torch.float32"


def test_run_is_resumed_with_other_precisions(started: Jobs, tmp_path: Path) -> None:
    first = {"precision": ["bf16-true", "32-true"], "max_steps": 40}
    started.run(JOB, tmp_path, json.dumps(first))
    again = {"precision": ["32-true", "bf16-true"], "max_steps": 60, "resumed": str(tmp_path / "saved" / "last.ckpt")}
    text = started.run(JOB, tmp_path, json.dumps(again))
    assert "does not fit this worker's optimizers" not in text
    ranks = notes(tmp_path, 2)
    assert_same_model(ranks, [torch.float32, torch.bfloat16])
    workers = ranks[0]["summary"]["workers"]
    assert [worker["precision"] for worker in workers] == ["32-true", "bf16-true"]
    assert sum(worker["steps"] for worker in workers) == 120


def test_ranks_of_unequal_dtypes_cannot_begin_synchronously(started: Jobs, tmp_path: Path) -> None:
    options = {"precision": ["32-true", "bf16-true"], "strategy": {"sync_warmup_steps": 10}}
    code, text = started.finish(started.start([sys.executable, JOB, tmp_path, json.dumps(options)]), 60)
    assert code != 0
    assert "worker 1 has tensors of bfloat16 and rank 0 of float32, but in the synchronous beginning" in text
