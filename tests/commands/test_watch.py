"""``watch``: the same state from the file and from the server, which nothing changes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lightning_async_localsgd.commands import text, watch
from lightning_async_localsgd.server.event_file import find_event_file
from tests.commands.conftest import TOKEN, Command, LiveRun


def test_finished_run_is_shown_as_its_summary_says(finished: Path, command: Command) -> None:
    code, output, _ = command("watch", finished, "--json")
    state = json.loads(output)
    summary = json.loads(next(finished.rglob("async_localsgd_summary.json")).read_text())
    assert code == 0
    assert state["ended"]
    assert [worker["steps"] for worker in state["workers"]] == [worker["steps"] for worker in summary["workers"]]
    assert state["progress"] == summary["steps"]
    code, output, _ = command("watch", find_event_file(finished), "--once")
    assert code == 0
    assert "finished after" in output
    assert "worker 2 lost: it died, as scheduled" in output
    assert output.count("away") == 1


def test_terminal_view_has_every_worker(finished: Path, command: Command) -> None:
    state = json.loads(command("watch", finished, "--json")[1])
    state["run_name"] = "[red]a[/red] run"
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(watch.as_renderable(state))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]a[/red] run" in shown, "names are no markup"
    state["faults"].append({"seconds": 1.0, "worker": 1, "text": "lost: \x1b[2Jcleared\n"})
    assert text.fault_lines(state)[-1] == "1.0 s: worker 1 lost: ?[2Jcleared?", "a terminal obeys nothing"
    assert shown.splitlines()[2].strip() == text.headlines(state)[1], "below the bar"
    for worker in state["workers"]:
        assert f"{worker['share']:.1%}" in shown


def test_running_training_is_watched_over_the_wire_and_in_its_file(
    live_run: Callable[..., LiveRun], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = live_run(seconds_per_step=[0.01, 0.03], trainer={"max_steps": 100_000}, strategy={"local_steps": 5})

    def both_train(state: dict[str, Any]) -> bool:
        return len(state["workers"]) == 2 and all(worker["rounds"] > 3 for worker in state["workers"])

    state = run.wait_for(lambda state: both_train(state) and bool(state["losses"]))
    fast, slow = state["workers"]
    assert fast["steps_per_second"] > 1.5 * slow["steps_per_second"]
    assert {fast["state"], slow["state"]} <= {"computing", "exchanging", "waiting"}
    assert (state["total"], state["ended"]) == (200_000, False)
    assert state["seconds_left"] > 0
    assert command("watch", run.address, "--json")[0] == 1, "without the token"
    monkeypatch.setenv("ASYNC_LOCALSGD_TOKEN", TOKEN)
    code, output, _ = command("watch", run.address, "--json")
    assert code == 0
    assert len(json.loads(output)["workers"]) == 2, "watching joins nothing"
    code, output, _ = command("watch", run.out, "--once")
    assert code == 0
    assert "running after" in output
    monkeypatch.setattr(watch.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=lambda seconds: run.stop()))
    code, output, _ = command("watch", run.address)
    assert code == 0
    assert "): the run is over, or rank 0 has ended; this is the last state that it told" in " ".join(output.split())
    state = json.loads(command("watch", run.out, "--json")[1])
    summary = json.loads(next(run.out.rglob("async_localsgd_summary.json")).read_text())
    assert state["ended"]
    assert state["progress"] == summary["steps"]
    assert [worker["sessions"] for worker in state["workers"]] == [1, 1]
    assert {worker["state"] for worker in state["workers"]} == {"finished"}
    code, _, errors = command("watch", run.address, "--timeout", "0.5")
    assert code == 1
    assert "could not be reached within 0.5 s" in errors


def test_live_view_follows_until_the_end(
    finished: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = find_event_file(finished).read_text().splitlines(keepends=True)
    path = tmp_path / "events.jsonl"
    path.write_text("".join(lines[:20]))

    def goes_on(seconds: float) -> None:
        path.write_text("".join(lines[: len(path.read_text().splitlines()) + 20]))

    monkeypatch.setattr(watch.time, "sleep", goes_on)
    monkeypatch.setattr(watch.sys.stdout, "isatty", lambda: True, raising=False)
    code, output, _ = command("watch", path)
    assert code == 0
    assert "finished after" in output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere"], "nowhere does not exist; give the log directory of a run, or its event file"),
        (["tcp://127.0.0.1:9"], "set the environment variable ASYNC_LOCALSGD_TOKEN"),
        (["."], "contains no async_localsgd_events.jsonl"),
    ],
)
def test_target_that_cannot_be_watched_is_named(
    arguments: list[str], text: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, errors = command("watch", *arguments)
    assert code == 1
    assert text in errors


def test_without_rich_the_extra_is_named_and_plain_text_works(
    finished: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "find_spec", lambda name: None)
    monkeypatch.setattr(watch.sys.stdout, "isatty", lambda: True, raising=False)
    code, _, errors = command("watch", finished)
    assert code == 1
    assert "pip install 'lightning-async-localsgd[tools]'" in errors
    assert command("watch", finished, "--once")[0] == 0
