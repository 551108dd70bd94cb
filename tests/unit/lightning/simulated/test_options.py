"""Options of the simulated strategy, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import StochasticWeightAveraging

from lightning_async_localsgd import (
    AsyncLocalSGDCallback,
    Death,
    Link,
    StepSeconds,
)
from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy as Simulated
from tests.unit.lightning.simulated.support import SPEEDS, Model, fit, loader


def test_recording_needs_its_own_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"recording=.* must be the path of a file"):
        AsyncLocalSGDCallback(recording=tmp_path)
    with pytest.raises(ValueError, match="events and recording are both"):
        AsyncLocalSGDCallback(events=tmp_path / "a", recording=tmp_path / "a")


def test_replay_cannot_be_combined_with_times(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seconds_per_step, schedule"):
        Simulated([1.0], schedule=[Death(0, 1.0)], replay=tmp_path / "events.jsonl")


def test_invalid_option_is_refused_with_name_and_value() -> None:
    with pytest.raises(ValueError, match=r"the trainer has 2 devices; set devices=1"):
        L.Trainer(strategy=Simulated([0.1, 0.2]), accelerator="cpu", devices=2, logger=False)
    with pytest.raises(ValueError, match=r"worker_data=3 must be a function"):
        Simulated([0.1], worker_data=3)  # type: ignore[arg-type]
    for value in ("yes", 1, None):
        with pytest.raises(ValueError, match=rf"inner_states_on_cpu={value!r} must be True"):
            Simulated([0.1], inner_states_on_cpu=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"grace=2.0 .*quorum=2 of 2 workers"):
        L.Trainer(strategy=Simulated([0.1, 0.2], quorum=2, grace=2.0), accelerator="cpu", devices=1, logger=False)
    with pytest.raises(ValueError, match=r"seconds_per_step is empty"):
        Simulated([])
    with pytest.raises(ValueError, match="quorum"):
        L.Trainer(strategy=Simulated([0.1, 0.2], quorum=3), accelerator="cpu", devices=1, logger=False)
    with pytest.raises(ValueError, match=r"60 workers, but an epoch .* only 50 batches"):
        fit(Simulated([0.1] * 60), data=loader(50))
    with pytest.raises(ValueError, match=r"loader of worker 1, worker_data\(1\), has no batches"):
        fit(Simulated([0.1, 0.2], worker_data=lambda n: loader(5) if n == 0 else []))
    with pytest.raises(ValueError, match=r"worker_data\(0\) returned None"):
        fit(Simulated([0.1, 0.2], worker_data=lambda n: None))
    with pytest.raises(TypeError, match=r"worker_data\(1\) returned 7, which is not iterable"):
        fit(Simulated([0.1, 0.2], worker_data=lambda n: {"a": loader(5), "b": loader(5) if n == 0 else 7}))
    for seed in ("a", -1, 1.5, True):
        with pytest.raises(ValueError, match=rf"seed={seed!r} must be an integer"):
            Simulated([0.1, 0.2], seed=seed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"use_distributed_sampler=False.*worker_data=function"):
        fit(Simulated([0.1, 0.2]), use_distributed_sampler=False)
    with pytest.raises(ValueError, match="reload_dataloaders_every_n_epochs"):
        fit(Simulated([0.1, 0.2]), reload_dataloaders_every_n_epochs=1)


def test_training_step_with_dataloader_iter_is_refused() -> None:
    class Fetching(Model):
        def training_step(self, dataloader_iter: Any) -> Any:
            raise AssertionError

    with pytest.raises(TypeError, match=r"training_step\(self, batch, batch_idx\)"):
        fit(Simulated([0.1, 0.2]), module=Fetching)


def test_schedule_must_be_a_list_of_possible_events() -> None:
    with pytest.raises(ValueError, match=r"schedule=Death.* must be a list"):
        Simulated([0.1], schedule=Death(0, 1.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="schedule=None must be a list"):
        Simulated([0.1], schedule=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="worker 0 is already dead then"):
        Simulated([0.1, 0.1], schedule=[Death(0, 10.0, 20.0), Death(0, 20.0, 30.0)])


def test_epoch_with_fewer_local_steps_than_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="24 batches for all workers together, and a local step takes 10"):
        fit(Simulated([0.1] * 4), data=loader(24), accumulate_grad_batches=10)


def test_stochastic_weight_averaging_is_refused() -> None:
    with pytest.raises(ValueError, match=r"StochasticWeightAveraging.*WeightAveraging"):
        fit(Simulated(SPEEDS), callbacks=[StochasticWeightAveraging(0.1)])


def test_options_on_the_command_line(tmp_path: Path) -> None:
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

    config = tmp_path / "config.yaml"
    config.write_text(
        """
trainer:
  accelerator: cpu
  devices: 1
  logger: false
  strategy:
    class_path: lightning_async_localsgd.SimulatedAsyncLocalSGDStrategy
    init_args:
      seconds_per_step: [0.5, {seconds: 1.0, jitter: 0.1}]
      exchange_seconds: {latency: 0.1, bytes_per_second: 1000000.0}
      schedule:
        - class_path: lightning_async_localsgd.Slowdown
          init_args: {worker: 0, start: 5.0, end: 6.0, factor: 2.0}
        - class_path: lightning_async_localsgd.Death
          init_args: {worker: 1, at: 9.0}
      quorum: all
"""
    )
    strategy = LightningCLI(
        BoringModel, BoringDataModule, run=False, args=[f"--config={config}"], save_config_callback=None
    ).trainer.strategy
    assert isinstance(strategy, Simulated)
    assert strategy.scenario.devices == [StepSeconds(0.5), StepSeconds(1.0, 0.1)]
    assert strategy.scenario.links == [Link(0.1, 1e6)] * 2
    assert strategy.scenario.deaths == [Death(1, 9.0)]
    assert strategy.scenario.slowdown_factor(0, 5.5) == 2.0
    assert strategy.merge_policy.quorum == "all"
