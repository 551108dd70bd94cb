"""Simulated runs that are replayed from their recording."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_async_localsgd import (
    Arrival,
    Death,
)
from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy as Simulated
from tests.lightning_models import same_weights
from tests.unit.lightning.simulated.support import SPEEDS, RunRecorder, StopAt, fit


def test_replay_gives_the_same_weights_and_reports_differences(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    schedule = [Death(0, 1.0, back_at=2.0), Arrival(1.5, 0.2)]
    first, _ = fit(Simulated(SPEEDS, schedule=schedule, local_steps=5), callbacks=[RunRecorder(recording=events)])
    recorder = RunRecorder()
    again, _ = fit(Simulated(replay=events, local_steps=5), callbacks=[recorder])
    assert same_weights(first, again)
    assert sorted(recorder.totals) == [0, 1, 2, 3]
    for options, words in (
        ({"local_steps": 6}, r"differs from its log .* at line .*local_steps=5, not 6"),
        ({"local_steps": 5, "dynamic_local_steps": False}, r"(differs|has parted) from its log"),
    ):
        with pytest.raises(RuntimeError, match=words):
            fit(Simulated(replay=events, **options))
    with pytest.raises(ValueError, match=r"records a run with 90 local steps .* allow 60"):
        fit(Simulated(replay=events, local_steps=5), max_steps=20)
    with pytest.raises(ValueError, match=r"module had tensors of float32, but this module has bfloat16"):
        fit(Simulated(replay=events, local_steps=5), precision="bf16-true")
    with pytest.raises(RuntimeError, match=r"the trainer stopped before the end of the recorded run"):
        fit(Simulated(replay=events, local_steps=5), callbacks=[StopAt()])
    lines = events.read_text().splitlines(keepends=True)
    (tmp_path / "broken.jsonl").write_text("".join(lines[: len(lines) // 2]))
    with pytest.raises(RuntimeError, match=r"ends at .* before the end of training"):
        fit(Simulated(replay=tmp_path / "broken.jsonl", local_steps=5))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "first event is not the beginning"),
        ("no log\n", "line 1 cannot be read"),
        ('{"kind":"begin","seconds":0,"content":{"format":99}}\n', "of format 99"),
        ('{"kind":"interrupt","seconds":0,"content":{"worker":0}}\n', "first event is not the beginning"),
        ('{"kind":"begin","seconds":0,"content":{"format":3}}\n' * 2, "more than one run"),
    ],
)
def test_invalid_event_log_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        Simulated(replay=path)


def test_run_with_workers_that_had_joined_before_it_began_is_replayed(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    first, _ = fit(Simulated(SPEEDS, local_steps=5), callbacks=[RunRecorder(recording=events)])
    begin, *others = events.read_text().splitlines(keepends=True)
    assert '"ranks":3' in begin
    # As if one rank had waited for two workers that join.
    events.write_text("".join([begin.replace('"ranks":3', '"ranks":1'), *others]))
    again, _ = fit(Simulated(replay=events, local_steps=5))
    assert same_weights(first, again)


def test_log_of_workers_with_unequal_precision_is_refused(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    fit(Simulated(SPEEDS, local_steps=5), callbacks=[RunRecorder(recording=events)])
    for precision in ("32-true", "bf16-mixed"):
        events.write_text(events.read_text().replace('"precision":""', f'"precision":"{precision}"', 1))
    with pytest.raises(ValueError, match=r"workers had unequal precision \(32-true, bf16-mixed\)"):
        Simulated(replay=events)
