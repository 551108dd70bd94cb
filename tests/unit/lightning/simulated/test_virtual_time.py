"""Virtual time of a simulated run: steps, transfers, recalls, stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lightning_async_localsgd import (
    AsyncLocalSGDCallback,
    Death,
    Link,
)
from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy as Simulated
from lightning_async_localsgd.server.event_file import read_pushes
from tests.lightning_models import same_weights
from tests.unit.lightning.simulated.support import (
    SPEEDS,
    Model,
    NoSchedule,
    RunRecorder,
    SkippingPrecision,
    StopAt,
    assert_events_in_order,
    fit,
    loader,
)


def test_virtual_seconds_are_the_sum_of_steps_and_transfers() -> None:
    recorder = RunRecorder()
    strategy = Simulated([1.0], exchange_seconds=0.5, local_steps=2, dynamic_local_steps=False)
    fit(strategy, max_steps=4, callbacks=[recorder])
    # Two rounds: half a second for the model, two steps, half a second for the push.
    assert recorder.seconds == 6.0
    recorder = RunRecorder()
    size = 4 * sum(tensor.numel() for tensor in Model().state_dict().values() if tensor.is_floating_point())
    fit(Simulated([1.0], Link(0.5, size), local_steps=2), max_steps=4, callbacks=[recorder])
    assert recorder.seconds == pytest.approx(2 * (1.5 + 2 + 1.5))


def test_stop_within_a_round_ends_virtual_time_after_the_last_computed_step(tmp_path: Path) -> None:
    for link, seconds in ((0.0, 7.0), (0.25, 8.0)):
        recorder, events = RunRecorder(recording=tmp_path / f"{link}.jsonl"), tmp_path / f"{link}.jsonl"
        fit(Simulated([1.0, 1.0], link, local_steps=5), max_steps=1000, callbacks=[recorder, StopAt(6)])
        assert [recorder.totals[n].steps for n in range(2)] == [7, 5]
        # Both workers take five steps, and worker 0 takes two of its next five. A round uses the link twice.
        assert recorder.seconds == seconds
        assert_events_in_order(events)


def test_end_of_data_within_a_round_ends_virtual_time_after_the_last_computed_step(tmp_path: Path) -> None:
    speeds, events = [1.0, 1.3, 3.0], tmp_path / "events.jsonl"
    recorder = RunRecorder(recording=events)
    module, _ = fit(
        Simulated(speeds, local_steps=20, grace=0.0), max_epochs=2, max_steps=-1, data=loader(100), callbacks=[recorder]
    )
    assert sorted(module.samples) == sorted(2 * list(range(800)))
    assert recorder.totals[2].wait_seconds == 0.0
    # The slowest worker takes the last batch. It never waits, and its last round was longer than the data.
    assert recorder.seconds == recorder.totals[2].steps * speeds[2] == 102.0
    assert_events_in_order(events)
    again, _ = fit(Simulated(replay=events, local_steps=20, grace=0.0), max_epochs=2, max_steps=-1, data=loader(100))
    assert same_weights(module, again)


def test_stop_in_an_overlong_round_keeps_the_order_of_events(tmp_path: Path) -> None:
    # Worker 0 skips steps, so its round takes longer than expected. Then a callback stops the run.
    class Late(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            runtime = trainer.strategy.runtime
            if runtime is not None and runtime.worker.number == 0 and runtime.virtual_seconds >= 4.0:
                trainer.should_stop = runtime.worker.clock.now > 12.0

    recorder, events = RunRecorder(recording=tmp_path / "events.jsonl"), tmp_path / "events.jsonl"
    plugin = SkippingPrecision(lambda runtime: runtime.worker.number == 0 and 4.0 <= runtime.worker.clock.now < 12.0)
    fit(Simulated([1.0, 1.0], local_steps=4, grace=0.0), max_steps=1000, callbacks=[recorder, Late()], plugins=[plugin])
    assert_events_in_order(events)
    assert recorder.totals[0].steps == 4 + 1
    assert recorder.seconds == 13.0


def test_push_lost_in_transit_is_not_counted() -> None:
    # Worker 0's first round takes twice as long as expected, and the worker dies before its push arrives.
    class Progress(L.Callback):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.steps.append(trainer.global_step)

    recorder, progress = RunRecorder(), Progress()
    plugin = SkippingPrecision(lambda runtime: runtime.worker.number == 0 and runtime.worker.clock.now < 6.0)
    strategy = Simulated([1.0, 2.0], schedule=[Death(0, 11.0, back_at=12.0)], local_steps=6, dynamic_local_steps=False)
    module, trainer = fit(strategy, max_steps=20, callbacks=[recorder, progress], plugins=[plugin], module=NoSchedule)
    assert recorder.totals[0].departures == 1
    assert sum(totals.steps for totals in recorder.totals.values()) == 40
    # Two local steps are one global step, and lost steps are taken again. Only the last two steps have number 20.
    assert len(module.samples) // 8 == 40 + 6 + 6
    assert trainer.global_step == 20 == progress.steps[-1]
    assert progress.steps.count(20) <= 2


def test_worker_with_unknown_speed_is_recalled_after_its_latency(tmp_path: Path) -> None:
    for latency, steps, seconds in ((0.0, 3, 1.05), (0.3, 3, 1.65), (0.4, 3, 1.85)):
        path = tmp_path / f"{latency}.jsonl"
        recorder = RunRecorder(events=path)
        fit(Simulated([0.1, 0.35], exchange_seconds=[0.0, latency], local_steps=10, grace=0.0), callbacks=[recorder])
        pushes = read_pushes(path)
        first = next(push for push in pushes if push["worker"] == 1)
        # The fast worker pushes after 1 s. The slow worker learns this a latency later, and also began a latency later.
        assert (first["steps"], pytest.approx(first["seconds"])) == (steps, seconds)


def test_virtual_seconds_are_available_during_and_after_fit(caplog: pytest.LogCaptureFixture) -> None:
    strategy = Simulated(SPEEDS)
    assert strategy.virtual_seconds is None
    during: list[float | None] = []

    class ReadSeconds(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            during.append(strategy.virtual_seconds)

    with caplog.at_level("INFO"):
        fit(strategy, callbacks=[AsyncLocalSGDCallback(), ReadSeconds()])
    assert None not in during
    assert strategy.virtual_seconds is not None
    assert strategy.virtual_seconds >= during[-1] > 0.0
    assert f"local steps of all workers in {strategy.virtual_seconds:.1f} virtual s" in caplog.text


def test_fast_worker_waits_only_with_a_quorum() -> None:
    waits = {}
    for name, options in {"all": {"quorum": "all"}, "none": {"grace": 0.0}}.items():
        recorder = RunRecorder()
        fit(Simulated([0.1, 0.4], local_steps=5, dynamic_local_steps=False, **options), callbacks=[recorder])
        waits[name] = recorder.totals[0].wait_seconds / recorder.seconds
    assert waits["all"] > 0.6
    assert waits["none"] < 0.1


def test_virtual_time_of_a_validation_is_the_age_of_its_model() -> None:
    strategy = Simulated([0.1, 0.4], local_steps=5, dynamic_local_steps=False, quorum="all")
    module, _ = fit(strategy, max_steps=20, val_check_interval=5)
    # A synchronous round takes as long as five steps of the slow worker.
    assert module.validated == [(5 * n, pytest.approx(2.0 * n)) for n in range(1, 5)]
