"""The run's own metrics in the loggers that people use, and rules for names that these have."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_async_localsgd import AsyncLocalSGDCallback
from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy as Simulated
from lightning_async_localsgd.lightning.callback import run_metrics
from tests.unit.lightning.simulated.support import SPEEDS, fit

PER_WORKER = ("staleness", "local_steps", "wait_seconds", "exchange_seconds", "steps_per_second")


class Values:
    """Has any attribute, with a number."""

    def __getattr__(self, name: str) -> float:
        if name.startswith("__"):
            raise AttributeError(name)
        return 1.0


def every_metric(per_worker: bool) -> dict[str, float]:
    """Return the metrics of a run in which everything has happened."""
    runtime: Any = Values()
    view: Any = Values()
    view.workers = {0: Values(), 1: Values()}
    view.refusals = {"not_finite": 1, "too_large": 2}
    runtime.server = SimpleNamespace(snapshot=view)
    return run_metrics(runtime, per_worker)


def test_no_name_is_a_folder_of_another_and_all_loggers_take_them() -> None:
    names = list(every_metric(per_worker=True))
    for first, second in itertools.permutations(names, 2):
        assert not second.startswith(f"{first}/")
    assert all(re.fullmatch(r"[A-Za-z0-9_./ -]+", name) for name in names), "MLflow takes no other characters"


def test_workers_own_values_are_logged_on_request_only() -> None:
    every, few = every_metric(per_worker=True), every_metric(per_worker=False)
    own = {f"async/{name}/worker_{n}" for name in PER_WORKER for n in (0, 1)}
    assert every.keys() - few.keys() == own
    assert {f"async/{name}/mean" for name in PER_WORKER} <= few.keys()


def train(logger: Any) -> dict[str, float]:
    """Train with a logger, and return the names that its metrics must have."""
    callback = AsyncLocalSGDCallback(table=False, per_worker=True)
    _, trainer = fit(Simulated(SPEEDS, local_steps=5), logger=logger, log_every_n_steps=5, callbacks=[callback])
    names = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("async/")}
    assert "async/staleness/worker_2" in names
    return names


def test_csv(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    names = train(logger)
    header = Path(logger.log_dir, "metrics.csv").read_text().partition("\n")[0].split(",")
    assert names.keys() <= set(header)


def test_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path)
    names = train(logger)
    events = accumulator.EventAccumulator(logger.log_dir).Reload()
    assert names.keys() <= set(events.Tags()["scalars"])


def test_mlflow_with_its_file_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # Newer releases want to be asked for.
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}", save_dir=str(tmp_path))
    names = train(logger)
    metrics = logger.experiment.get_run(logger.run_id).data.metrics
    assert metrics["async/version"] > 0
    assert names.keys() <= metrics.keys()


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    names = train(logger)
    logged = dict(logger.experiment.summary)
    wandb.finish()
    assert names.keys() <= logged.keys()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
