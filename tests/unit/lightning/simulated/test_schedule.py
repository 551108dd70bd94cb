"""Slowdowns, deaths and arrivals in a simulated run."""

from __future__ import annotations

import gc
from typing import Any

import lightning as L
import pytest
import torch

from lightning_async_localsgd import (
    Arrival,
    AsyncLocalSGDCallback,
    Death,
    Slowdown,
)
from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy as Simulated
from lightning_async_localsgd.outer import SGD
from tests.unit.lightning.simulated.support import RunRecorder, StopAt, fit


def test_slowdown_takes_virtual_time() -> None:
    recorder = RunRecorder()
    fit(Simulated([1.0], schedule=[Slowdown(0, 2.0, 4.0, 5.0)], local_steps=4), max_steps=4, callbacks=[recorder])
    # Steps begin at 0, 1, 2 (five times as long) and 7 s.
    assert recorder.seconds == 8.0


def test_deaths_arrivals_and_slowdowns_happen_as_scheduled() -> None:
    schedule = [Death(0, 1.0, back_at=3.0), Death(2, 2.0), Arrival(2.5, 0.05), Slowdown(1, 1.0, 4.0, 3.0)]
    recorder = RunRecorder()
    module, _ = fit(
        Simulated([0.1, 0.2, 0.3], schedule=schedule, local_steps=5), max_epochs=3, max_steps=-1, callbacks=[recorder]
    )
    totals = recorder.totals
    assert [totals[n].sessions for n in range(4)] == [2, 1, 1, 1]
    assert [totals[n].departures for n in range(4)] == [1, 0, 1, 0]
    assert totals[3].steps > totals[2].steps > 0
    # Leases of dead workers went to other workers.
    assert sorted(module.samples) == sorted(3 * list(range(480)))


class MemoryRecorder(L.Callback):
    """Records the numbers of flat models and of worker states, each with the number of live workers."""

    def __init__(self) -> None:
        self.flat: list[tuple[int, int]] = []
        self.inner: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        runtime, controller = trainer.strategy.runtime, trainer.strategy.controller
        if runtime.stopped:
            return
        gc.collect()
        tensors = [obj for obj in gc.get_objects() if type(obj) in (torch.Tensor, torch.nn.Parameter)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        live = len(runtime.simulator.live)
        self.flat.append((live, list(storages.values()).count(4 * runtime.binding.layout.numel)))
        self.inner.append((live, len(controller._worker_states._states)))


def test_memory_of_dead_workers_is_freed() -> None:
    # Worker 1 comes back. Worker 3 dies for good while its round is being computed.
    schedule = [Death(1, 1.0, back_at=2.0), Death(2, 1.4), Death(3, 1.5), Arrival(1.2, 0.2), Death(4, 2.5)]
    memory = MemoryRecorder()
    strategy = Simulated(
        [0.1, 0.1, 0.15, 0.15], schedule=schedule, local_steps=4, checkpoint_every=None,
        outer_optimizer=SGD(lr=0.25),
    )  # fmt: skip
    gc.collect()
    gc.freeze()  # Leave out existing objects, to make each search faster.
    try:
        fit(strategy, callbacks=[AsyncLocalSGDCallback(table=False), memory], max_steps=40)
    finally:
        gc.unfreeze()
    assert {live for live, _ in memory.flat} == {2, 3, 4}
    # One model for each worker, one for all pseudo-gradients, and the global model of the server.
    assert all(flat <= live + 2 for live, flat in memory.flat)
    assert all(inner <= live + 1 for live, inner in memory.inner), "worker 1 keeps its state until it comes back"
    assert memory.inner[-1] == (2, 2)


def test_run_without_live_workers_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="at 2 virtual seconds no worker is left"):
        fit(Simulated([0.1, 0.2], schedule=[Death(0, 1.0), Death(1, 2.0)], local_steps=5), max_steps=1000)


def test_warning_names_schedule_entries_after_the_end_of_the_run(caplog: pytest.LogCaptureFixture) -> None:
    later = [Slowdown(1, 50.0, 60.0, 2.0), Arrival(70.0, 0.2), Death(0, 1e9)]
    happened = [Slowdown(0, 0.5, 99.0, 1.5), Death(1, 1.0, back_at=80.0), Arrival(1.0, 0.2)]

    def warnings() -> list[str]:
        return [log.getMessage() for log in caplog.records if log.name == "lightning_async_localsgd.simulation.cluster"]

    fit(Simulated([0.1, 0.2, 0.2], schedule=[*later, *happened], local_steps=5))
    (text,) = warnings()
    assert "ended at" in text
    assert all(str(entry) in text for entry in later)
    assert not any(str(entry) in text for entry in happened)
    caplog.clear()
    fit(Simulated([0.1, 0.2, 0.2], schedule=happened, local_steps=5))
    fit(Simulated([0.1, 0.2], schedule=[Death(0, 1e9)], local_steps=5), callbacks=[StopAt()])
    assert [text.count("Death") for text in warnings()] == [1]
