"""The lines of the event file, and the state of the run that they give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_async_localsgd import Arrival, AsyncLocalSGDCallback, Death, SimulatedAsyncLocalSGDStrategy
from lightning_async_localsgd.server.event_file import find_event_file, read_lines, read_pushes
from lightning_async_localsgd.server.line_file import EVENT_FILE
from lightning_async_localsgd.server.observers import RunObserver
from lightning_async_localsgd.server.run_state import RunState
from tests.unit.lightning.simulated.support import fit, loader
from tests.unit.server.serving import make_server

BEGIN: dict[str, Any] = {
    "kind": "run", "format": 1, "seconds": 100.0, "run_name": "a", "incarnation": "i", "total": 100, "done": 0,
    "push_bytes": 10, "model_bytes": 20,
}  # fmt: skip


def push(worker: int, seconds: float, **fields: Any) -> dict[str, Any]:
    values = {"steps": 5, "staleness": 1, "refused": None, "version": 1, "exchange_seconds": 0.2, "samples": 40}
    return {"kind": "push", "worker": worker, "seconds": seconds, **values, **fields}


class Lines(RunObserver):
    def __init__(self, lines: list[dict[str, Any]]) -> None:
        self.on_line = lines.append  # type: ignore[method-assign]


def state(*lines: dict[str, Any]) -> RunState:
    """Return the state after lines, which go through JSON as in a file."""
    result = RunState()
    for line in lines:
        result.add(json.loads(json.dumps(line)))
    return result


def join(worker: int, seconds: float, session: str = "s") -> dict[str, Any]:
    return {"kind": "join", "worker": worker, "session": session, "seconds": seconds}


def dispatch(seconds: float, **steps: int) -> dict[str, Any]:
    return {"kind": "dispatch", "seconds": seconds, "steps": {name[1:]: count for name, count in steps.items()}}


def test_states_of_a_worker() -> None:
    lines = [BEGIN, join(0, 100.0), join(1, 100.0), dispatch(101.0, w0=5, w1=5), push(0, 103.0)]
    view = state(*lines).as_dict(103.5)
    first, second = view["workers"]
    assert (first["state"], first["state_seconds"], first["wait_seconds"]) == ("waiting", 0.5, 0.0)
    assert (second["state"], second["share"]) == ("computing", 0.0)
    assert (first["steps"], first["rounds"], first["share"], first["samples"]) == (5, 1, 1.0, 40)
    assert (first["bytes"], second["bytes"]) == (0, 20), "rank 0's own worker is in the server's process"
    assert (view["progress"], view["total"], view["version"]) == (5, 100, 1)
    lines.append(dispatch(104.0, w0=5))
    assert state(*lines).as_dict(104.05)["workers"][0]["state"] == "exchanging", "half of the last exchange"
    assert state(*lines).as_dict(104.2)["workers"][0]["state"] == "computing"
    interrupted = [*lines, {"kind": "interrupt", "worker": 0, "seconds": 105.0}]
    assert state(*interrupted).as_dict()["workers"][0]["state"] == "validating"
    going_on = [*interrupted, {"kind": "continue", "worker": 0, "seconds": 106.0}]
    assert state(*going_on).as_dict(107.0)["workers"][0]["state"] == "computing"


def test_faults_are_kept_with_their_times() -> None:
    lost = {"kind": "lost", "worker": 1, "session": "s", "seconds": 102.0, "reason": "its connection ended"}
    lines = [BEGIN, join(1, 100.0), dispatch(100.0, w1=5), lost]
    view = state(*lines).as_dict()
    assert view["workers"][0]["state"] == "away"
    assert view["faults"] == [{"seconds": 2.0, "worker": 1, "text": "lost: its connection ended"}]
    back = {"kind": "back", "worker": 1, "session": "s", "seconds": 103.0}
    assert state(*lines, back).as_dict()["workers"][0]["state"] == "computing"
    assert state(*lines, {**back, "session": "older"}).as_dict()["workers"][0]["state"] == "away"
    joined = state(*lines, join(1, 104.0, "t")).as_dict()["workers"][0]
    assert (joined["state"], joined["sessions"], joined["losses"]) == ("waiting", 2, 1)
    refused = state(*lines, back, push(1, 104.0, refused="NaN", refusal="not_finite")).as_dict()
    assert refused["refusals"] == {"not_finite": 1}
    assert refused["progress"] == 0
    metrics = {"kind": "metrics", "seconds": 105.0, "values": {"loss": 2.0}, "quarantined": [1]}
    quarantined = state(*lines, back, metrics).as_dict()
    assert quarantined["workers"][0]["state"] == "quarantined"
    assert quarantined["losses"] == [[5.0, 2.0]]


def test_time_left_follows_the_latest_speed() -> None:
    lines = [BEGIN, join(0, 100.0), *(push(0, 100.0 + second) for second in range(1, 11))]
    view = state(*lines).as_dict()
    assert view["progress_per_second"] == pytest.approx(5.0)
    assert view["seconds_left"] == pytest.approx(10.0)


def test_run_with_batch_sizes_of_its_workers_counts_samples() -> None:
    begin = {**BEGIN, "step_samples": 8, "total": 800}
    pushes = [push(0, 101.0, steps=5, samples=40), push(1, 102.0, steps=5, samples=20)]
    view = state(begin, *pushes).as_dict()
    assert (view["progress"], view["unit"], view["progress_per_second"]) == (60, "samples", 30.0)
    assert [worker["share"] for worker in view["workers"]] == [pytest.approx(2 / 3), pytest.approx(1 / 3)]


def test_wait_begins_when_a_push_arrives() -> None:
    held = {"kind": "held", "worker": 0, "session": "s", "sequence": 1, "steps": 5, "seconds": 102.0}
    lines = [BEGIN, join(0, 100.0), dispatch(101.0, w0=5), held]
    waiting = state(*lines).as_dict(103.0)["workers"][0]
    assert (waiting["state"], waiting["state_seconds"], waiting["rounds"]) == ("waiting", 1.0, 0)
    dispatched = state(*lines, push(0, 104.0), dispatch(104.5, w0=5)).as_dict()["workers"][0]
    assert dispatched["wait_seconds"] == 2.5, "the wait for the first dispatch is none for the answer to a push"


def test_push_that_is_sent_again_is_refused_once() -> None:
    first = push(0, 101.0, session="s", sequence=1, refused="NaN", refusal="not_finite")
    view = state(BEGIN, join(0, 100.0), first, {**first, "seconds": 102.0}).as_dict()
    assert (view["refusals"], view["workers"][0]["refused"], len(view["faults"])) == ({"not_finite": 1}, 1, 1)


def test_restart_of_rank_0_continues_the_run_and_another_fit_does_not() -> None:
    lines = [BEGIN, join(0, 100.0), dispatch(100.0, w0=5), push(0, 101.0)]
    again = {**BEGIN, "seconds": 5.0, "incarnation": "j", "done": 5}
    view = state(*lines, again).as_dict()
    assert (view["workers"][0]["steps"], view["workers"][0]["state"]) == (5, "away")
    assert (view["progress"], view["faults"][-1]["text"]) == (5, "rank 0 was restarted")
    assert state(*lines, {**again, "run_name": "b"}).as_dict()["workers"] == []
    continued = state(*lines, {**BEGIN, "continued": True}).as_dict()
    assert continued["workers"][0]["steps"] == 5, "the file was rotated"


def test_progress_and_shares_are_those_of_samples_if_the_run_counts_samples() -> None:
    begin = {**BEGIN, "done": 200, "total": 1000, "step_samples": 16}
    lines = [begin, join(0, 100.0), join(1, 100.0), push(0, 102.0), push(1, 104.0, steps=30, samples=120)]
    view = state(*lines).as_dict()
    assert (view["progress"], view["total"], view["unit"]) == (360, 1000, "samples")
    assert [worker["share"] for worker in view["workers"]] == [0.25, 0.75]
    assert view["seconds_left"] == pytest.approx(640 / (160 / 4.0))
    skipped = state(*lines, push(1, 105.0, steps=0, samples=8)).as_dict()
    assert skipped["progress"] == 360, "a round without a step is no progress"


def test_unknown_lines_are_skipped() -> None:
    assert state({"kind": "news", "seconds": 1.0}, BEGIN, {"kind": "news"}).as_dict()["workers"] == []
    assert state(push(0, 1.0)).as_dict()["workers"] == [], "before the run"


@pytest.mark.parametrize(
    "given",
    [{}, {"quorum": 2}, {"overlap": True, "local_steps": 8}, {"batch_size": {1: 4}}],
    ids=["alone", "quorum", "overlap", "batch sizes"],
)
def test_file_of_a_run_gives_the_numbers_of_its_summary(tmp_path: Path, given: dict[str, Any]) -> None:
    schedule = [Death(1, 1.1, back_at=1.6), Death(2, 2.0), Arrival(0.9, 0.1)]
    strategy = SimulatedAsyncLocalSGDStrategy([0.1, 0.17, 0.3], 0.02, schedule, **{"local_steps": 5, **given})
    logger = CSVLogger(tmp_path)
    options = {"max_steps": 60, "log_every_n_steps": 5, "val_check_interval": 10}
    callbacks: list[L.Callback] = [AsyncLocalSGDCallback(table=False)]
    fit(strategy, data=loader(), callbacks=callbacks, logger=logger, **options)
    path = find_event_file(tmp_path)
    assert path == Path(logger.log_dir) / EVENT_FILE
    lines, result = read_lines(path), state(*read_lines(path))
    summary = json.loads((path.parent / "async_localsgd_summary.json").read_text())
    assert result.summary == summary
    view = result.as_dict()
    assert view["ended"]
    assert view["virtual"]
    assert summary["steps"] == sum(line["steps"] for line in read_pushes(path) if line["refused"] is None)
    assert view["progress"] == view["total"] == summary["budget"]
    assert view["unit"] == ("samples" if "batch_size" in given else "local steps")
    assert view["version"] == summary["version"]
    for worker, expected in zip(view["workers"], summary["workers"], strict=True):
        assert worker["steps"] == expected["steps"]
        assert worker["rounds"] == expected["rounds"]
        assert worker["losses"] == expected["departures"]
        assert worker["sessions"] == expected["sessions"]
        assert worker["wait_seconds"] == pytest.approx(expected["wait_seconds"], abs=1e-6)
        assert worker["total_exchange_seconds"] == pytest.approx(expected["exchange_seconds"], abs=1e-6)
        assert worker["share"] == pytest.approx(expected["share"])
    assert {worker["worker"] for worker in view["workers"] if worker["state"] == "away"} == {2}
    metrics = [line for line in lines if line["kind"] == "metrics"]
    assert len(metrics) >= 10
    assert all("loss" in line["values"] and "train_loss" in line["values"] for line in metrics)
    validations = [line for line in lines if line["kind"] == "validation"]
    assert [line["global_step"] for line in validations] == [10, 20, 30, 40, 50, 60]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_nothing_is_written_without_being_asked_if_there_is_no_logger(tmp_path: Path) -> None:
    strategy = SimulatedAsyncLocalSGDStrategy([0.1, 0.2], checkpoint_every=None)
    fit(strategy, default_root_dir=tmp_path, callbacks=[AsyncLocalSGDCallback(table=False)])
    assert list(tmp_path.rglob("*")) == []


def test_pause_for_lack_of_workers_is_seen_while_it_lasts(tmp_path: Path) -> None:
    strategy = SimulatedAsyncLocalSGDStrategy(
        [0.1, 0.1], 0.0, [Death(1, 1.05, back_at=3.0)], local_steps=5, min_workers=2
    )
    logger = CSVLogger(tmp_path)
    fit(strategy, callbacks=[AsyncLocalSGDCallback(table=False)], logger=logger, max_steps=40)
    lines = read_lines(find_event_file(tmp_path))
    [pause] = [index for index, line in enumerate(lines) if line["kind"] == "pause"]
    [resume] = [index for index, line in enumerate(lines) if line["kind"] == "resume"]
    assert state(*lines[: pause + 1]).as_dict()["paused"]
    assert not state(*lines[: resume + 1]).as_dict()["paused"]
    summary = json.loads((Path(logger.log_dir) / "async_localsgd_summary.json").read_text())
    assert summary["paused_seconds"] == pytest.approx(lines[resume]["seconds"] - lines[pause]["seconds"])


def test_interruption_of_a_round_is_a_line() -> None:
    lines: list[dict[str, Any]] = []
    server = make_server(2, total=100, threaded=False)
    server.add_observer(Lines(lines))
    server.interrupt(1)
    server.continue_round(1)
    assert [(line["kind"], line["worker"]) for line in lines] == [("interrupt", 1), ("continue", 1)]
