"""The event file is complete and in order, and never delays the run."""

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

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_async_localsgd.lightning import callback as callback_module
from lightning_async_localsgd.lightning.callback import AsyncLocalSGDCallback
from lightning_async_localsgd.lightning.strategy import AsyncLocalSGDStrategy
from lightning_async_localsgd.server import line_file as module
from lightning_async_localsgd.server.event_file import (
    EventReader,
    NoEventFileError,
    find_event_file,
    read_lines,
    read_pushes,
)
from lightning_async_localsgd.server.journal import FORMAT
from lightning_async_localsgd.server.line_file import LineFile, older_file
from lightning_async_localsgd.server.run_state import RunState
from tests.unit.lightning.test_single_worker import fit


def outcome(sequence: int) -> dict[str, Any]:
    return {"kind": "push", "sequence": sequence, "refused": None if sequence % 2 else "no"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_push_is_a_line_with_its_fields(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "of" / "events.jsonl"
    file = LineFile(path)
    for sequence in range(1, 1001):
        file.write(outcome(sequence))
    file.close()
    file.close()
    file.write(outcome(0))
    written = lines(path)
    assert [line["sequence"] for line in written] == list(range(1, 1001))
    assert written[0] == outcome(1)
    assert written[1]["refused"] == "no"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not [thread for thread in threading.enumerate() if thread.name == "async_localsgd-events"]


def test_later_file_continues_after_an_incomplete_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"worker": 0}\n{"worker": ')
    file = LineFile(path)
    file.write(outcome(1))
    file.close()
    first, torn, last = path.read_text().splitlines()
    assert json.loads(first) == {"worker": 0}
    assert torn == '{"worker": '
    assert json.loads(last)["sequence"] == 1


def test_killed_process_loses_no_written_line(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from lightning_async_localsgd.server.line_file import LineFile, older_file\n"
        "file = LineFile(sys.argv[1])\n"
        "for sequence in range(100):\n"
        "    file.write({'kind': 'push', 'sequence': sequence})\n"
        "while open(sys.argv[1]).read().count('\\n') < 100:\n"
        "    time.sleep(0.001)\n"
        "file.write({'kind': 'push', 'sequence': 100})\n"
        "print('written', flush=True)\n"
        "time.sleep(600)\n"
    )
    path = tmp_path / "events.jsonl"
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert [line["sequence"] for line in lines(path)][:100] == list(range(100))


def test_full_disk_ends_the_file_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    file = LineFile("/dev/full")
    for sequence in range(3):
        file.write(outcome(sequence))
    file.close()
    assert "ends here" in caplog.text
    assert "lacks 3 lines" in caplog.text


def test_rest_of_a_partly_written_line_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nearly(FileIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(data)[:7]) or 0

    monkeypatch.setattr(module, "FileIO", Nearly)
    file = LineFile(tmp_path / "events.jsonl")
    for sequence in range(3):
        file.write(outcome(sequence))
    file.close()
    assert [line["sequence"] for line in lines(tmp_path / "events.jsonl")] == [0, 1, 2]


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
    file = LineFile(path)
    for sequence in range(10_000):
        file.write(outcome(sequence))
    assert file._queue.full()
    file.close()
    assert "too slow" in caplog.text
    # Now the disk is back, and what was waiting gets written.
    deadline = time.monotonic() + 60
    while file._thread.is_alive() and time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            os.read(reader, 1 << 20)
    os.close(reader)
    assert not file._thread.is_alive()


def test_fit_writes_its_pushes_and_a_later_fit_appends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "events.jsonl"
    callback = AsyncLocalSGDCallback(table=False, events=path)
    for _ in range(2):
        fit(AsyncLocalSGDStrategy(local_steps=5), max_steps=20, enable_checkpointing=False, callbacks=[callback])
    assert [line["kind"] for line in lines(path)].count("run") == 2
    written = read_pushes(path)
    half = len(written) // 2
    assert [line["version"] for line in written] == [*range(1, half + 1)] * 2
    assert sum(line["steps"] for line in written) == 40
    assert {line["refused"] for line in written} == {None}
    assert len({line["incarnation"] for line in written}) == 2


@pytest.mark.parametrize("path", ["", ".", os.sep])
def test_path_that_is_not_a_file_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"events=.* must be 'auto', the path of a file"):
        AsyncLocalSGDCallback(events=path)


def test_rotated_file_is_bounded_and_begins_with_the_run(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    file = LineFile(path, max_bytes=4000)
    file.write({"kind": "run", "format": FORMAT, "incarnation": "a"})
    for sequence in range(1000):
        file.write(outcome(sequence))
    file.close()
    assert path.stat().st_size + older_file(path).stat().st_size <= 4000
    first = {"kind": "run", "format": FORMAT, "incarnation": "a", "continued": True}
    assert lines(path)[0] == lines(older_file(path))[0] == first
    sequences = [push["sequence"] for push in read_pushes(path)]
    assert sequences == list(range(1000 - len(sequences), 1000))
    assert len(sequences) > 20


def test_reader_misses_nothing_while_the_file_is_rotated(tmp_path: Path) -> None:
    path, seen = tmp_path / "events.jsonl", []
    reader = EventReader(path)
    assert list(reader.read()) == []
    for part in range(20):
        file = LineFile(path, max_bytes=4000)
        for sequence in range(10 * part, 10 * part + 10):
            file.write(outcome(sequence))
        file.close()
        with path.open("a") as torn:
            torn.write('{"kind": "pu')
        seen += [line["sequence"] for line in reader.read()]
    assert seen == list(range(200))


def test_files_that_are_no_event_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NoEventFileError, match="contains no async_localsgd_events"):
        find_event_file(tmp_path)
    with pytest.raises(NoEventFileError, match="does not exist"):
        find_event_file(tmp_path / "nothing")
    path = tmp_path / "events.jsonl"
    path.write_text('{"kind": "run", "format": 99}\n')
    with pytest.raises(NoEventFileError, match="of format 99"):
        read_lines(find_event_file(path))


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf"), "1GB", True])
def test_limit_outside_its_range_is_refused(limit: Any) -> None:
    with pytest.raises(ValueError, match="max_event_megabytes"):
        AsyncLocalSGDCallback(max_event_megabytes=limit)


def test_reader_that_begins_during_a_rotation_reads_each_line_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    older_file(path).write_text('{"kind": "push", "sequence": 0}\n')
    reader = EventReader(path)
    assert [line["sequence"] for line in reader.read()] == [0], "the file has been moved, and there is no new one yet"
    path.write_text('{"kind": "push", "sequence": 1}\n')
    assert [line["sequence"] for line in reader.read()] == [1]
    assert list(reader.read()) == []
    reader.close()


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(NoEventFileError, match="cannot be read"):
        read_lines(tmp_path / "events.jsonl")


def test_file_has_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    file = LineFile(path)
    with pytest.raises(OSError, match="another run or callback writes this file"):
        LineFile(tmp_path / "." / "events.jsonl")
    program = "import sys; from lightning_async_localsgd.server.line_file import LineFile; LineFile(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    assert "another run or callback writes this file" in done.stderr
    file.write(outcome(1))
    file.close()
    LineFile(path).close()
    assert [line["sequence"] for line in lines(path)] == [1]


def test_two_callbacks_do_not_write_one_file(tmp_path: Path) -> None:
    callbacks = [AsyncLocalSGDCallback(table=False, events=tmp_path / "events.jsonl") for _ in range(2)]
    with pytest.raises(OSError, match="another run or callback writes this file"):
        fit(AsyncLocalSGDStrategy(checkpoint_every=None), max_steps=5, enable_checkpointing=False, callbacks=callbacks)
    fit(AsyncLocalSGDStrategy(checkpoint_every=None), max_steps=5, enable_checkpointing=False, callbacks=callbacks[:1])


def test_line_that_cannot_be_written_ends_the_file_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = LineFile(tmp_path / "events.jsonl")
    file.write({"kind": "push", "sequence": object()})
    file.close()
    assert "training goes on" in caplog.text


class Fails(L.Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            raise self.error


def test_run_that_ends_with_an_error_has_an_end(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    callbacks = [AsyncLocalSGDCallback(table=False, events=path), Fails(ValueError("it broke\nhere"))]
    with pytest.raises(ValueError, match="it broke"):
        fit(AsyncLocalSGDStrategy(checkpoint_every=None), max_steps=5, enable_checkpointing=False, callbacks=callbacks)
    state = RunState()
    for line in read_lines(path):
        state.add(line)
    view = state.as_dict()
    assert (view["ended"], view["error"], view["progress"]) == (True, "ValueError: it broke", 2)
    assert view["workers"][0]["state"] == "away"
    assert view["faults"][-1]["text"] == "the run ended with ValueError: it broke"


def test_summary_on_a_full_disk_does_not_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callback_module, "SUMMARY_FILE", "/dev/full")
    with pytest.warns(match="the summary of the run is not written to /dev/full"):
        fit(
            AsyncLocalSGDStrategy(checkpoint_every=None), max_steps=5, enable_checkpointing=False,
            logger=CSVLogger(tmp_path), callbacks=[AsyncLocalSGDCallback(table=False)],
        )  # fmt: skip
