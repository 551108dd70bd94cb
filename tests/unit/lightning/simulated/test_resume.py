"""Simulated runs that are resumed from a checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_async_localsgd import (
    Arrival,
    AsyncLocalSGDCallback,
    Death,
    StepSeconds,
)
from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy as Simulated
from tests.lightning_models import same_weights
from tests.unit.lightning.simulated.support import (
    SPEEDS,
    Model,
    NoSchedule,
    RunRecorder,
    SampleModel,
    fit,
)


def test_resumed_run_restores_the_state_of_each_worker(tmp_path: Path) -> None:
    def strategy() -> Simulated:
        speeds = [StepSeconds(seconds, 0.1) for seconds in SPEEDS]
        return Simulated(speeds, schedule=[Death(1, 1.0), Arrival(1.5, 0.2)], local_steps=5, checkpoint_every=None)

    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=15, save_top_k=-1)
    fit(strategy(), callbacks=[saving, AsyncLocalSGDCallback(table=False)], enable_checkpointing=True)
    path = tmp_path / "step=15.ckpt"
    saved = torch.load(path, weights_only=True)["async_localsgd"]["simulation"]
    assert saved["seconds"] > 1.5
    assert sorted(saved["workers"]) == ["0", "2", "3"], "worker 1 died for good"
    steps = {worker: int(state["optimizers"][0]["state"][0]["step"]) for worker, state in saved["workers"].items()}
    assert steps["0"] > steps["2"] > 0

    recorders = [RunRecorder(), RunRecorder()]
    runs = [fit(strategy(), ckpt_path=path, callbacks=[recorder])[0] for recorder in recorders]
    assert same_weights(*runs)
    assert recorders[0].seconds == recorders[1].seconds > saved["seconds"]
    assert sum(totals.steps for totals in recorders[0].totals.values()) == 90
    # The learning-rate schedule did not start again.
    assert all(rates[0] > 5e-3 for rates in runs[0].rates.values())


def test_each_fit_has_its_own_run_directory_and_last_is_the_newest(tmp_path: Path) -> None:
    def again(steps: int, ckpt_path: str | None = None) -> RunRecorder:
        recorder = RunRecorder()
        strategy = Simulated(SPEEDS, local_steps=5, checkpoint_every=1)
        options = {"callbacks": [recorder], "default_root_dir": tmp_path, "module": NoSchedule, "max_steps": steps}
        fit(strategy, ckpt_path, **options)
        return recorder

    again(10)
    again(20)
    folders = sorted((tmp_path / "async_localsgd").iterdir())
    assert len(folders) == 2
    assert all(list(folder.glob("rounds=*.ckpt")) for folder in folders)
    recorder = again(40, "last")
    assert sum(totals.steps for totals in recorder.totals.values()) == 120
    assert len(list((tmp_path / "async_localsgd").iterdir())) == 3


def test_simulation_resumes_the_checkpoint_of_a_live_run(tmp_path: Path) -> None:
    _, trainer = fit("async_localsgd", module=NoSchedule, max_steps=10)
    trainer.save_checkpoint(tmp_path / "live.ckpt")
    recorder = RunRecorder()
    strategy = Simulated([0.1, 0.1], local_steps=5)
    fit(strategy, module=NoSchedule, ckpt_path=tmp_path / "live.ckpt", max_steps=20, callbacks=[recorder])
    # Half of the run was done, whatever the number of workers was.
    assert recorder.seconds == pytest.approx(1.0)
    assert recorder.version > 2


def test_run_of_epochs_resumes_with_another_number_of_workers(tmp_path: Path) -> None:
    def run(workers: int, epochs: int, **options: Any) -> tuple[Model, L.Trainer]:
        data = DataLoader(TensorDataset(torch.randn(64, 8), torch.randn(64, 1), torch.arange(64)), batch_size=1)
        module = SampleModel()
        trainer = L.Trainer(
            strategy=Simulated([0.1] * workers, local_steps=4), accelerator="cpu", max_epochs=epochs,
            logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[ModelCheckpoint(tmp_path / f"{workers}-{epochs}", save_last=True)],
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=options.get("ckpt_path"))
        return module, trainer

    _, first = run(2, 2)
    assert first.global_step == 64
    for workers, left in ((2, 64), (4, 32), (1, 128)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module, trainer = run(workers, 4, ckpt_path=tmp_path / "2-2" / "last.ckpt")
        assert len(module.samples) == 2 * 64
        assert trainer.global_step == 64 + left, "the rest of the run, with the new number of workers"
        texts = [str(warning.message) for warning in caught if "The checkpoint's epochs had" in str(warning.message)]
        assert len(texts) == (0 if workers == 2 else 1)
