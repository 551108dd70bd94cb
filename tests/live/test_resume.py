"""A resumed run restores everything: counters, the global model, data, schedules, optimizer states of workers."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_async_localsgd.lightning.checkpoints.run_folder import newest_checkpoint
from tests.lightning_models import digest
from tests.live import resume_job as job
from tests.processes import jobs

STEPS = job.SAMPLES // job.BATCH


def run(out: Path, timeout: float = 200.0, **options: Any) -> tuple[int, str]:
    with jobs() as started:
        return started.finish(started.start([sys.executable, job.__file__, out, json.dumps(options)]), timeout)


def notes(out: Path, name: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"{name}_{rank}.json").read_text())
    return found


@dataclass
class Interrupted:
    """A run of three ranks that was interrupted in its second epoch.

    Attributes:
        out: folder of the job.
        path: newest checkpoint.
        checkpoint: its content.
        text: output of the job.

    """

    out: Path
    path: Path
    checkpoint: dict[str, Any]
    text: str

    @property
    def server(self) -> dict[str, Any]:
        """State of the server in the checkpoint."""
        state: dict[str, Any] = self.checkpoint["async_localsgd"]
        return state

    def inner(self, worker: int) -> dict[str, Any]:
        """Return the optimizer state of a worker that belongs to the checkpoint."""
        name = self.server["optimizer_files"][str(worker)]
        state: dict[str, Any] = torch.load(Path(f"{self.path}.workers") / name, weights_only=True)
        return state

    def copy(self, out: Path) -> Path:
        """Copy the run directory to another folder, from which another run is resumed."""
        shutil.copytree(self.out / "async_localsgd", out / "async_localsgd", copy_function=shutil.copy2)
        return out

    def samples(self, epoch: int) -> Counter[int]:
        """Return the samples of one epoch that are in the checkpoint's rounds."""
        found: Counter[int] = Counter()
        for rank in range(3):
            merged = self.server["workers"][str(rank)]["rounds"]
            for of, number, samples in notes(self.out, "first", rank)["seen"]:
                if of == epoch and number <= merged:
                    found.update(samples)
        return found


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    out = tmp_path_factory.mktemp("interrupted")
    code, text = run(out, name="first", ranks=3, fate="raise")
    assert code != 0
    assert "a fault of rank 0's own" in text
    path = newest_checkpoint(out / "async_localsgd")
    assert path is not None, text[-6000:]
    return Interrupted(out, path, torch.load(path, weights_only=True), text)


def resume(out: Path, ranks: int, explicit: bool = False) -> list[dict[str, Any]]:
    """Resume from ``ckpt_path="last"``, or from the path of this checkpoint, and return the notes of all ranks."""
    path = str(newest_checkpoint(out / "async_localsgd")) if explicit else "last"
    code, text = run(out, name="second", ranks=ranks, ckpt_path=path)
    assert code == 0, text[-6000:]
    found = [notes(out, "second", rank) for rank in range(ranks)]
    assert len({rank["end"] for rank in found}) == 1
    server = torch.load(out / "second.ckpt", weights_only=True)["async_localsgd"]
    assert server["budget"]["done"] == job.EPOCHS * STEPS or ranks != 3
    return found


def assert_each_sample_once(interrupted: Interrupted, ranks: list[dict[str, Any]]) -> None:
    """Check that both runs together use each sample once in each epoch."""
    for epoch in range(job.EPOCHS):
        seen = interrupted.samples(epoch)
        seen.update(sample for rank in ranks for of, _, samples in rank["seen"] if of == epoch for sample in samples)
        assert seen == Counter(range(job.SAMPLES)), f"epoch {epoch}"


def test_resumed_run_restores_everything(interrupted: Interrupted, tmp_path: Path) -> None:
    out = interrupted.copy(tmp_path)
    ranks = resume(out, 3)
    checkpoint, server = interrupted.checkpoint, interrupted.server
    start = ranks[0]["start"]

    # Counters of the Trainer, and states of callbacks.
    assert start["global_step"] == checkpoint["global_step"]
    assert start["epoch"] == checkpoint["epoch"] == 1
    notes_of_callback = next(state for key, state in checkpoint["callbacks"].items() if "Notes" in key)
    assert all(rank["start"]["callback"] == notes_of_callback for rank in ranks)

    # The server: global model, outer optimizer, versions, budget, speeds, leases, totals.
    loaded = torch.load(out / "second_server.pt", weights_only=True)
    theta = loaded["model"].pop("theta")
    weights = {**checkpoint["state_dict"], **server["model"].get("theta", {})}
    assert digest(theta) == digest({name: weights[name] for name in theta})
    assert {key for key in loaded["model"]["outer"] if key != "momentum"}
    for key, value in server["model"].items():
        if key != "theta":
            assert digest(loaded["model"][key]) == digest(value), key
    for key in ("budget", "workers", "optimizer_files"):
        assert loaded[key] == server[key], key
    assert loaded["pacing"]["speeds"] == server["pacing"]["speeds"]
    assert sum(worker["rounds"] for worker in server["workers"].values()) == server["model"]["version"] >= 12
    assert digest(loaded["leases"]) == digest(server["leases"])

    # Schedules follow the progress of the run on all ranks.
    for rank in ranks:
        place = rank["start"]["schedule"]
        assert place == pytest.approx(server["budget"]["done"] / 3, abs=5)
        assert math.isclose(rank["start"]["rate"], 1e-2 / (1 + place / 10), rel_tol=1e-6)

    # Optimizer states of all workers, bit for bit. The second moments are those of all of them.
    assert ranks[0]["start"]["optimizer"] == digest(job.own_state(checkpoint["optimizer_states"][0]))
    assert all(rank["start"]["has_global_moments"] for rank in ranks)
    for rank in (1, 2):
        inner = interrupted.inner(rank)
        assert inner["worker"] == rank
        assert 0 < inner["version"] <= server["model"]["version"]
        assert ranks[rank]["start"]["optimizer"] == digest(job.own_state(inner["optimizers"][0]))
        assert any("optimizer states are loaded from" in text for text in ranks[rank]["messages"])
    assert len({rank["start"]["optimizer"] for rank in ranks}) == 3

    assert_each_sample_once(interrupted, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
def test_run_resumes_with_another_number_of_workers(interrupted: Interrupted, tmp_path: Path, number: int) -> None:
    ranks = resume(interrupted.copy(tmp_path), number, explicit=number == 4)
    for rank in range(1, min(number, 3)):
        assert ranks[rank]["start"]["optimizer"] == digest(job.own_state(interrupted.inner(rank)["optimizers"][0]))
    if number == 4:
        assert ranks[3]["start"]["steps"] == []
        assert any("worker 3 was not in the run when" in text for text in ranks[3]["messages"])
    loaded = torch.load(tmp_path / "second_server.pt", weights_only=True)
    assert loaded["model"]["version"] == interrupted.server["model"]["version"]
    # The used data stays used, whatever the number of workers.
    assert loaded["budget"]["done"] == interrupted.server["budget"]["done"]
    assert_each_sample_once(interrupted, ranks)


def test_missing_state_starts_fresh_and_damaged_state_is_replaced_by_an_older_one(
    interrupted: Interrupted, tmp_path: Path
) -> None:
    out = interrupted.copy(tmp_path)
    names = interrupted.server["optimizer_files"]
    for path in out.rglob("worker-1-*.pt"):
        path.unlink()
    damaged = list(out.rglob(names["2"]))
    assert damaged
    for path in damaged:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    others = {
        digest(job.own_state(torch.load(path, weights_only=True)["optimizers"][0]))
        for path in out.rglob("worker-2-*.pt")
        if path.name != names["2"]
    }
    assert others
    ranks = resume(out, 3)
    assert ranks[1]["start"]["steps"] == []
    assert any("worker 1: its optimizer state" in text and "fresh" in text for text in ranks[1]["messages"])
    assert any("is damaged" in text and names["2"] in text for text in ranks[2]["messages"])
    assert any("of another moment of the same run" in text for text in ranks[2]["messages"])
    assert ranks[2]["start"]["optimizer"] in others
    assert_each_sample_once(interrupted, ranks)


def saved_by(worker: int, text: str) -> dict[str, Any]:
    """Load what a worker saved when it lost the server. The path is in its log message."""
    [path] = re.findall(rf"the optimizer state of worker {worker} is in (.*\.pt)", text)
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def test_worker_that_loses_the_server_saves_its_state_and_tells_how_to_resume(interrupted: Interrupted) -> None:
    for rank in (1, 2):
        assert saved_by(rank, interrupted.text)["version"] >= interrupted.inner(rank)["version"]
        assert f"worker {rank} has lost the server" in interrupted.text
    assert 'ckpt_path="last"' in interrupted.text
    assert "python -m lightning_async_localsgd" in interrupted.text
    assert f"resumes from {interrupted.path}" in interrupted.text


def test_killed_rank_0_leaves_a_recent_checkpoint(tmp_path: Path) -> None:
    code, text = run(tmp_path, name="first", ranks=2, fate="SIGKILL")
    assert code != 0, text
    path = newest_checkpoint(tmp_path / "async_localsgd")
    assert path is not None, text
    server = torch.load(path, weights_only=True)["async_localsgd"]
    assert server["model"]["version"] >= 4
    assert saved_by(1, text)["worker"] == 1


def test_terminated_run_saves_everything_at_once(tmp_path: Path) -> None:
    _, text = run(tmp_path, name="first", ranks=2, fate="SIGTERM", every=100_000)
    # It takes ten seconds on an idle machine.
    assert time.time() - float((tmp_path / "signalled").read_text()) < 20
    path = newest_checkpoint(tmp_path / "async_localsgd")
    assert path is not None, text
    assert f"resumes from {path}" in text
    server = torch.load(path, weights_only=True)["async_localsgd"]
    assert server["model"]["version"] == sum(worker["rounds"] for worker in server["workers"].values()) > 0
    assert saved_by(1, text)["worker"] == 1
