"""Simulated runs whose pushes and models travel with fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_async_localsgd import AsyncLocalSGDCallback, Link
from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy as Simulated
from tests.lightning_models import same_weights
from tests.unit.lightning.simulated.support import SPEEDS, NoSchedule, RunRecorder, fit


class Watch(RunRecorder):
    """Notes the bytes, the sizes of the model's parts, and the residuals at the end."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        runtime = trainer.strategy.runtime
        self.bytes = runtime.bytes_received, runtime.bytes_sent
        self.layout = runtime.binding.layout
        self.residuals = runtime.simulator.state_dict()["residuals"]


@pytest.mark.parametrize(("upload", "download"), [("bf16", "bf16"), ("int8", "fp32"), ("int4", "int8")])
def test_run_with_fewer_bits_learns_as_much(tmp_path: Path, upload: Any, download: Any) -> None:
    losses = []
    for kind in (("fp32", "fp32"), (upload, download)):
        watch = Watch()
        strategy = Simulated(SPEEDS, local_steps=5, upload=kind[0], download=kind[1])
        _, trainer = fit(strategy, max_steps=100, val_check_interval=20, callbacks=[watch])
        losses.append(float(trainer.callback_metrics["val_loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert set(watch.residuals) == {"0", "1", "2"}
    assert all(0 < float(residual.abs().max()) < 0.1 for residual in watch.residuals.values())


def test_bytes_and_seconds_are_those_of_the_packed_pushes_and_models() -> None:
    watches = {}
    for upload in ("fp32", "int8"):
        watches[upload] = watch = Watch()
        strategy = Simulated([1.0, 1.0], Link(0.0, 1e4), local_steps=5, grace=0.0, upload=upload)
        fit(strategy, max_steps=20, callbacks=[watch], module=NoSchedule)
    layout = watches["int8"].layout
    blocks = -(-layout.parameter_numel // 256)
    size = 260 * blocks + 4 * (layout.model_numel - layout.parameter_numel) + 2 * (layout.numel - layout.model_numel)
    assert watches["int8"].bytes[0] == 2 * 4 * size
    assert watches["fp32"].bytes[0] == 2 * 4 * 4 * layout.numel
    assert watches["int8"].bytes[1] == watches["fp32"].bytes[1]
    saved = 4 * (4 * layout.numel - size) / 1e4
    assert watches["fp32"].seconds - watches["int8"].seconds == pytest.approx(saved)


@pytest.mark.parametrize("overlap", [False, True])
def test_packed_run_is_replayed_bit_for_bit(tmp_path: Path, overlap: bool) -> None:
    options: dict[str, Any] = {"local_steps": 4, "upload": "int4", "download": "int8", "overlap": overlap}
    events = tmp_path / "events.jsonl"
    recorded, _ = fit(
        Simulated(SPEEDS, 0.2, **options), callbacks=[AsyncLocalSGDCallback(table=False, recording=events)]
    )
    again, _ = fit(Simulated(SPEEDS, 0.2, **options))
    replayed, _ = fit(Simulated(replay=events, **options))
    assert same_weights(recorded, again)
    assert same_weights(recorded, replayed)


def test_replay_needs_the_options_of_the_logged_run(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    fit(Simulated(SPEEDS, upload="int8"), callbacks=[AsyncLocalSGDCallback(table=False, recording=events)])
    with pytest.raises(ValueError, match=r"a run with upload='int8', but this strategy has upload='fp32'"):
        fit(Simulated(replay=events))


def test_resumed_workers_continue_from_their_residuals(tmp_path: Path) -> None:
    strategy = Simulated(SPEEDS, local_steps=5, upload="int4")
    fit(strategy, max_steps=20, callbacks=[Saver(tmp_path / "x.ckpt", 10)])
    residuals = Saver.residuals
    assert any(residual.any() for residual in residuals.values())

    check = FirstResiduals()
    fit(Simulated(SPEEDS, local_steps=5, upload="int4"), tmp_path / "x.ckpt", max_steps=20, callbacks=[check])

    assert check.residuals.keys() == residuals.keys()
    assert all(torch.equal(check.residuals[number], residual) for number, residual in residuals.items())


class Saver(L.Callback):
    """Saves a checkpoint at a global step, and notes the residuals."""

    residuals: dict[str, torch.Tensor]

    def __init__(self, path: Path, at: int) -> None:
        self.path, self.at = path, at

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step >= self.at and not self.path.exists():
            Saver.residuals = trainer.strategy.runtime.simulator.state_dict()["residuals"]
            trainer.save_checkpoint(self.path)


class FirstResiduals(L.Callback):
    """Notes the residuals before the first batch."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if not hasattr(self, "residuals"):
            self.residuals = trainer.strategy.runtime.simulator.state_dict()["residuals"]
