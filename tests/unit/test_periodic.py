"""Rank 0's own checkpoints: a valid one is there whatever dies, when they are due, and what happens where they fail."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_async_localsgd import AsyncLocalSGDCallback, AsyncLocalSGDStrategy
from lightning_async_localsgd.checkpoints import on_host
from lightning_async_localsgd.durable import verified
from lightning_async_localsgd.interval import Interval
from lightning_async_localsgd.periodic import is_periodic
from lightning_async_localsgd.run_folder import newest_checkpoint
from tests.lightning_contract import checkpoints_job as job

CRASHES = Path(__file__).with_name("crash_job.py")


def test_a_valid_checkpoint_is_there_whenever_the_writer_is_killed(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, CRASHES, tmp_path], stdout=subprocess.PIPE, text=True, timeout=120, check=True
    )
    crashes = [json.loads(line) for line in ran.stdout.splitlines()]
    *killed, survived = crashes
    assert len(killed) > 150, "writes, fsyncs, renames, links and removals of three checkpoints"
    assert {one["code"] for one in killed} == {-9}
    for one in crashes:
        # The newest of those that were complete, or the one that was just being written and is complete already.
        assert one["complete"] <= one["rounds"] <= one["complete"] + 1, one
        if one["rounds"]:
            assert one["whole"], one
            assert one["inner"], one
            assert one["kept"] <= 3, one
            assert one["leftovers"] <= 1, one
    assert survived["complete"] == survived["rounds"] == 3
    assert survived["kept"] == 2
    assert survived["leftovers"] == 0


def test_intervals_are_of_rounds_or_of_time() -> None:
    now = [0.0]
    rounds = Interval(5, rounds=100, clock=lambda: now[0])
    assert not rounds.over(104)
    assert rounds.over(105)
    rounds.begin(107)
    assert not rounds.over(111)
    seconds = Interval(timedelta(minutes=2), rounds=0, clock=lambda: now[0])
    now[0] = 119.9
    assert not seconds.over(10_000)
    now[0] = 120.0
    assert seconds.over(0)
    seconds.begin(0)
    assert not seconds.over(0)


def test_a_snapshot_does_not_change_and_keeps_ties() -> None:
    weight, flat = torch.ones(3, requires_grad=True), torch.zeros(1000)
    tree = {"first": weight, "tied": weight, "view": flat[10:13], "list": [(flat[:2],)], "number": 3, "text": "x"}
    copy = on_host(tree)
    with torch.no_grad():
        weight += 1
        flat += 1
    assert copy["first"] is copy["tied"]
    assert not copy["first"].requires_grad
    assert copy["first"].tolist() == [1, 1, 1]
    assert copy["view"].tolist() == [0, 0, 0]
    assert copy["view"].untyped_storage().nbytes() == 12
    assert copy["list"][0][0].tolist() == [0, 0]
    assert (copy["number"], copy["text"]) == (3, "x")


# ----------------------------------------------------------------------- one worker's runs


class Fails(L.Callback):
    """Raises at a step."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step = step
        self.error = error

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error


def fit(root: Path, *callbacks: L.Callback, every: Any = 3, ckpt_path: Any = None, **options: Any) -> L.Trainer:
    """Three steps are a round, 15 rounds the whole run."""
    L.seed_everything(1, verbose=False)
    strategy = AsyncLocalSGDStrategy(local_steps=3, checkpoint_every=every)
    trainer = job.trainer_of(root, *callbacks, strategy=strategy, devices=1, **{"max_steps": 45, **options})
    trainer.fit(job.Module(), job.loader(), ckpt_path=ckpt_path)
    return trainer


def left_in(root: Path) -> list[Path]:
    return sorted(root.glob("async_localsgd/*/rounds=*.ckpt"))


def rounds_of(path: Path) -> int:
    return int(path.name.split("=")[1].split("-")[0])


def test_the_two_newest_are_kept_and_are_ordinary_checkpoints(tmp_path: Path) -> None:
    trainer = fit(tmp_path)
    left = left_in(tmp_path)
    assert [rounds_of(path) for path in left] == [12, 15], "one more, at the end"
    assert all(verified(path) and is_periodic(path) for path in left)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("async_localsgd")]
    assert [type(one) for one in trainer.callbacks] == [AsyncLocalSGDCallback]  # type: ignore[attr-defined]
    checkpoint = torch.load(left[0], weights_only=True)
    assert checkpoint["global_step"] == checkpoint["async_localsgd"]["budget"]["done"] == 36
    # Nothing of it is shared with anything that goes on changing, and nothing larger than itself was written.
    assert all(one.untyped_storage().nbytes() == one.nbytes for one in checkpoint["state_dict"].values())

    plain = job.trainer_of(tmp_path, strategy="auto", devices=1, max_steps=40)
    plain.fit(job.Module(), job.loader(), ckpt_path=left[0])
    assert plain.global_step == 40
    assert torch.load(left[1], weights_only=True)["global_step"] == 45


def test_a_complete_run_is_not_trained_again(tmp_path: Path) -> None:
    whole = fit(tmp_path)
    again = fit(tmp_path, ckpt_path="last")
    assert again.global_step == 45
    assert job.same(job.copied(whole.lightning_module), job.copied(again.lightning_module))


def test_what_the_run_was_resumed_from_stays(tmp_path: Path) -> None:
    fit(tmp_path, max_steps=18)
    [first, *_] = left_in(tmp_path)
    trainer = fit(tmp_path, ckpt_path=first)
    assert trainer.ckpt_path == first
    assert first.exists()


@pytest.mark.parametrize("every", [None, timedelta(minutes=10), 1000])
def test_nothing_is_written_where_nothing_is_due(tmp_path: Path, every: Any) -> None:
    fit(tmp_path, every=every)
    assert not (tmp_path / "async_localsgd").exists()


def test_a_trial_run_writes_nothing(tmp_path: Path) -> None:
    fit(tmp_path, every=1, fast_dev_run=9)
    assert not (tmp_path / "async_localsgd").exists()


def test_an_interrupted_run_goes_on_from_last_and_equals_a_whole_one(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", every=None)
    with pytest.raises(RuntimeError, match="a fault of the user's"):
        fit(tmp_path / "rest", Fails(24, RuntimeError("a fault of the user's")))
    assert max(map(rounds_of, left_in(tmp_path / "rest"))) == 8, "one more, at the interruption"
    rest = fit(tmp_path / "rest", ckpt_path="last")
    assert job.same(job.copied(whole.lightning_module), job.copied(rest.lightning_module))


def test_an_interruption_with_nothing_new_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="early"):
        fit(tmp_path, Fails(2, RuntimeError("early")))
    assert not left_in(tmp_path)


def test_a_full_disk_is_said_counted_and_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, writes = os.write, []

    def full_for_a_while(descriptor: int, data: Any) -> int:
        if threading.current_thread().name == "async_localsgd-writer":
            writes.append(len(data))
            if len(writes) < 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", full_for_a_while)
    with caplog.at_level(logging.ERROR):
        trainer = fit(tmp_path)
    assert trainer.global_step == 45
    assert "the periodic checkpoint could not be written" in caplog.text
    assert "No space left on device; training goes on" in caplog.text
    left = left_in(tmp_path)
    assert left
    assert all(map(verified, left))
    assert not list(tmp_path.rglob(".unfinished-*"))


class BadHook(job.Module):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        raise ZeroDivisionError("in the user's hook")


def test_a_hook_that_fails_in_a_checkpoint_nobody_asked_for_does_not_end_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = AsyncLocalSGDStrategy(local_steps=3, checkpoint_every=3)
    trainer = job.trainer_of(tmp_path, strategy=strategy, devices=1, max_steps=15)
    trainer.fit(BadHook(), job.loader())
    assert "ZeroDivisionError: in the user's hook" in caplog.text
    assert trainer.global_step == 15


def test_a_new_one_is_not_begun_while_the_last_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, go, syncs = os.fsync, threading.Event(), []

    def slow(descriptor: int) -> None:
        if threading.current_thread().name == "async_localsgd-writer":
            syncs.append(descriptor)
            assert go.wait(60)
        real(descriptor)

    class Opens(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 41:
                assert len(syncs) == 1
                assert not left_in(tmp_path)
                go.set()

    monkeypatch.setattr(os, "fsync", slow)
    fit(tmp_path, Opens(), every=2)
    assert rounds_of(left_in(tmp_path)[-1]) == 15


class Foreign(TorchCheckpointIO):
    """Writes, and understands, a format of its own."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).write_text("foreign")

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        raise AssertionError("this is not of its format")


@pytest.mark.parametrize("plugin", [AsyncCheckpointIO, Foreign])
def test_any_plugin_for_checkpoints_goes_on_from_them(tmp_path: Path, plugin: Any) -> None:
    with pytest.raises(RuntimeError, match="halfway"):
        fit(tmp_path, Fails(21, RuntimeError("halfway")), plugins=[plugin()])
    trainer = fit(tmp_path, ckpt_path="last", plugins=[plugin()])
    assert trainer.global_step == 45


def test_a_damaged_one_is_refused_by_name_and_the_one_before_is_named(tmp_path: Path) -> None:
    fit(tmp_path)
    older, newer = left_in(tmp_path)
    newer.write_bytes(newer.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"is damaged.*newest complete one there is ") as caught:
        fit(tmp_path, ckpt_path=newer)
    assert str(older) in str(caught.value)
    assert newest_checkpoint(tmp_path / "async_localsgd") == older


def test_accumulated_batches_are_not_torn_apart(tmp_path: Path) -> None:
    fit(tmp_path, accumulate_grad_batches=4, every=2)
    for path in left_in(tmp_path):
        progress = torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        assert progress["current"]["processed"] % 4 == 0
