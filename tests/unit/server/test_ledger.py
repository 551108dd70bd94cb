"""The ledger's file is complete and in order, and never delays the run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from lightning_async_localsgd.lightning.callback import AsyncLocalSGDCallback
from lightning_async_localsgd.lightning.strategy import AsyncLocalSGDStrategy
from lightning_async_localsgd.server import ledger as module
from lightning_async_localsgd.server.ledger import Ledger
from lightning_async_localsgd.server.run_stats import PushOutcome
from tests.unit.lightning.test_single_worker import fit


def outcome(sequence: int) -> PushOutcome:
    return PushOutcome(1, "session", sequence, "this", 3, 4, 10, 0, None if sequence % 2 else "no", 0.5)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_push_is_a_line_with_its_fields(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "of" / "ledger.jsonl"
    ledger = Ledger(path)
    for sequence in range(1, 1001):
        ledger.write(outcome(sequence))
    ledger.close()
    ledger.close()
    ledger.write(outcome(0))
    written = lines(path)
    assert [line["sequence"] for line in written] == list(range(1, 1001))
    assert written[0] == {
        "worker": 1, "session": "session", "sequence": 1, "incarnation": "this", "base_version": 3, "version": 4,
        "steps": 10, "staleness": 0, "refused": None, "seconds": 0.5,
    }  # fmt: skip
    assert written[1]["refused"] == "no"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not [thread for thread in threading.enumerate() if thread.name == "async_localsgd-ledger"]


def test_later_ledger_continues_after_an_incomplete_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"worker": 0}\n{"worker": ')
    ledger = Ledger(path)
    ledger.write(outcome(1))
    ledger.close()
    first, torn, last = path.read_text().splitlines()
    assert json.loads(first) == {"worker": 0}
    assert torn == '{"worker": '
    assert json.loads(last)["sequence"] == 1


def test_killed_process_loses_no_written_line(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from lightning_async_localsgd.server.ledger import Ledger\n"
        "from lightning_async_localsgd.server.run_stats import PushOutcome\n"
        "ledger = Ledger(sys.argv[1])\n"
        "for sequence in range(100):\n"
        "    ledger.write(PushOutcome(0, 's', sequence, 'i', 0, 0, 1, 0, None, 0.0))\n"
        "while open(sys.argv[1]).read().count('\\n') < 100:\n"
        "    time.sleep(0.001)\n"
        "ledger.write(PushOutcome(0, 's', 100, 'i', 0, 0, 1, 0, None, 0.0))\n"
        "print('written', flush=True)\n"
        "time.sleep(600)\n"
    )
    path = tmp_path / "ledger.jsonl"
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert [line["sequence"] for line in lines(path)][:100] == list(range(100))


def test_full_disk_ends_the_ledger_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    ledger = Ledger("/dev/full")
    for sequence in range(3):
        ledger.write(outcome(sequence))
    ledger.close()
    assert "ends here" in caplog.text
    assert "lacks 3 pushes" in caplog.text


def test_rest_of_a_partly_written_line_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nearly(FileIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(data)[:7]) or 0

    monkeypatch.setattr(module, "FileIO", Nearly)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for sequence in range(3):
        ledger.write(outcome(sequence))
    ledger.close()
    assert [line["sequence"] for line in lines(tmp_path / "ledger.jsonl")] == [0, 1, 2]


def test_stuck_disk_does_not_delay_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_MAX_QUEUED", 50)
    monkeypatch.setattr(module, "_CLOSING_SECONDS", 0.1)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    # The pipe is full and has no reader, so writing to it blocks.
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(reader, bytes(1 << 16))
    ledger = Ledger(path)
    for sequence in range(10_000):
        ledger.write(outcome(sequence))
    assert ledger._queue.full()
    ledger.close()
    assert "too slow" in caplog.text
    # Now the disk is back, and what was waiting gets written.
    deadline = time.monotonic() + 60
    while ledger._thread.is_alive() and time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            os.read(reader, 1 << 20)
    os.close(reader)
    assert not ledger._thread.is_alive()


def test_fit_writes_its_pushes_and_a_later_fit_appends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ledger.jsonl"
    callback = AsyncLocalSGDCallback(table=False, ledger=path)
    for _ in range(2):
        fit(AsyncLocalSGDStrategy(local_steps=5), max_steps=20, enable_checkpointing=False, callbacks=[callback])
    written = lines(path)
    half = len(written) // 2
    assert [line["version"] for line in written] == [*range(1, half + 1)] * 2
    assert sum(line["steps"] for line in written) == 40
    assert {line["refused"] for line in written} == {None}
    assert len({line["incarnation"] for line in written}) == 2


@pytest.mark.parametrize("path", ["", ".", os.sep])
def test_path_that_is_not_a_file_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"ledger=.* must be the path of a file"):
        AsyncLocalSGDCallback(ledger=path)
