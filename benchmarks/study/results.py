"""The study's results: one line of JSON for each run, one file for each table, and what was tuned."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from benchmarks.study import cells
from benchmarks.study.cells import Cell

DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "docs" / "results"
TUNING = "tuning"
TUNING_SEED = 0


class Untuned(LookupError):
    """A learning rate is not known yet.

    Args:
        missing: the cells whose runs decide about it.

    """

    def __init__(self, missing: list[Cell]) -> None:
        names = ", ".join(sorted({cell.label for cell in missing}))
        super().__init__(f"{len(missing)} runs that tune {names} are not there: python -m benchmarks.study tuning")
        self.missing = missing


class Results:
    """All results in a folder.

    Every run is found by its cell and its seed, in whichever file it is.

    Args:
        folder: with files of JSON lines.

    """

    def __init__(self, folder: Path = DEFAULT_FOLDER) -> None:
        self.folder = folder
        self._known: dict[tuple[Cell, int], dict[str, Any]] = {}
        self._resolved: dict[Cell, Cell] = {}
        self.read()

    def read(self) -> None:
        """Reads all files; of a run that is there twice the last counts."""
        self._known.clear()
        self._resolved.clear()
        for path in sorted(self.folder.glob("*.jsonl")):
            for number, line in enumerate(path.read_text().splitlines(), start=1):
                try:
                    record = json.loads(line)
                    self._known[_cell(record["cell"]), record["seed"]] = record
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}:{number} is no line of a run: {error}") from error

    def append(self, table: str, record: dict[str, Any]) -> None:
        """Adds a run to a table's file, whole, also when several processes do."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        handle = os.open(self.folder / f"{table}.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            os.write(handle, line)
        finally:
            os.close(handle)
        self._resolved.clear()
        self._known[_cell(record["cell"]), record["seed"]] = record

    def find(self, cell: Cell, seed: int) -> dict[str, Any] | None:
        """The run of a cell, or None; a cell whose learning rates are not known yet has none."""
        try:
            wanted = self.resolved(cell)
        except Untuned:
            return None
        return self._known.get((wanted, seed))

    def all_of(self, cell: Cell) -> list[dict[str, Any]]:
        """A cell's runs, in order of their seeds."""
        return [found for seed in cells.SEEDS if (found := self.find(cell, seed)) is not None]

    def resolved(self, cell: Cell) -> Cell:
        """The cell that is run for this one, with all its learning rates.

        Raises:
            Untuned: one was to be tuned, which has not been done yet.

        """
        if cell not in self._resolved:
            found = cell.canonical()
            if found.inner_lr is None:
                found = replace(found, inner_lr=self._best(inner_candidates(found), "inner_lr"))
            tuned = found
            if found.lr is None and found.method != "single":
                tuned = replace(tuned, lr=self._best_lr(found))
            if found.stage is None and found.method in cells.STAGE_GRID:
                tuned = replace(tuned, stage=self._best(stage_candidates(tuned), "stage"))
            self._resolved[cell] = tuned
        return self._resolved[cell]

    def _best_lr(self, cell: Cell) -> float:
        """Walks over the grid, first upwards, to the first value that is worse."""
        plain, grid = _plain(cell), cells.OUTER_GRID
        begin = best = grid.index(cells.WALK_FROM["warm" if cell.warm_steps else "scratch"])
        for step in (1, -1):
            while 0 <= best + step < len(grid):
                here, there = (cells.outer_tuning(plain, grid[index]) for index in (best, best + step))
                if self._best([here, there], "lr") == here.lr:
                    break
                best += step
            if best != begin:
                break
        return grid[best]

    def _best(self, candidates: Iterable[Cell], field: str) -> float:
        runs = [(self.find(candidate, TUNING_SEED), candidate) for candidate in candidates]
        missing = [candidate for run, candidate in runs if run is None]
        if missing:
            raise Untuned(missing)
        losses = [(run["final_loss"], getattr(candidate, field)) for run, candidate in runs if run is not None]
        # What has diverged is worse than anything.
        value: float = min(losses, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])[1]
        return value


def inner_candidates(cell: Cell) -> list[Cell]:
    """The runs that decide about a cell's inner learning rate: those with its kind of start, on C4."""
    method = "single" if cell.method == "single" else "sync"
    tuned = [one for one in cells.inner_tuning() if one.method == method]
    return [replace(one, warm_steps=0) for one in tuned] if cell.warm_steps == 0 else tuned


def stage_candidates(cell: Cell) -> list[Cell]:
    """The runs that decide about the value of a cell's staleness stage, with the learning rate that it has."""
    plain = replace(_plain(cell), lr=cell.lr)
    return [replace(plain, stage=value) for value in cells.STAGE_GRID[cell.method]]


def _plain(cell: Cell) -> Cell:
    """The cell whose runs tune this one's method: at ``very``, on C4, and with as many workers, up to a limit.

    Random weights need larger steps than a warm start, and have runs of their own.
    """
    plain = Cell(cell.method, cell.dynamic, "auto" if cell.grace else 0.0, workers=cells.tuned_workers(cell))
    if cell.warm_steps == 0:
        plain = replace(plain, warm_steps=0)
    if cell.local_steps == cells.DYLU_ROUNDS.local_steps:
        plain = replace(plain, local_steps=cell.local_steps)
    return plain


_FIELDS = {field.name for field in fields(Cell)}


def _cell(stored: dict[str, Any]) -> Cell:
    unknown = set(stored) - _FIELDS
    if unknown:
        raise ValueError(f"the cell has unknown fields {sorted(unknown)}")
    return Cell(**stored)
