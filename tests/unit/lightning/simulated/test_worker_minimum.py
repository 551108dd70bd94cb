"""Simulated runs that are paused for lack of workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lightning_async_localsgd import Arrival, AsyncLocalSGDCallback, Death
from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy as Simulated
from lightning_async_localsgd.protocol.exchange import TooFewWorkersError
from lightning_async_localsgd.server.events import read_events
from tests.lightning_models import same_weights
from tests.unit.lightning.simulated.support import RunRecorder, fit

FIXED = {"local_steps": 5, "dynamic_local_steps": False, "grace": 0.0}


class Summary(L.Callback):
    """Keeps the seconds in which the run was paused, as its metrics show them."""

    def __init__(self) -> None:
        self.paused: Any = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        snapshot = trainer.strategy.runtime.server.snapshot
        self.paused = snapshot.pauses, snapshot.paused_seconds


def test_pause_lasts_until_the_worker_is_back_and_is_replayed(tmp_path: Path) -> None:
    events, summary = tmp_path / "events.jsonl", Summary()
    strategy = Simulated([1.0, 1.0], schedule=[Death(1, 12.0, back_at=40.0)], min_workers=2, **FIXED)
    recorder = RunRecorder(recording=events)
    first, _ = fit(strategy, max_steps=20, callbacks=[recorder, summary])
    assert summary.paused == (1, 28.0)
    assert recorder.totals[0].wait_seconds >= 25.0, "from 15 s, when its round ends, to 40 s"
    dispatches = [
        event.seconds for event in read_events(events) if event.kind == "dispatch" and event.content["replies"]
    ]
    assert not any(12.0 < seconds < 40.0 for seconds in dispatches if seconds is not None)
    again, _ = fit(Simulated(replay=events, min_workers=2, **FIXED), max_steps=20)
    assert same_weights(first, again)
    with pytest.raises(ValueError, match=r"a run with min_workers=2, but this strategy has min_workers=1"):
        fit(Simulated(replay=events, **FIXED), max_steps=20)


def test_arrival_ends_a_pause() -> None:
    summary = Summary()
    schedule = [Death(1, 12.0), Arrival(30.0, 1.0)]
    fit(Simulated([1.0, 1.0], schedule=schedule, min_workers=2, **FIXED), callbacks=[summary, AsyncLocalSGDCallback()])
    assert summary.paused == (1, 18.0)


def test_too_long_a_pause_ends_the_run_with_a_checkpoint_that_it_resumes_from(tmp_path: Path) -> None:
    strategy = Simulated([1.0, 1.0], schedule=[Death(1, 12.0, 200.0)], min_workers=2, pause_timeout=60.0, **FIXED)
    options = {"max_steps": 20, "default_root_dir": tmp_path, "callbacks": [AsyncLocalSGDCallback(table=False)]}
    with pytest.raises(TooFewWorkersError, match=r"exchange.pause_timeout=60 s.*min_workers=2"):
        fit(strategy, **options)
    [checkpoint] = tmp_path.rglob("rounds=*.ckpt")
    summary = Summary()
    fit(Simulated([1.0, 1.0], min_workers=2, **FIXED), ckpt_path=checkpoint, **{**options, "callbacks": [summary]})
    assert summary.paused == (0, 0.0)


def test_minimum_that_no_schedule_reaches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"min_workers=3 is larger than the 2 worker\(s\) that can take part"):
        L.Trainer(strategy=Simulated([1.0, 1.0], min_workers=3), accelerator="cpu", devices=1, logger=False)
