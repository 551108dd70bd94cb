"""The results of the study: one line of JSON for each run, one file for each table, and the tuned learning rates."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.study import cells
from benchmarks.study.cells import Cell

FIGURES = {
    "study_loss.png": "Perplexity over local updates and over time",
    "study_staleness.png": "Staleness of merged pushes",
    "study_cosine.png": "Cosine between pushes and the outer momentum",
    "study_timeline.png": "Computing and waiting times of each worker",
}
"""The figures of the study: file names and captions."""

DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "docs" / "results"
TUNING = "tuning"
TUNING_SEED = 0


class NotTunedError(LookupError):
    """A tuned value is not known yet.

    Args:
        missing: the cells whose runs determine the value.

    """

    def __init__(self, missing: list[Cell]) -> None:
        names = ", ".join(sorted({cell.label for cell in missing}))
        super().__init__(f"{len(missing)} runs that tune {names} are missing; run: python -m benchmarks.study tuning")
        self.missing = missing


class Results:
    """The results in a folder.

    A run is identified by its cell and its seed. The file that contains the run does not matter.

    Args:
        folder: contains files of JSON lines.

    """

    def __init__(self, folder: Path = DEFAULT_FOLDER) -> None:
        self.folder = folder
        self._runs: dict[tuple[Cell, int], dict[str, Any]] = {}
        self._resolved: dict[Cell, Cell] = {}
        self.read()

    def read(self) -> None:
        """Read all files. If a run occurs twice, the last line counts."""
        self._runs.clear()
        self._resolved.clear()
        for path in sorted(self.folder.glob("*.jsonl")):
            for number, line in enumerate(path.read_text().splitlines(), start=1):
                try:
                    record = json.loads(line)
                    self._runs[_parse_cell(record["cell"]), record["seed"]] = record
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}:{number} is not a valid run: {error}") from error

    def append(self, table: str, record: dict[str, Any]) -> None:
        """Append a run to the file of a table. Several processes may append at the same time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        handle = os.open(self.folder / f"{table}.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            os.write(handle, line)
        finally:
            os.close(handle)
        self._resolved.clear()
        self._runs[_parse_cell(record["cell"]), record["seed"]] = record

    def find(self, cell: Cell, seed: int) -> dict[str, Any] | None:
        """Return the run of a cell, or None if it is missing or if the cell's learning rates are not known yet."""
        try:
            resolved = self.resolved(cell)
        except NotTunedError:
            return None
        return self._runs.get((resolved, seed))

    def runs_of(self, cell: Cell) -> list[dict[str, Any]]:
        """Return the runs of a cell in the order of their seeds."""
        return [run for seed in cells.SEEDS if (run := self.find(cell, seed)) is not None]

    def resolved(self, cell: Cell) -> Cell:
        """Return the cell whose run provides the result of this cell, with all tuned values filled in.

        Raises:
            NotTunedError: runs that tune a value are missing.

        """
        if cell not in self._resolved:
            canonical = cell.canonical()
            if canonical.inner_lr is None:
                canonical = replace(canonical, inner_lr=self._best(inner_candidates(canonical), "inner_lr"))
            tuned = canonical
            if canonical.lr is None and canonical.has_outer_lr:
                tuned = replace(tuned, lr=self._best_lr(canonical))
            if canonical.stage is None and canonical.method in cells.STAGE_GRID:
                tuned = replace(tuned, stage=self._best(stage_candidates(tuned), "stage"))
            self._resolved[cell] = tuned
        return self._resolved[cell]

    def _best_lr(self, cell: Cell) -> float:
        """Search the grid for the best learning rate: first upwards, then downwards, until a value is worse."""
        tuning_cell, grid = _tuning_cell(cell), cells.OUTER_GRID
        begin = best = grid.index(cells.GRID_SEARCH_START["warm" if cell.warm_steps else "scratch"])
        for step in (1, -1):
            while 0 <= best + step < len(grid):
                current, next_cell = (cells.outer_tuning(tuning_cell, grid[i]) for i in (best, best + step))
                if self._best([current, next_cell], "lr") == current.lr:
                    break
                best += step
            if best != begin:
                break
        return grid[best]

    def best(self, candidates: Iterable[Cell]) -> Cell:
        """Return the candidate whose run with the seed of the tuning has the lowest loss.

        Raises:
            NotTunedError: runs of candidates are missing.

        """
        runs = [(self.find(candidate, TUNING_SEED), candidate) for candidate in candidates]
        missing = [candidate for run, candidate in runs if run is None]
        if missing:
            raise NotTunedError(missing)
        losses = [(run["final_loss"], candidate) for run, candidate in runs if run is not None]
        # A run that diverged is worse than any other.
        return min(losses, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])[1]

    def _best(self, candidates: Iterable[Cell], field: str) -> float:
        value: float = getattr(self.best(candidates), field)
        return value


def inner_candidates(cell: Cell) -> list[Cell]:
    """Return the runs on C4, with the cell's kind of start, that determine its inner learning rate."""
    method = "single" if cell.method == "single" else "sync"
    tuned = [candidate for candidate in cells.inner_tuning() if candidate.method == method]
    return [replace(candidate, warm_steps=0) for candidate in tuned] if cell.warm_steps == 0 else tuned


def stage_candidates(cell: Cell) -> list[Cell]:
    """Return the runs that determine the parameter of a cell's staleness stage, with the cell's learning rate."""
    tuning_cell = replace(_tuning_cell(cell), lr=cell.lr)
    return [replace(tuning_cell, stage=value) for value in cells.STAGE_GRID[cell.method]]


def _tuning_cell(cell: Cell) -> Cell:
    """Return the cell whose runs tune the values of this cell.

    The tuning cell is on C4 and level ``very``, with the same number of workers up to a limit. Starts from random
    weights need larger steps than warm starts and are tuned separately.
    """
    grace: Literal["auto"] | float = "auto" if cell.grace else 0.0
    tuning_cell = Cell(cell.method, cell.dynamic, grace, workers=cells.tuning_workers(cell))
    if cell.warm_steps == 0:
        tuning_cell = replace(tuning_cell, warm_steps=0)
    if cell.local_steps == cells.SYNC_SHORT_ROUNDS.local_steps:
        tuning_cell = replace(tuning_cell, local_steps=cell.local_steps)
    return tuning_cell


_FIELDS = {field.name for field in fields(Cell)}


def _parse_cell(stored: dict[str, Any]) -> Cell:
    unknown = set(stored) - _FIELDS
    if unknown:
        raise ValueError(f"the cell has unknown fields {sorted(unknown)}")
    return Cell(**stored)


def add_next_start(spans: Sequence[Sequence[float]]) -> list[tuple[int, float, float, float | None]]:
    """Add to each round the start of the same worker's next round.

    Args:
        spans: worker, start and end of each round.

    Returns:
        Worker, start, end and next start of each round, in order of their starts. The next start is None if unknown.

    """
    rounds: list[tuple[int, float, float, float | None]] = []
    next_start: dict[int, float] = {}
    for worker, start, end in sorted(spans, key=lambda span: span[1], reverse=True):
        rounds.append((int(worker), start, end, next_start.get(int(worker))))
        next_start[int(worker)] = start
    return rounds[::-1]
