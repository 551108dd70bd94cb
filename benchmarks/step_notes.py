"""A callback that writes each event of a process to a file at once, so that the events of killed processes are kept.

Times are those of ``time.monotonic``, which is the same clock for all processes of a machine.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import lightning.pytorch as pl
from typing_extensions import override

from lightning_async_localsgd.lightning.fault_injection import life_number


@dataclass
class Life:
    """The notes of one worker process. A worker that is restarted has several lives.

    Attributes:
        worker: the worker's number.
        number: how often the worker was restarted before this process.
        session: the session of the process.
        pid: process ID.
        steps: end time of each local step.
        answers: for each answered push: time, sequence number, version of the dispatched model, and why the push was
            refused (None if it was merged).
        log: time and text of the package's log messages in this process.

    """

    worker: int
    number: int
    session: str = ""
    pid: int = 0
    steps: list[float] = field(default_factory=list)
    answers: list[tuple[float, int, int, str | None]] = field(default_factory=list)
    log: list[tuple[float, str]] = field(default_factory=list)

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """Begin and end of each interval between two steps."""
        return list(pairwise(self.steps))

    def steps_within(self, begin: float, end: float) -> int:
        """Return the number of steps that ended between ``begin`` and ``end``."""
        return sum(begin < step < end for step in self.steps)


class StepNotes(pl.Callback):
    """Appends each event to ``notes_<worker>_<life>.txt``.

    Args:
        directory: existing directory for the files.

    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        self.directory = Path(directory)
        self._file: TextIO | None = None
        self._handler: logging.Handler | None = None
        self._answered = 0

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        worker = trainer.strategy.controller.runtime.worker  # type: ignore[attr-defined]
        if self._file is None:
            self._file = (self.directory / f"notes_{worker.number}_{life_number()}.txt").open("a", buffering=1)
            self._note("start", worker.session, os.getpid())
            self._handler = _Handler(self)
            logging.getLogger("lightning_async_localsgd").addHandler(self._handler)
        # The answer was adopted during the step, so write it before the step. A later push may be in flight by now.
        reply = worker.reply
        if reply.sequence > self._answered:
            self._note("answer", reply.sequence, reply.version, json.dumps(reply.refused))
            self._answered = reply.sequence
        self._note("step")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._handler is not None:
            logging.getLogger("lightning_async_localsgd").removeHandler(self._handler)
            self._handler = None

    def note_log(self, text: str) -> None:
        """Append a log message."""
        self._note("log", json.dumps(text))

    def _note(self, kind: str, *words: Any) -> None:
        assert self._file is not None
        # One write, because several threads log.
        self._file.write(" ".join(map(str, (kind, time.monotonic(), *words))) + "\n")


class _Handler(logging.Handler):
    def __init__(self, notes: StepNotes) -> None:
        super().__init__()
        self._notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        self._notes.note_log(record.getMessage())


def read_notes(directory: Path) -> dict[tuple[int, int], Life]:
    """Read all notes so far, by worker and life."""
    lives = {}
    for path in sorted(directory.glob("notes_*.txt")):
        worker, number = map(int, path.stem.split("_")[1:])
        life = lives[worker, number] = Life(worker, number)
        for line in path.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                continue  # The incomplete last line of a killed process.
            kind, moment, *rest = line.rstrip("\n").split(" ", maxsplit=2)
            if kind == "start":
                session, pid = rest[0].split()
                life.session, life.pid = session, int(pid)
            elif kind == "step":
                life.steps.append(float(moment))
            elif kind == "answer":
                sequence, version, refused = rest[0].split(" ", maxsplit=2)
                life.answers.append((float(moment), int(sequence), int(version), json.loads(refused)))
            else:
                life.log.append((float(moment), json.loads(rest[0])))
    return lives
