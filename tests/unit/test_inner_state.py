"""States of workers' inner optimizers: what is saved when, what is found again, and what is kept beside checkpoints."""

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

from lightning_async_localsgd import AsyncLocalSGDStrategy, inner_state
from lightning_async_localsgd.companions import AwaitedStates, beside, keep_beside, names_in, remove_beside
from lightning_async_localsgd.durable import verified
from lightning_async_localsgd.exchange import ExchangeError
from lightning_async_localsgd.inner_state import InnerStates, resume
from tests.lightning_contract import checkpoints_job as job


class Two(job.Module):
    """Two optimizers, stepped by hand."""

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
    """A trainer whose optimizers have taken so many steps."""
    L.seed_everything(steps, verbose=False)
    strategy = AsyncLocalSGDStrategy(local_steps=3, checkpoint_every=options.pop("every", 4))
    # Lightning counts the steps of all optimizers.
    limit = 2 * steps if isinstance(module, Two) else steps
    trainer = job.trainer_of(root, strategy=strategy, devices=1, max_steps=limit, **options)
    trainer.fit(module or job.Module(), job.loader())
    strategy.run_name = "run"
    return trainer


def phase_of(number: int = 1) -> Any:
    worker = SimpleNamespace(
        number=number, session="s", reply=SimpleNamespace(version=0, asked=0), round_steps=0, total_steps=9,
        diverged=False, inner=str, interruptions=0,
    )  # fmt: skip

    def interrupt() -> None:
        worker.interruptions += 1

    worker.interrupt = interrupt
    return SimpleNamespace(worker=worker, stopped=False)


def end_round(states: InnerStates, phase: Any, version: int) -> None:
    phase.worker.reply.version = version
    states.on_train_batch_end()
    assert states._writer is not None
    assert states._writer.wait(30)


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


def test_a_state_is_saved_at_the_end_of_a_round_when_it_is_due(tmp_path: Path) -> None:
    trainer, phase = worker_of(tmp_path, 5), phase_of()
    states = InnerStates(trainer, phase)
    for version in range(1, 4):
        end_round(states, phase, version)
    assert files(tmp_path) == []
    phase.worker.round_steps = 2
    end_round(states, phase, 4)
    assert files(tmp_path) == [], "in the midst of a round"
    phase.worker.round_steps = 0
    for version in (5, 9, 13, 17, 21):
        end_round(states, phase, version)
    found = files(tmp_path)
    assert [path.name[:15] for path in found] == [f"worker-1-{n:06d}" for n in (3, 4, 5)], "three are kept"
    assert phase.worker.inner() == found[-1].name
    assert phase.worker.interruptions == 5, "it is no computing"
    assert all(verified(path) and stat.S_IMODE(path.stat().st_mode) == 0o600 for path in found)
    state = torch.load(found[-1], weights_only=True)
    assert (state["worker"], state["session"], state["version"]) == (1, "s", 21)
    assert same([one["state"] for one in state["optimizers"]], state_of(trainer))
    states.release()
    assert states not in trainer.callbacks  # type: ignore[attr-defined]


def test_a_disk_that_hangs_at_the_end_is_said_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(inner_state, "_SECONDS_AT_THE_END", 0.05)
    trainer, phase = worker_of(tmp_path, 1), phase_of()
    states = InnerStates(trainer, phase)
    end_round(states, phase, 4)
    before = phase.worker.inner()
    assert before
    assert states._writer is not None
    back = threading.Event()
    states._writer.begin(lambda: back.wait(60) or None)
    assert states.finish() == before
    writer = states._writer
    states.release()
    assert "is still being written" in caplog.text
    back.set()
    assert writer.wait(30)


def test_none_saves_nothing_and_time_is_an_interval_too(tmp_path: Path) -> None:
    for every in (None, timedelta(hours=1)):
        trainer, phase = worker_of(tmp_path, 1, every=every), phase_of()
        states = InnerStates(trainer, phase)
        phase.worker.reply.version = 1000
        states.on_train_batch_end()
        states.release()
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
def test_an_orderly_end_saves_and_what_may_be_the_reason_does_not(
    tmp_path: Path, error: BaseException, diverged: bool, saves: bool, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, phase = worker_of(tmp_path, 2), phase_of()
    phase.worker.diverged = diverged
    states = InnerStates(trainer, phase)
    with caplog.at_level(logging.WARNING):
        states.on_exception(trainer, trainer.lightning_module, error)
    states.release()
    assert len(files(tmp_path)) == saves
    assert ("has no server any more" in caplog.text) == (isinstance(error, ExchangeError) and not diverged)
    if saves:
        assert str(files(tmp_path)[0]) in caplog.text


# -------------------------------------------------------------------------- joining again


def joining(trainer: L.Trainer) -> L.Trainer:
    trainer.strategy._entry = object()  # type: ignore[attr-defined]
    return trainer


def saved_after(root: Path, steps: int, module: job.Module | None = None, **options: Any) -> list[Any]:
    """A worker takes steps and saves; returns its optimizers' states."""
    trainer, phase = worker_of(root, steps, module, **options), phase_of()
    states = InnerStates(trainer, phase)
    end_round(states, phase, 100)
    states.release()
    return state_of(trainer)


def test_who_takes_a_workers_place_begins_with_its_newest_state(tmp_path: Path) -> None:
    saved_after(tmp_path, 3)
    state = saved_after(tmp_path, 7)
    trainer, phase = joining(worker_of(tmp_path, 1)), phase_of()
    trainer.optimizers[0].param_groups[0]["lr"] = 0.125
    states = InnerStates(trainer, phase)
    assert same(state_of(trainer), state)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.125, "learning rates follow the progress of all"
    assert phase.worker.inner() == files(tmp_path)[-1].name, "it goes on being reported"
    states.release()


def test_several_optimizers_and_a_gradient_scaler_come_back(tmp_path: Path) -> None:
    def scaled(scale: float) -> list[Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=99)
        return [MixedPrecision("16-mixed", "cpu", scaler=scaler)]

    state = saved_after(tmp_path, 4, Two(), plugins=scaled(256.0))
    assert len(state) == 2
    trainer = joining(worker_of(tmp_path, 1, Two(), plugins=scaled(8.0)))
    InnerStates(trainer, phase_of()).release()
    assert same(state_of(trainer), state)
    assert trainer.precision_plugin.state_dict()["scale"] == 256.0


def test_a_damaged_state_is_passed_over_and_without_any_it_is_fresh(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older = saved_after(tmp_path, 3)
    saved_after(tmp_path, 7)
    first, second = files(tmp_path)
    second.write_bytes(second.read_bytes()[:100])
    trainer = joining(worker_of(tmp_path, 1))
    InnerStates(trainer, phase_of()).release()
    assert same(state_of(trainer), older)
    assert f"{second} is damaged" in caplog.text
    first.unlink()
    second.unlink()
    trainer = joining(worker_of(tmp_path, 1))
    before = state_of(trainer)
    InnerStates(trainer, phase_of()).release()
    assert same(state_of(trainer), before)
    assert "worker 1 joins with a fresh optimizer state: none was saved" in caplog.text


def test_a_state_of_other_optimizers_is_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved_after(tmp_path, 3, Two())
    trainer = joining(worker_of(tmp_path, 1))
    before = state_of(trainer)
    InnerStates(trainer, phase_of()).release()
    assert same(state_of(trainer), before)
    assert "does not fit this worker's optimizers" in caplog.text


# ---------------------------------------------------------------------------- resuming


def test_a_resumed_worker_takes_the_learning_rate_of_the_checkpoint(tmp_path: Path) -> None:
    state = saved_after(tmp_path, 6)
    [name] = [path.name for path in files(tmp_path)]
    trainer = worker_of(tmp_path, 1)
    trainer.ckpt_path = str(tmp_path / "elsewhere.ckpt")
    groups = [{**trainer.optimizers[0].state_dict()["param_groups"][0], "lr": 0.25}]
    checkpoint = {"optimizer_states": [{"state": {}, "param_groups": groups}]}
    trainer.strategy.set_world_ranks()
    trainer.strategy.cluster_environment.set_global_rank(1)  # type: ignore[attr-defined]
    server = {"initial_workers": 2, "inner_states": {"1": name}, "folder": "run"}
    try:
        assert resume(trainer, checkpoint, server) == files(tmp_path)[0]
        assert same(state_of(trainer), state)
        assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25
        # Without any it begins with a fresh one, at the same rate.
        fresh = worker_of(tmp_path, 1)
        fresh.ckpt_path = None
        fresh.strategy.cluster_environment.set_global_rank(1)  # type: ignore[attr-defined]
        assert resume(fresh, checkpoint, {**server, "inner_states": {}, "folder": "other"}) is None
        assert fresh.optimizers[0].param_groups[0]["lr"] == 0.25
    finally:
        trainer.strategy.cluster_environment.set_global_rank(0)  # type: ignore[attr-defined]


def test_a_resumed_state_stays_until_another_one_is_reported(tmp_path: Path) -> None:
    for steps in (3, 5, 7):
        saved_after(tmp_path, steps)
    first = files(tmp_path)[0]
    trainer, phase = worker_of(tmp_path, 1), phase_of()
    trainer.strategy.inner_file = first  # type: ignore[attr-defined]
    states = InnerStates(trainer, phase)
    assert phase.worker.inner() == first.name
    end_round(states, phase, 100)
    states.release()
    assert first.exists(), "the server's next checkpoint may still name it"
    assert phase.worker.inner().startswith("worker-1-000004-")


# ------------------------------------------------------------------- beside a checkpoint

HASH = "0123456789abcdef" * 4


def test_names_that_come_over_the_network_are_no_paths() -> None:
    good = f"worker-3-000012-{HASH}.pt"
    bad = ["../../etc/passwd", f"{good}/..", f"/{good}", "", good.replace("worker-3", "worker-4")]
    assert names_in({"inner_states": {"3": good}}) == {3: good}
    for name in bad:
        assert names_in({"inner_states": {"3": name}}) == {}
    assert names_in({}) == {}


def test_states_are_kept_beside_a_checkpoint_and_go_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    names = [f"worker-{n}-000001-{HASH}.pt" for n in (1, 2, 3)]
    for name in names[:2]:
        (folder / name).write_text(name)
    path = tmp_path / "kept" / "epoch=1.ckpt"
    server = {"inner_states": {str(n): name for n, name in enumerate(names, start=1)}}
    keep_beside(path, server, folder)
    place = beside(path)
    assert place is not None
    assert place == tmp_path / "kept" / "epoch=1.ckpt.workers"
    assert sorted(one.name for one in place.iterdir()) == names[:2], "the third is on another host"
    assert (place / names[0]).samefile(folder / names[0])
    # The same path is written again, as "last.ckpt" is.
    keep_beside(path, {"inner_states": {"2": names[1]}}, folder)
    assert [one.name for one in place.iterdir()] == [names[1]]
    (folder / names[1]).unlink()
    assert (place / names[1]).read_text() == names[1]
    remove_beside(path)
    assert not place.exists()
    remove_beside(path)


def test_checkpoints_that_are_on_no_disk_have_nothing_beside_them(tmp_path: Path) -> None:
    assert beside("s3://bucket/last.ckpt") is None
    keep_beside("s3://bucket/last.ckpt", {"inner_states": {"1": f"worker-1-000001-{HASH}.pt"}}, tmp_path)
    remove_beside("s3://bucket/last.ckpt")
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------ when rank 0 asks


def test_a_state_is_saved_when_rank_0_asks_for_it(tmp_path: Path) -> None:
    trainer = worker_of(tmp_path, 5, every=timedelta(days=1))
    phase = phase_of()
    states = InnerStates(trainer, phase)
    end_round(states, phase, 3)
    assert files(tmp_path) == []
    phase.worker.reply.asked = 1
    end_round(states, phase, 4)
    end_round(states, phase, 5)
    assert [path.name for path in files(tmp_path)] == [states._name]
    states.release()


class Told:
    """A server's answers to the questions that the one who keeps files asks."""

    def __init__(self) -> None:
        self.asked = 0
        self.names: dict[int, str] = {}
        self.live = [0, 1, 2]

    def ask_for_inner_states(self) -> None:
        self.asked += 1

    def ask(self, question: Any) -> Any:
        return question(SimpleNamespace(attendance=SimpleNamespace(inner_states=self.names), live=self.live))


def name(worker: int, count: int) -> str:
    return f"worker-{worker}-{count:06d}-{worker * 1000 + count:064x}.pt"


def make(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for one in names:
        (folder / one).write_text(one)


def test_what_is_reported_after_a_checkpoint_takes_the_place_of_older_files(tmp_path: Path) -> None:
    run, path, server = tmp_path / "run", tmp_path / "some.ckpt", Told()
    make(run, name(1, 1), name(1, 2), name(2, 1), name(1, 3))
    path.write_text("checkpoint")
    state = {"inner_states": {"1": name(1, 1)}}
    keep_beside(path, state, run)
    awaited = AwaitedStates(server, run)  # type: ignore[arg-type] # what it asks of one
    awaited.ask(path, state)
    assert server.asked == awaited.asked == 1
    place = beside(path)
    assert place is not None
    server.names = {1: name(1, 1)}
    awaited.look()
    assert [one.name for one in place.iterdir()] == [name(1, 1)]
    server.names = {1: name(1, 2)}
    awaited.look()
    server.names = {1: name(1, 3), 2: name(2, 1)}
    awaited.look()
    # The first one after the checkpoint is the nearest to it.
    assert sorted(one.name for one in place.iterdir()) == [name(1, 2), name(2, 1)]
    assert awaited._pending == []


def test_the_end_completes_what_is_still_awaited(tmp_path: Path) -> None:
    run, path = tmp_path / "run", tmp_path / "some.ckpt"
    make(run, name(1, 1), name(2, 1))
    path.write_text("checkpoint")
    awaited = AwaitedStates(Told(), run)  # type: ignore[arg-type] # what it asks of one
    awaited.ask(path, {"inner_states": {}})
    awaited.finish({1: name(1, 1), 2: name(2, 1)})
    place = beside(path)
    assert place is not None
    assert sorted(one.name for one in place.iterdir()) == [name(1, 1), name(2, 1)]


def test_a_checkpoint_that_was_removed_is_not_awaited_for(tmp_path: Path) -> None:
    run, path, server = tmp_path / "run", tmp_path / "some.ckpt", Told()
    make(run, name(1, 1))
    awaited = AwaitedStates(server, run)  # type: ignore[arg-type] # what it asks of one
    awaited.ask(path, {"inner_states": {}})
    awaited.forget(path)
    server.names = {1: name(1, 1)}
    awaited.look()
    assert awaited._pending == []
    assert not (tmp_path / "some.ckpt.workers").exists()


def test_without_a_folder_nothing_is_asked_for(tmp_path: Path) -> None:
    server = Told()
    awaited = AwaitedStates(server, None)  # type: ignore[arg-type] # what it asks of one
    awaited.ask(tmp_path / "some.ckpt", {})
    assert server.asked == awaited.asked == 0
