"""Inner optimizer states of workers: saving, loading, and keeping files beside checkpoints."""

from __future__ import annotations

import logging
import os
import stat
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lightning_async_localsgd import AsyncLocalSGDStrategy
from lightning_async_localsgd.lightning.checkpoints import optimizer_states
from lightning_async_localsgd.lightning.checkpoints.optimizer_states import OptimizerStateSaver, resume_optimizers
from lightning_async_localsgd.lightning.checkpoints.worker_files import (
    WorkerStateCollector,
    file_names,
    folder_beside,
    keep_files,
    keep_worker_files,
    name_folder,
    remove_worker_files,
)
from lightning_async_localsgd.lightning.trainer_access.strategy import strategy_of
from lightning_async_localsgd.protocol.exchange import ExchangeError
from lightning_async_localsgd.runtime.durable import verified
from tests.lightning_contract import checkpoints_job as job
from tests.lightning_models import loader


class TwoOptimizers(job.Module):
    """A module with manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = self.loss(batch)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        first, last = self.net[0].parameters(), self.net[3].parameters()
        return [torch.optim.AdamW(first, lr=0.1), torch.optim.SGD(last, lr=0.2, momentum=0.9)]


def worker_of(root: Path, steps: int, module: job.Module | None = None, **options: Any) -> L.Trainer:
    """Return a trainer whose optimizers have taken the given number of steps."""
    L.seed_everything(steps, verbose=False)
    strategy = AsyncLocalSGDStrategy(local_steps=3, checkpoint_every=options.pop("every", 4))
    # Lightning counts the steps of all optimizers.
    limit = 2 * steps if isinstance(module, TwoOptimizers) else steps
    trainer = job.trainer_of(root, strategy=strategy, devices=1, max_steps=limit, **options)
    trainer.fit(module or job.Module(), loader())
    strategy.run_name = "run"
    return trainer


def runtime_of(number: int = 1) -> Any:
    worker = SimpleNamespace(
        number=number, session="s", reply=SimpleNamespace(version=0, save_request=0), round_steps=0, total_steps=9,
        diverged=False, optimizer_file=str, uplink=None, steps_left_out=0,
    )  # fmt: skip

    def leave_out_step() -> None:
        worker.steps_left_out += 1

    worker.leave_out_step = leave_out_step
    return SimpleNamespace(worker=worker, stopped=False)


def end_round(saver: OptimizerStateSaver, runtime: Any, version: int) -> None:
    runtime.worker.reply.version = version
    saver.on_train_batch_end()
    assert saver._writer is not None
    assert saver._writer.wait(30)


def files(root: Path) -> list[Path]:
    return sorted((root / "async_localsgd" / "run").glob("*"))


def state_of(trainer: L.Trainer) -> list[Any]:
    return [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


# ----------------------------------------------------------------------------- saving


def test_state_is_saved_at_the_end_of_a_round_when_the_interval_is_over(tmp_path: Path) -> None:
    trainer, runtime = worker_of(tmp_path, 5), runtime_of()
    saver = OptimizerStateSaver(trainer, runtime, strategy_of(trainer).checkpoint_every)
    for version in range(1, 4):
        end_round(saver, runtime, version)
    assert files(tmp_path) == []
    runtime.worker.round_steps = 2
    end_round(saver, runtime, 4)
    assert files(tmp_path) == [], "within a round nothing is saved"
    runtime.worker.round_steps = 0
    for version in (5, 9, 13, 17, 21):
        end_round(saver, runtime, version)
    found = files(tmp_path)
    assert [path.name[:15] for path in found] == [f"worker-1-{n:06d}" for n in (3, 4, 5)], "three files are kept"
    assert runtime.worker.optimizer_file() == found[-1].name
    assert runtime.worker.steps_left_out == 5, "saving does not count as computing"
    assert all(verified(path) and stat.S_IMODE(path.stat().st_mode) == 0o600 for path in found)
    state = torch.load(found[-1], weights_only=True)
    assert (state["worker"], state["session"], state["version"]) == (1, "s", 21)
    assert same([optimizer["state"] for optimizer in state["optimizers"]], state_of(trainer))
    saver.close()
    assert saver not in trainer.callbacks  # type: ignore[attr-defined]


def test_hanging_disk_at_the_end_is_logged_and_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(optimizer_states, "_SECONDS_AT_THE_END", 0.05)
    trainer, runtime = worker_of(tmp_path, 1), runtime_of()
    saver = OptimizerStateSaver(trainer, runtime, strategy_of(trainer).checkpoint_every)
    end_round(saver, runtime, 4)
    before = runtime.worker.optimizer_file()
    assert before
    assert saver._writer is not None
    responds = threading.Event()
    saver._writer.begin(lambda: responds.wait(60) or None)
    assert saver.finish() == before
    writer = saver._writer
    saver.close()
    assert "is still being written" in caplog.text
    responds.set()
    assert writer.wait(30)


def test_nothing_is_saved_without_an_interval_or_before_it_is_over(tmp_path: Path) -> None:
    for every in (None, timedelta(hours=1)):
        trainer, runtime = worker_of(tmp_path, 1, every=every), runtime_of()
        saver = OptimizerStateSaver(trainer, runtime, strategy_of(trainer).checkpoint_every)
        runtime.worker.reply.version = 1000
        saver.on_train_batch_end()
        saver.close()
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "diverged", "saves"),
    [
        (ExchangeError("the server is gone"), False, True),
        (SIGTERMException(), False, True),
        (KeyboardInterrupt(), False, True),
        (ExchangeError("ten refusals"), True, False),
        (ValueError("in the user's code"), False, False),
    ],
)
def test_state_is_saved_at_an_interruption_unless_the_state_may_be_its_cause(
    tmp_path: Path, error: BaseException, diverged: bool, saves: bool, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, runtime = worker_of(tmp_path, 2), runtime_of()
    runtime.worker.diverged = diverged
    saver = OptimizerStateSaver(trainer, runtime, strategy_of(trainer).checkpoint_every)
    with caplog.at_level(logging.WARNING):
        saver.on_exception(trainer, trainer.lightning_module, error)
    saver.close()
    assert len(files(tmp_path)) == saves
    assert ("has lost the server" in caplog.text) == (isinstance(error, ExchangeError) and not diverged)
    if saves:
        assert str(files(tmp_path)[0]) in caplog.text


# ------------------------------------------------------------------------------- rejoining


def saved_after(root: Path, steps: int, module: job.Module | None = None, **options: Any) -> list[Any]:
    """Save the state of a worker after the given number of steps, and return its optimizers' states."""
    trainer, runtime = worker_of(root, steps, module, **options), runtime_of()
    saver = OptimizerStateSaver(trainer, runtime, strategy_of(trainer).checkpoint_every)
    end_round(saver, runtime, 100)
    saver.close()
    return state_of(trainer)


def test_rejoining_worker_begins_with_the_newest_state(tmp_path: Path) -> None:
    saved_after(tmp_path, 3)
    state = saved_after(tmp_path, 7)
    trainer, runtime = worker_of(tmp_path, 1), runtime_of()
    trainer.optimizers[0].param_groups[0]["lr"] = 0.125
    saver = OptimizerStateSaver(trainer, runtime, 4, joins=True)
    assert same(state_of(trainer), state)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.125, "learning rates follow the progress of all workers"
    assert runtime.worker.optimizer_file() == files(tmp_path)[-1].name, "the name of the loaded file is reported again"
    saver.close()


def test_several_optimizers_and_a_gradient_scaler_are_restored(tmp_path: Path) -> None:
    def scaled(scale: float) -> list[Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=99)
        return [MixedPrecision("16-mixed", "cpu", scaler=scaler)]

    state = saved_after(tmp_path, 4, TwoOptimizers(), plugins=scaled(256.0))
    assert len(state) == 2
    trainer = worker_of(tmp_path, 1, TwoOptimizers(), plugins=scaled(8.0))
    OptimizerStateSaver(trainer, runtime_of(), 4, joins=True).close()
    assert same(state_of(trainer), state)
    assert trainer.precision_plugin.state_dict()["scale"] == 256.0


def test_damaged_file_is_skipped_and_without_a_file_the_state_is_fresh(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older = saved_after(tmp_path, 3)
    saved_after(tmp_path, 7)
    first, second = files(tmp_path)
    second.write_bytes(second.read_bytes()[:100])
    trainer = worker_of(tmp_path, 1)
    OptimizerStateSaver(trainer, runtime_of(), 4, joins=True).close()
    assert same(state_of(trainer), older)
    assert f"{second} is damaged" in caplog.text
    first.unlink()
    second.unlink()
    trainer = worker_of(tmp_path, 1)
    before = state_of(trainer)
    OptimizerStateSaver(trainer, runtime_of(), 4, joins=True).close()
    assert same(state_of(trainer), before)
    assert "worker 1 joins with a fresh optimizer state: none was saved" in caplog.text


def test_state_of_other_optimizers_is_not_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved_after(tmp_path, 3, TwoOptimizers())
    trainer = worker_of(tmp_path, 1)
    before = state_of(trainer)
    OptimizerStateSaver(trainer, runtime_of(), 4, joins=True).close()
    assert same(state_of(trainer), before)
    assert "does not fit this worker's optimizers" in caplog.text


# ---------------------------------------------------------------------------- resuming


def test_resumed_worker_has_the_learning_rate_of_the_checkpoint(tmp_path: Path) -> None:
    state = saved_after(tmp_path, 6)
    [name] = [path.name for path in files(tmp_path)]
    trainer = worker_of(tmp_path, 1)
    trainer.ckpt_path = str(tmp_path / "elsewhere.ckpt")
    groups = [{**trainer.optimizers[0].state_dict()["param_groups"][0], "lr": 0.25}]
    checkpoint = {"optimizer_states": [{"state": {}, "param_groups": groups}]}
    trainer.strategy.set_world_ranks()
    trainer.strategy.cluster_environment.set_global_rank(1)  # type: ignore[attr-defined]
    server = {"initial_workers": 2, "optimizer_files": {"1": name}, "run_name": "run"}
    try:
        assert resume_optimizers(trainer, checkpoint, server) == files(tmp_path)[0]
        assert same(state_of(trainer), state)
        assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25
        # Without a file the state is fresh, with the same learning rate.
        fresh = worker_of(tmp_path, 1)
        fresh.ckpt_path = None
        fresh.strategy.cluster_environment.set_global_rank(1)  # type: ignore[attr-defined]
        assert resume_optimizers(fresh, checkpoint, {**server, "optimizer_files": {}, "run_name": "other"}) is None
        assert fresh.optimizers[0].param_groups[0]["lr"] == 0.25
    finally:
        trainer.strategy.cluster_environment.set_global_rank(0)  # type: ignore[attr-defined]


def test_resumed_file_is_kept_until_a_newer_file_is_reported(tmp_path: Path) -> None:
    for steps in (3, 5, 7):
        saved_after(tmp_path, steps)
    first = files(tmp_path)[0]
    trainer, runtime = worker_of(tmp_path, 1), runtime_of()
    saver = OptimizerStateSaver(trainer, runtime, 4, resumed_file=first)
    assert runtime.worker.optimizer_file() == first.name
    end_round(saver, runtime, 100)
    saver.close()
    assert first.exists(), "the next checkpoint may still name the file"
    assert runtime.worker.optimizer_file().startswith("worker-1-000004-")


# ------------------------------------------------------------- files of a checkpoint

HASH = "0123456789abcdef" * 4


def test_file_names_from_the_network_that_are_paths_are_ignored() -> None:
    good = f"worker-3-000012-{HASH}.pt"
    bad = ["../../etc/passwd", f"{good}/..", f"/{good}", "", good.replace("worker-3", "worker-4")]
    assert file_names({"optimizer_files": {"3": good}}) == {3: good}
    for name in bad:
        assert file_names({"optimizer_files": {"3": name}}) == {}
    assert file_names({}) == {}


def server_state(version: int, *names: str) -> dict[str, Any]:
    return {
        "initial_workers": 2,
        "model": {"version": version},
        "optimizer_files": {name.split("-")[1]: name for name in names},
        "run_name": "run",
    }


@pytest.mark.parametrize("remote", [False, True])
def test_worker_files_are_kept_in_the_run_folder_and_removed_with_their_checkpoint(
    tmp_path: Path, remote: bool
) -> None:
    runs, run = tmp_path / "async_localsgd", tmp_path / "async_localsgd" / "run"
    names = [f"worker-{n}-000001-{HASH}.pt" for n in (1, 2, 3)]
    run.mkdir(parents=True)
    make(run, *names[:2])
    path = "s3://bucket/epoch=1.ckpt" if remote else tmp_path / "kept" / "epoch=1.ckpt"
    state = server_state(5, *names)
    name_folder(path, state, run)
    keep_files(path, state)
    kept = Path(state["worker_folder"])
    assert kept.parent == run / "workers"
    assert sorted(file.name for file in kept.iterdir()) == names[:2], "the third file is on another host"
    assert (kept / names[0]).samefile(run / names[0])
    assert os.listdir(tmp_path) == ["async_localsgd"], "nothing is beside the checkpoint"
    other = server_state(5, names[0])
    name_folder(tmp_path / "other.ckpt", other, run)
    keep_files(tmp_path / "other.ckpt", other)
    # A path may be written again, for example "last.ckpt".
    again = server_state(6, names[1])
    name_folder(path, again, run)
    keep_files(path, again)
    assert not kept.exists()
    kept = Path(again["worker_folder"])
    assert [file.name for file in kept.iterdir()] == [names[1]]
    (run / names[1]).unlink()
    assert (kept / names[1]).read_text() == names[1]
    # A later run may remove the checkpoint.
    remove_worker_files(path, runs)
    assert not kept.exists()
    assert Path(other["worker_folder"]).exists()
    remove_worker_files(path, runs)


def test_worker_files_beside_a_checkpoint_are_removed_with_it(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    beside = folder_beside(path)
    assert beside == tmp_path / "last.ckpt.workers"
    beside.mkdir()
    make(tmp_path, f"worker-1-000001-{HASH}.pt")
    keep_worker_files(beside, server_state(1, f"worker-1-000001-{HASH}.pt"), tmp_path)
    assert len(os.listdir(beside)) == 1
    remove_worker_files(path)
    assert not beside.exists()
    assert folder_beside("s3://bucket/last.ckpt") is None


def test_no_folder_is_named_without_a_run_folder(tmp_path: Path) -> None:
    state = server_state(1)
    name_folder(tmp_path / "last.ckpt", state, None)
    keep_files(tmp_path / "last.ckpt", state)
    assert "worker_folder" not in state
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("place", ["run", "copied run", "other root", "beside"])
def test_file_of_the_checkpoint_is_found(tmp_path: Path, place: str) -> None:
    """A run is resumed from a checkpoint whose run is in the same place, was copied, or has another root folder."""
    saved_after(tmp_path, 6)
    state = saved_after(tmp_path, 8)
    saved_after(tmp_path, 9)
    runs = tmp_path / "async_localsgd"
    run, path = runs / "run", tmp_path / "kept" / "epoch=1.ckpt"
    belonging = files(tmp_path)[1]
    server = server_state(8, belonging.name)
    if place == "beside":  # As an earlier version has saved it.
        keep_worker_files(tmp_path / "kept" / "epoch=1.ckpt.workers", server, run)
    else:
        name_folder(path, server, run)
        keep_files(path, server)
    belonging.unlink()
    root = tmp_path
    if place != "run":
        root = tmp_path / "resumed"
        root.mkdir()
    if place == "copied run":
        runs.rename(root / "async_localsgd")
    trainer = worker_of(root, 1)
    trainer.ckpt_path = str(path)
    checkpoint = {"optimizer_states": [{"state": {}, **trainer.optimizers[0].state_dict()}]}
    trainer.strategy.set_world_ranks()
    trainer.strategy.cluster_environment.set_global_rank(1)  # type: ignore[attr-defined]
    try:
        found = resume_optimizers(trainer, checkpoint, server)
    finally:
        trainer.strategy.cluster_environment.set_global_rank(0)  # type: ignore[attr-defined]
    assert found is not None
    assert found.name == belonging.name
    assert same(state_of(trainer), state)


# -------------------------------------------------------------- when rank 0 requests a save


def test_state_is_saved_when_rank_0_requests_it(tmp_path: Path) -> None:
    trainer = worker_of(tmp_path, 5, every=timedelta(days=1))
    runtime = runtime_of()
    saver = OptimizerStateSaver(trainer, runtime, strategy_of(trainer).checkpoint_every)
    end_round(saver, runtime, 3)
    assert files(tmp_path) == []
    runtime.worker.reply.save_request = 1
    end_round(saver, runtime, 4)
    end_round(saver, runtime, 5)
    assert [path.name for path in files(tmp_path)] == [saver._file_name]
    saver.close()


class FakeServer:
    """The parts of a server that the collector uses."""

    def __init__(self) -> None:
        self.requests = 0
        self.optimizer_files: dict[int, str] = {}
        self.live = [0, 1, 2]

    def request_saves(self) -> None:
        self.requests += 1


def name(worker: int, count: int) -> str:
    return f"worker-{worker}-{count:06d}-{worker * 1000 + count:064x}.pt"


def make(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for file_name in names:
        (folder / file_name).write_text(file_name)


def named(path: Path, run: Path, *names: str) -> tuple[dict[str, Any], Path]:
    state = server_state(1, *names)
    name_folder(path, state, run)
    return state, Path(state["worker_folder"])


def test_files_reported_after_a_checkpoint_replace_older_files(tmp_path: Path) -> None:
    run, path, server = tmp_path / "run", tmp_path / "some.ckpt", FakeServer()
    make(run, name(1, 1), name(1, 2), name(2, 1), name(1, 3))
    state, kept = named(path, run, name(1, 1))
    keep_files(path, state)
    collector = WorkerStateCollector(server)  # type: ignore[arg-type]
    collector.request(path, state)
    assert server.requests == collector.requests == 1
    server.optimizer_files = {1: name(1, 1)}
    collector.collect()
    assert [file.name for file in kept.iterdir()] == [name(1, 1)]
    server.optimizer_files = {1: name(1, 2)}
    collector.collect()
    server.optimizer_files = {1: name(1, 3), 2: name(2, 1)}
    collector.collect()
    # The first file after the checkpoint is the closest to it.
    assert sorted(file.name for file in kept.iterdir()) == [name(1, 2), name(2, 1)]
    assert collector._pending == []


def test_missing_worker_files_are_collected_at_the_end(tmp_path: Path) -> None:
    run, path = tmp_path / "run", tmp_path / "some.ckpt"
    make(run, name(1, 1), name(2, 1))
    state, kept = named(path, run)
    collector = WorkerStateCollector(FakeServer())  # type: ignore[arg-type]
    collector.request(path, state)
    collector.finish({1: name(1, 1), 2: name(2, 1)})
    assert sorted(file.name for file in kept.iterdir()) == [name(1, 1), name(2, 1)]


def test_no_worker_files_are_collected_for_a_removed_checkpoint(tmp_path: Path) -> None:
    run, path, server = tmp_path / "run", tmp_path / "some.ckpt", FakeServer()
    make(run, name(1, 1))
    state, kept = named(path, run)
    collector = WorkerStateCollector(server)  # type: ignore[arg-type]
    collector.request(path, state)
    collector.discard(path)
    server.optimizer_files = {1: name(1, 1)}
    collector.collect()
    assert collector._pending == []
    assert not kept.exists()


def test_no_saves_are_requested_without_a_run_folder(tmp_path: Path) -> None:
    server = FakeServer()
    collector = WorkerStateCollector(server)  # type: ignore[arg-type]
    collector.request(tmp_path / "some.ckpt", {})
    assert server.requests == collector.requests == 0
