"""A callback that notes what a process does the moment it does it, so that it is known however the process ends.

Times are those of ``time.monotonic``, which the processes of one machine share.
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

from lightning_async_localsgd.faults import life_number


@dataclass
class Life:
    """One process's part in training.

    Attributes:
        worker: its number.
        number: how often the worker had been restarted before.
        session: its session.
        pid: of the process.
        steps: the ends of its local steps.
        answers: of its pushes: moment, sequence number, version that came back, reason of a refusal.
        log: what the package has logged in this process.

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
        """Begin and end of what lies between its steps."""
        return list(pairwise(self.steps))

    def steps_within(self, begin: float, end: float) -> int:
        """How many of its steps ended in that time."""
        return sum(begin < step < end for step in self.steps)


class StepNotes(pl.Callback):
    """Appends to ``notes_<worker>_<life>.txt``, line by line.

    Args:
        directory: where the files go; it must exist.

    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        self.directory = Path(directory)
        self._file: TextIO | None = None
        self._handler: logging.Handler | None = None
        self._round = 1

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        worker = trainer.strategy.training.phase.worker  # type: ignore[attr-defined]
        if self._file is None:
            self._file = (self.directory / f"notes_{worker.number}_{life_number()}.txt").open("a", buffering=1)
            self._note("start", worker.session, os.getpid())
            self._handler = _Handler(self)
            logging.getLogger("lightning_async_localsgd").addHandler(self._handler)
        # The answer came within the step, so it stands before it.
        if worker.round > self._round:
            self._note("answer", worker.round - 1, worker.reply.version, json.dumps(worker.reply.refused))
            self._round = worker.round
        self._note("step")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._handler is not None:
            logging.getLogger("lightning_async_localsgd").removeHandler(self._handler)
            self._handler = None

    def note_log(self, text: str) -> None:
        """Notes a line of the log."""
        self._note("log", json.dumps(text))

    def _note(self, kind: str, *words: Any) -> None:
        assert self._file is not None
        # In one go, for several threads log.
        self._file.write(" ".join(map(str, (kind, time.monotonic(), *words))) + "\n")


class _Handler(logging.Handler):
    def __init__(self, notes: StepNotes) -> None:
        super().__init__()
        self._notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        self._notes.note_log(record.getMessage())


def read_notes(directory: Path) -> dict[tuple[int, int], Life]:
    """All notes so far, by worker and life."""
    found = {}
    for path in sorted(directory.glob("notes_*.txt")):
        worker, number = map(int, path.stem.split("_")[1:])
        life = found[worker, number] = Life(worker, number)
        for line in path.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                continue  # The last line of a process that was killed.
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
    return found
