"""Every code block of docs/commands.md runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands.conftest import TOKEN, Command, LiveRun
from tests.package.conftest import PROJECT

PAGE = (PROJECT / "docs" / "commands.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
LINES = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
ADDRESS = "gpu1:29600"
"""The server of the examples."""


def test_all_blocks_are_of_known_kinds() -> None:
    assert {kind for kind, _ in BLOCKS} <= {"bash", "python"}
    assert all(line.startswith(("lightning-async-localsgd ", "export ASYNC_LOCALSGD_TOKEN=")) for line in LINES)


@pytest.mark.parametrize("block", [block for kind, block in BLOCKS if kind == "python"])
def test_python_blocks_run(block: str, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    exec(block, {})


@pytest.mark.parametrize(
    "line", [line for line in LINES if line.startswith("lightning-async-localsgd ") and ADDRESS not in line]
)
def test_command_lines_run(
    line: str, finished: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "lightning_logs").symlink_to(finished / "lightning_logs")
    monkeypatch.chdir(tmp_path)
    code, output, errors = command(*shlex.split(line, comments=True)[1:])
    assert code in ((0, 3) if "doctor" in line else (0,)), output + errors


def test_command_lines_that_ask_a_server_run(
    live_run: Callable[..., LiveRun], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = live_run(seconds_per_step=[0.01, 0.01], trainer={"max_steps": 100_000})
    run.wait_for(lambda state: len(state["workers"]) == 2)
    monkeypatch.setenv("ASYNC_LOCALSGD_TOKEN", TOKEN)
    lines = [line for line in LINES if ADDRESS in line]
    assert lines
    for line in lines:
        code, output, errors = command(*shlex.split(line.replace(ADDRESS, f"127.0.0.1:{run.port}"), comments=True)[1:])
        assert code in ((0, 3) if "doctor" in line else (0,)), output + errors
    run.stop()
