"""Rank 0's own checkpoints: when they are written, and that a valid checkpoint remains after any failure."""

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
from lightning_async_localsgd.lightning.checkpoints.contents import copy_to_host
from lightning_async_localsgd.lightning.checkpoints.interval import Interval
from lightning_async_localsgd.lightning.checkpoints.periodic import is_periodic
from lightning_async_localsgd.lightning.checkpoints.run_folder import newest_checkpoint
from lightning_async_localsgd.runtime.durable import verified
from tests.lightning_contract import checkpoints_job as job
from tests.lightning_models import loader, same_tensors

CRASHES = Path(__file__).with_name("crash_job.py")


def test_valid_checkpoint_remains_whenever_the_writer_is_killed(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, CRASHES, tmp_path], stdout=subprocess.PIPE, text=True, timeout=120, check=True
    )
    crashes = [json.loads(line) for line in ran.stdout.splitlines()]
    *killed, survived = crashes
    assert len(killed) > 150, "writes, fsyncs, renames, links and removals of three checkpoints"
    assert {crash["code"] for crash in killed} == {-9}
    for crash in crashes:
        # The newest valid checkpoint is the last completed one, or the one that was being written.
        assert crash["complete"] <= crash["rounds"] <= crash["complete"] + 1, crash
        if crash["rounds"]:
            assert crash["whole"], crash
            assert crash["inner"], crash
            assert crash["kept"] <= 3, crash
            assert crash["leftovers"] <= 1, crash
    assert survived["complete"] == survived["rounds"] == 3
    assert survived["kept"] == 2
    assert survived["leftovers"] == 0


def test_interval_is_a_number_of_rounds_or_a_time() -> None:
    now = [0.0]
    rounds = Interval(5, rounds=100, clock=lambda: now[0])
    assert not rounds.is_over(104)
    assert rounds.is_over(105)
    rounds.restart(107)
    assert not rounds.is_over(111)
    seconds = Interval(timedelta(minutes=2), rounds=0, clock=lambda: now[0])
    now[0] = 119.9
    assert not seconds.is_over(10_000)
    now[0] = 120.0
    assert seconds.is_over(0)
    seconds.restart(0)
    assert not seconds.is_over(0)


def test_copy_on_the_host_does_not_change_and_keeps_tied_tensors() -> None:
    weight, flat = torch.ones(3, requires_grad=True), torch.zeros(1000)
    tree = {"first": weight, "tied": weight, "view": flat[10:13], "list": [(flat[:2],)], "number": 3, "text": "x"}
    copy = copy_to_host(tree)
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


class FastDisk(L.Callback):
    """Waits at each step until no checkpoint is being written, so that none is skipped on a slow disk."""

    def on_train_batch_end(self, *_: Any) -> None:
        for thread in threading.enumerate():
            if thread.name == "async_localsgd-writer":
                thread.join(60)


def fit(root: Path, *callbacks: L.Callback, every: Any = 3, ckpt_path: Any = None, **options: Any) -> L.Trainer:
    """Run 15 rounds of three steps."""
    L.seed_everything(1, verbose=False)
    strategy = AsyncLocalSGDStrategy(local_steps=3, checkpoint_every=every)
    trainer = job.trainer_of(root, *callbacks, strategy=strategy, devices=1, **{"max_steps": 45, **options})
    trainer.fit(job.Module(), loader(), ckpt_path=ckpt_path)
    return trainer


def checkpoints_in(root: Path) -> list[Path]:
    return sorted(root.glob("async_localsgd/*/rounds=*.ckpt"))


def rounds_of(path: Path) -> int:
    return int(path.name.split("=")[1].split("-")[0])


def test_two_newest_checkpoints_are_kept_and_any_strategy_can_load_them(tmp_path: Path) -> None:
    trainer = fit(tmp_path, FastDisk())
    written = checkpoints_in(tmp_path)
    assert [rounds_of(path) for path in written] == [12, 15], "the last checkpoint is written at the end"
    assert all(verified(path) and is_periodic(path) for path in written)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("async_localsgd")]
    assert [type(callback) for callback in trainer.callbacks] == [FastDisk, AsyncLocalSGDCallback]  # type: ignore[attr-defined]
    checkpoint = torch.load(written[0], weights_only=True)
    assert checkpoint["global_step"] == checkpoint["async_localsgd"]["budget"]["done"] == 36
    # Tensors share no memory with the model, and no larger storage was written.
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in checkpoint["state_dict"].values())

    plain = job.trainer_of(tmp_path, strategy="auto", devices=1, max_steps=40)
    plain.fit(job.Module(), loader(), ckpt_path=written[0])
    assert plain.global_step == 40
    assert torch.load(written[1], weights_only=True)["global_step"] == 45


def test_complete_run_is_not_trained_again(tmp_path: Path) -> None:
    whole = fit(tmp_path)
    again = fit(tmp_path, ckpt_path="last")
    assert again.global_step == 45
    assert same_tensors(job.copied(whole.lightning_module), job.copied(again.lightning_module))


def test_checkpoint_that_the_run_was_resumed_from_is_kept(tmp_path: Path) -> None:
    fit(tmp_path, max_steps=18)
    [first, *_] = checkpoints_in(tmp_path)
    trainer = fit(tmp_path, ckpt_path=first)
    assert trainer.ckpt_path == first
    assert first.exists()


@pytest.mark.parametrize("every", [None, timedelta(minutes=10), 1000])
def test_nothing_is_written_before_the_interval_is_over(tmp_path: Path, every: Any) -> None:
    fit(tmp_path, every=every)
    assert not (tmp_path / "async_localsgd").exists()


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    fit(tmp_path, every=1, fast_dev_run=9)
    assert not (tmp_path / "async_localsgd").exists()


def test_run_resumed_from_last_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", every=None)
    with pytest.raises(RuntimeError, match="a fault of the user's"):
        fit(tmp_path / "rest", Fails(24, RuntimeError("a fault of the user's")))
    assert max(map(rounds_of, checkpoints_in(tmp_path / "rest"))) == 8, (
        "the last checkpoint is written at the interruption"
    )
    rest = fit(tmp_path / "rest", ckpt_path="last")
    assert same_tensors(job.copied(whole.lightning_module), job.copied(rest.lightning_module))


def test_interruption_before_the_first_round_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="early"):
        fit(tmp_path, Fails(2, RuntimeError("early")))
    assert not checkpoints_in(tmp_path)


def test_full_disk_is_logged_and_training_continues(
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
    assert "No space left on device; training continues" in caplog.text
    written = checkpoints_in(tmp_path)
    assert written
    assert all(map(verified, written))
    assert not list(tmp_path.rglob(".unfinished-*"))


class BadHook(job.Module):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        raise ZeroDivisionError("in the user's hook")


def test_hook_that_fails_in_a_periodic_checkpoint_does_not_end_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = AsyncLocalSGDStrategy(local_steps=3, checkpoint_every=3)
    trainer = job.trainer_of(tmp_path, strategy=strategy, devices=1, max_steps=15)
    trainer.fit(BadHook(), loader())
    assert "ZeroDivisionError: in the user's hook" in caplog.text
    assert trainer.global_step == 15


def test_no_checkpoint_begins_while_the_previous_one_is_being_written(
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
                assert not checkpoints_in(tmp_path)
                go.set()

    monkeypatch.setattr(os, "fsync", slow)
    fit(tmp_path, Opens(), every=2)
    assert rounds_of(checkpoints_in(tmp_path)[-1]) == 15


class Foreign(TorchCheckpointIO):
    """Writes and reads a format of its own."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).write_text("foreign")

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        raise AssertionError("periodic checkpoints are not in this format")


@pytest.mark.parametrize("plugin", [AsyncCheckpointIO, Foreign])
def test_run_with_another_checkpoint_plugin_can_be_resumed(tmp_path: Path, plugin: Any) -> None:
    with pytest.raises(RuntimeError, match="halfway"):
        fit(tmp_path, Fails(21, RuntimeError("halfway")), plugins=[plugin()])
    trainer = fit(tmp_path, ckpt_path="last", plugins=[plugin()])
    assert trainer.global_step == 45


def test_damaged_checkpoint_is_refused_and_the_previous_one_is_named(tmp_path: Path) -> None:
    fit(tmp_path, FastDisk())
    older, newer = checkpoints_in(tmp_path)
    newer.write_bytes(newer.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"is damaged.*newest intact checkpoint there is ") as caught:
        fit(tmp_path, ckpt_path=newer)
    assert str(older) in str(caught.value)
    assert newest_checkpoint(tmp_path / "async_localsgd") == older


def test_checkpoints_contain_whole_optimizer_steps(tmp_path: Path) -> None:
    fit(tmp_path, accumulate_grad_batches=4, every=2)
    for path in checkpoints_in(tmp_path):
        progress = torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        assert progress["current"]["processed"] % 4 == 0
