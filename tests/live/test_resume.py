"""An interrupted run goes on with everything: counters, the global model, data, schedules, inner states."""

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

from lightning_async_localsgd.run_folder import newest_checkpoint
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
class Broken:
    """A run of three ranks that was interrupted in its second epoch."""

    out: Path
    path: Path
    checkpoint: dict[str, Any]
    text: str

    @property
    def server(self) -> dict[str, Any]:
        """The server's state in the checkpoint."""
        state: dict[str, Any] = self.checkpoint["async_localsgd"]
        return state

    def inner(self, worker: int) -> dict[str, Any]:
        """The state of a worker's optimizer that belongs to the checkpoint."""
        name = self.server["inner_states"][str(worker)]
        state: dict[str, Any] = torch.load(Path(f"{self.path}.workers") / name, weights_only=True)
        return state

    def copy(self, out: Path) -> Path:
        """The same in another place, to go on from in another way."""
        shutil.copytree(self.out / "async_localsgd", out / "async_localsgd", copy_function=shutil.copy2)
        return out

    def samples(self, epoch: int) -> Counter[int]:
        """What the rounds that the checkpoint has were trained on."""
        found: Counter[int] = Counter()
        for rank in range(3):
            merged = self.server["workers"][str(rank)]["rounds"]
            for of, number, samples in notes(self.out, "first", rank)["seen"]:
                if of == epoch and number <= merged:
                    found.update(samples)
        return found


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Broken:
    out = tmp_path_factory.mktemp("broken")
    code, text = run(out, name="first", ranks=3, fate="raise")
    assert code != 0
    assert "a fault of rank 0's own" in text
    path = newest_checkpoint(out / "async_localsgd")
    assert path is not None, text[-6000:]
    return Broken(out, path, torch.load(path, weights_only=True), text)


def go_on(broken: Broken, out: Path, ranks: int, explicit: bool = False) -> list[dict[str, Any]]:
    """Resumes with ``ckpt_path="last"``, or the path of that, and returns what each rank noted."""
    path = str(newest_checkpoint(out / "async_localsgd")) if explicit else "last"
    code, text = run(out, name="second", ranks=ranks, ckpt_path=path)
    assert code == 0, text[-6000:]
    found = [notes(out, "second", rank) for rank in range(ranks)]
    assert len({rank["end"] for rank in found}) == 1
    server = torch.load(out / "second.ckpt", weights_only=True)["async_localsgd"]
    assert server["budget"]["done"] == job.EPOCHS * STEPS or ranks != 3
    return found


def assert_each_sample_once(broken: Broken, ranks: list[dict[str, Any]]) -> None:
    """In every epoch, by both runs together."""
    for epoch in range(job.EPOCHS):
        seen = broken.samples(epoch)
        seen.update(sample for rank in ranks for of, _, samples in rank["seen"] if of == epoch for sample in samples)
        assert seen == Counter(range(job.SAMPLES)), f"epoch {epoch}"


def test_everything_goes_on(broken: Broken, tmp_path: Path) -> None:
    out = broken.copy(tmp_path)
    ranks = go_on(broken, out, 3)
    checkpoint, server = broken.checkpoint, broken.server
    start = ranks[0]["start"]

    # The Trainer's counters, and callbacks' states.
    assert start["global_step"] == checkpoint["global_step"]
    assert start["epoch"] == checkpoint["epoch"] == 1
    notes_of_callback = next(state for key, state in checkpoint["callbacks"].items() if "Notes" in key)
    assert all(rank["start"]["callback"] == notes_of_callback for rank in ranks)

    # The server: theta, m, Delta and t of the outer optimizer, versions, budget, speeds, leases, totals.
    loaded = torch.load(out / "second_server.pt", weights_only=True)
    theta = loaded["model"].pop("theta")
    weights = {**checkpoint["state_dict"], **server["model"].get("theta", {})}
    assert job.digest(theta) == job.digest({name: weights[name] for name in theta})
    assert {key for key in loaded["model"]["outer"] if key != "momentum"}
    for key, value in server["model"].items():
        if key != "theta":
            assert job.digest(loaded["model"][key]) == job.digest(value), key
    for key in ("budget", "workers", "inner_states"):
        assert loaded[key] == server[key], key
    assert loaded["pacing"]["speeds"] == server["pacing"]["speeds"]
    assert sum(worker["rounds"] for worker in server["workers"].values()) == server["model"]["version"] >= 12
    assert job.digest(loaded["leases"]) == job.digest(server["leases"])

    # Schedules: where the data is, on every rank.
    for rank in ranks:
        place = rank["start"]["schedule"]
        assert place == pytest.approx(server["budget"]["done"] / 3, abs=5)
        assert math.isclose(rank["start"]["rate"], 1e-2 / (1 + place / 10), rel_tol=1e-6)

    # Each worker's inner state, to the last bit.
    assert ranks[0]["start"]["optimizer"] == job.digest(checkpoint["optimizer_states"][0]["state"])
    for rank in (1, 2):
        inner = broken.inner(rank)
        assert inner["worker"] == rank
        assert 0 < inner["version"] <= server["model"]["version"]
        assert ranks[rank]["start"]["optimizer"] == job.digest(inner["optimizers"][0]["state"])
        assert any("optimizer states are those of" in text for text in ranks[rank]["messages"])
    assert len({rank["start"]["optimizer"] for rank in ranks}) == 3

    assert_each_sample_once(broken, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
def test_another_number_of_workers_goes_on(broken: Broken, tmp_path: Path, number: int) -> None:
    ranks = go_on(broken, broken.copy(tmp_path), number, explicit=number == 4)
    for rank in range(1, min(number, 3)):
        assert ranks[rank]["start"]["optimizer"] == job.digest(broken.inner(rank)["optimizers"][0]["state"])
    if number == 4:
        assert ranks[3]["start"]["steps"] == []
        assert any("worker 3 was not there when" in text for text in ranks[3]["messages"])
    loaded = torch.load(tmp_path / "second_server.pt", weights_only=True)
    assert loaded["model"]["version"] == broken.server["model"]["version"]
    # The data is used up as far as it was, whoever goes on with it.
    assert loaded["budget"]["done"] == broken.server["budget"]["done"]
    assert_each_sample_once(broken, ranks)


def test_a_missing_state_means_a_fresh_one_and_a_damaged_one_is_found(broken: Broken, tmp_path: Path) -> None:
    out = broken.copy(tmp_path)
    names = broken.server["inner_states"]
    for path in out.rglob("worker-1-*.pt"):
        path.unlink()
    damaged = list(out.rglob(names["2"]))
    assert damaged
    for path in damaged:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    others = {
        job.digest(torch.load(path, weights_only=True)["optimizers"][0]["state"])
        for path in out.rglob("worker-2-*.pt")
        if path.name != names["2"]
    }
    assert others
    ranks = go_on(broken, out, 3)
    assert ranks[1]["start"]["steps"] == []
    assert any("worker 1: its optimizer state" in text and "fresh" in text for text in ranks[1]["messages"])
    assert any("is damaged" in text and names["2"] in text for text in ranks[2]["messages"])
    assert any("of another moment of the same run" in text for text in ranks[2]["messages"])
    assert ranks[2]["start"]["optimizer"] in others
    assert_each_sample_once(broken, ranks)


def saved_by(worker: int, text: str) -> dict[str, Any]:
    """What a worker has saved when it lost the server, by what it said."""
    [path] = re.findall(rf"the optimizer state of worker {worker} is in (.*\.pt)", text)
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def test_who_loses_the_server_saves_its_state_and_says_how_to_go_on(broken: Broken) -> None:
    for rank in (1, 2):
        assert saved_by(rank, broken.text)["version"] >= broken.inner(rank)["version"]
        assert f"worker {rank} has no server any more" in broken.text
    assert 'ckpt_path="last"' in broken.text
    assert "python -m lightning_async_localsgd" in broken.text
    assert f"goes on from {broken.path}" in broken.text


def test_a_killed_rank_0_leaves_a_checkpoint_of_at_most_an_interval_ago(tmp_path: Path) -> None:
    code, text = run(tmp_path, name="first", ranks=2, fate="SIGKILL")
    assert code != 0, text
    path = newest_checkpoint(tmp_path / "async_localsgd")
    assert path is not None, text
    server = torch.load(path, weights_only=True)["async_localsgd"]
    assert server["model"]["version"] >= 4
    assert saved_by(1, text)["worker"] == 1


def test_a_run_that_is_asked_to_end_leaves_everything_at_once(tmp_path: Path) -> None:
    _, text = run(tmp_path, name="first", ranks=2, fate="SIGTERM", every=100_000)
    # Ten on an idle machine.
    assert time.time() - float((tmp_path / "signalled").read_text()) < 20
    path = newest_checkpoint(tmp_path / "async_localsgd")
    assert path is not None, text
    assert f"goes on from {path}" in text
    server = torch.load(path, weights_only=True)["async_localsgd"]
    assert server["model"]["version"] == sum(worker["rounds"] for worker in server["workers"].values()) > 0
    assert saved_by(1, text)["worker"] == 1
