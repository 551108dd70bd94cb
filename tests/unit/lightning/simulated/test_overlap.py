"""Simulated workers that go on training while their pushes are in flight."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_async_localsgd import Arrival, Death, MergeOptions
from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy as Simulated
from lightning_async_localsgd.outer import SGD
from tests.lightning_models import same_weights
from tests.unit.lightning.simulated.support import (
    SPEEDS,
    Model,
    NoSchedule,
    RunRecorder,
    SkippingPrecision,
    StopAt,
    fit,
    loader,
)


def pushes_in(events: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    return [line["content"]["push"] for line in lines if line["kind"] == "push"]


def test_workers_do_not_stand_still_while_a_push_is_in_flight(tmp_path: Path) -> None:
    seconds, events = {}, tmp_path / "events.jsonl"
    for overlap in (False, True):
        recorder = RunRecorder(recording=events if overlap else None)
        strategy = Simulated([1.0, 1.0], 0.75, local_steps=4, grace=0.0, overlap=overlap)
        fit(strategy, max_steps=40, callbacks=[recorder])
        seconds[overlap] = recorder.seconds
        assert sum(totals.steps for totals in recorder.totals.values()) == 80
        if overlap:
            # The answer takes 1.5 s, so it is adopted after two steps. Only the first model and the last round wait.
            assert {push["overlap_steps"] for push in pushes_in(events)} == {0, 2}
            assert {push["answer_seconds"] for push in pushes_in(events) if push["overlap_steps"]} == {1.5}
            assert [totals.exchange_seconds for totals in recorder.totals.values()] == [0.0, 0.0]
    assert seconds[False] == pytest.approx(40 + 10 * 1.5)
    assert seconds[True] <= 40 + 3 * 1.5


def test_slow_worker_of_unknown_speed_does_not_take_a_round_of_the_fastest_one(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    strategy = Simulated([1.0, 10.0], 0.5, local_steps=20, grace=0.0, overlap=True)
    fit(strategy, max_steps=100, callbacks=[RunRecorder(recording=events)])
    steps = [push["steps"] for push in pushes_in(events) if push["worker"] == 1]
    # It may take 20 steps in its first flight, because nothing is known of it. That must not make its round longer.
    assert max(steps) <= 3
    assert len(steps) >= 4


def test_round_that_ends_before_the_answer_waits_for_it(tmp_path: Path) -> None:
    recorder = RunRecorder(recording=tmp_path / "events.jsonl")
    strategy = Simulated([1.0, 1.0], 2.25, local_steps=2, grace=0.0, overlap=True)
    fit(strategy, max_steps=40, callbacks=[recorder])
    pushes = pushes_in(tmp_path / "events.jsonl")
    assert {push["wait_seconds"] for push in pushes if push["overlap_steps"] == 2} == {2.5}
    assert {push["compute_seconds"] / push["timed_steps"] for push in pushes if push["timed_steps"]} == {1.0}
    waits = sum(push["wait_seconds"] for push in pushes)
    assert waits <= sum(totals.wait_seconds for totals in recorder.totals.values())


@pytest.mark.parametrize("length", [1, 3, "auto"])
def test_number_of_steps_is_exact(length: Any, tmp_path: Path) -> None:
    for steps in (1, 2, 7, 30, 31):
        recorder = RunRecorder()
        fit(Simulated(SPEEDS, 0.2, local_steps=length, overlap=True), max_steps=steps, callbacks=[recorder])
        assert sum(totals.steps for totals in recorder.totals.values()) == 3 * steps


def test_each_sample_is_trained_on_once_an_epoch() -> None:
    strategy = Simulated(SPEEDS, 0.2, local_steps=5, overlap=True)
    module, trainer = fit(strategy, max_epochs=2, max_steps=-1, data=loader(30))
    assert sorted(module.samples) == sorted(2 * list(range(240)))
    assert trainer.global_step == 20


def test_answer_that_arrives_at_once_is_adopted_at_once(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    strategy = Simulated(SPEEDS, local_steps=4, grace=0.0, overlap=True)
    fit(strategy, callbacks=[RunRecorder(recording=events)])
    assert {push["overlap_steps"] for push in pushes_in(events)} == {0}


class Counter(L.LightningModule):
    """Each step adds 1 to its only weight."""

    samples: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.samples = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return -self.weight

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("length", [1, 4])
def test_each_step_counts_once_in_the_model(length: int) -> None:
    """With whole pushes, the model moves by one for each step of any worker."""
    strategy = Simulated(SPEEDS, 0.25, local_steps=length, outer_optimizer=SGD(lr=1.0), overlap=True)
    module, _ = fit(strategy, max_steps=30, module=Counter)
    assert module.weight.item() == 90.0


def test_same_run_again_has_the_same_result_to_the_last_bit_and_can_be_replayed(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    options: dict[str, Any] = {"local_steps": 3, "overlap": True}
    schedule = [Death(0, 1.0, back_at=2.0), Arrival(1.5, 0.2)]
    first, _ = fit(Simulated(SPEEDS, 0.3, schedule, **options), callbacks=[RunRecorder(recording=events)])
    second, _ = fit(Simulated(SPEEDS, 0.3, schedule, **options))
    replayed, _ = fit(Simulated(replay=events, **options))
    assert same_weights(first, second)
    assert same_weights(first, replayed)
    assert any(push["overlap_steps"] for push in pushes_in(events))


@pytest.mark.parametrize(
    "options",
    [
        {"quorum": "all"},
        {"quorum": 2, "outer_optimizer": SGD(lr=0.7)},
        {"dynamic_local_steps": False},
        {"grace": 0.5},
        {"merge": MergeOptions(second_moments=False)},
    ],
)
def test_overlap_works_with_every_way_of_merging(options: dict[str, Any]) -> None:
    recorder = RunRecorder()
    strategy = Simulated(SPEEDS, 0.25, local_steps=4, overlap=True, **options)
    _, trainer = fit(strategy, max_steps=25, callbacks=[recorder], val_check_interval=5)
    assert sum(totals.steps for totals in recorder.totals.values()) == 75
    assert trainer.callback_metrics["val_loss"] < 1.0


def test_stop_and_skipped_steps_end_as_without_overlap() -> None:
    recorder = RunRecorder()
    strategy = Simulated(SPEEDS, 0.25, local_steps=4, overlap=True)
    calls = itertools.count()
    skips = SkippingPrecision(lambda runtime: runtime.worker.number == 1 and next(calls) % 5 == 3)
    _, trainer = fit(strategy, max_steps=1000, callbacks=[recorder, StopAt(12)], plugins=[skips])
    assert 12 <= trainer.global_step < 30


def test_resumed_run_reaches_its_end(tmp_path: Path) -> None:
    strategy = Simulated(SPEEDS, 0.25, local_steps=4, overlap=True, checkpoint_every=2)
    fit(strategy, max_steps=20, module=NoSchedule, default_root_dir=tmp_path)
    checkpoint = max(tmp_path.rglob("rounds=*.ckpt"))
    recorder = RunRecorder()
    strategy = Simulated(SPEEDS, 0.25, local_steps=4, overlap=True)
    _, trainer = fit(
        strategy, checkpoint, max_steps=30, module=NoSchedule, callbacks=[recorder], default_root_dir=tmp_path
    )
    assert trainer.global_step == 30
    assert sum(totals.steps for totals in recorder.totals.values()) == 90


def test_module_has_batch_norm() -> None:
    """The runs above move statistics, too."""
    assert any("running_var" in name for name, _ in Model().named_buffers())
