"""benchmarks/study: running and resuming a table, the order of the runs, and the page that the report writes."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study import cells, equal_time
from benchmarks.study.__main__ import main, plan_runs
from benchmarks.study.cells import (
    DN_DYLU_GRACE,
    GRID_SEARCH_START,
    INNER_GRID,
    LEVELS,
    OUTER_GRID,
    OUTER_GRID_WITH_INNER,
    SEEDS,
    SYNC,
    TABLES,
    TUNED,
    Cell,
    strategy_options,
)
from benchmarks.study.equal_time import steps_in
from benchmarks.study.equal_time_report import share_to_loss
from benchmarks.study.report import PAGE, render_tables, replace_section, time_to_loss, write_report
from benchmarks.study.results import FIGURES, TUNING, TUNING_SEED, NotTunedError, Results, add_next_start
from benchmarks.study.scheduling import PlannedRun, Queue
from benchmarks.study.text import DOMAINS, load_corpus
from lightning_async_localsgd import AsyncLocalSGDStrategy, SimulatedAsyncLocalSGDStrategy
from tests.examples.study_data import write_texts

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the layout of the real text, but with random words."""
    folder = tmp_path_factory.mktemp("data")
    write_texts(folder)
    return folder


def record(cell: Cell, seed: int, loss: float, seconds: float = 100.0) -> dict[str, Any]:
    """Return an invented result."""
    updates = cell.steps * cell.workers
    return {
        "table": "invented",
        "cell": cell.as_dict(),
        "seed": seed,
        "final_loss": loss,
        "seconds": seconds,
        "curve": [[0, 0.0, 5.0], [updates, seconds, loss]],
        "staleness": {"mean": 1.5, "max": 4, "histogram": {"0": 1, "3": 1}},
        "waiting_share": 0.25,
        "cosine": [[0, 0.1], [100, 0.2]],
        "timeline": [[0, 0.0, 10.0], [1, 2.0, 12.0]],
        "wall_seconds": 1.0,
    }


def invented_loss(cell: Cell) -> float:
    """Return a loss whose best learning rates are the second inner and the fourth outer value of the grids."""
    outer = 0 if cell.lr is None else abs(OUTER_GRID.index(cell.lr) - 3)
    return 4.0 + abs(INNER_GRID.index(cell.inner_lr or 0.0) - 1) + 0.1 * outer


def add_tuning_runs(results: Results, *of: Cell, loss: Callable[[Cell], float] = invented_loss) -> list[Cell]:
    """Add invented results of the runs that tune ``of``. Return these runs in the order in which they are needed."""
    inner = cells.inner_tuning()
    for cell in [*inner, *(replace(cell, warm_steps=0) for cell in inner)]:
        resolved = results.resolved(cell)
        results.append(TUNING, record(resolved, TUNING_SEED, invented_loss(resolved)))
    tuning_runs: list[Cell] = []
    for cell in of:
        while True:
            try:
                results.resolved(cell)
                break
            except NotTunedError as error:
                for missing in map(results.resolved, error.missing):
                    tuning_runs.append(missing)
                    results.append(TUNING, record(missing, TUNING_SEED, loss(missing)))
    return tuning_runs


def test_corpus_is_split_and_cached(data: Path, tmp_path: Path) -> None:
    corpus = load_corpus("domains", data, tmp_path, vocabulary=300, length=16)
    assert len(corpus.train) == len(corpus.validation) == len(DOMAINS)
    assert corpus.train[0].shape[1] == 17
    assert len(corpus.mixture) == sum(map(len, corpus.train))
    assert len(corpus.validation_windows(8)) == 8
    (cached,) = tmp_path.glob("domains-300-*.pt")
    stamp = cached.stat().st_mtime_ns
    again = load_corpus("domains", data, tmp_path, vocabulary=300, length=16)
    assert again.train[3].equal(corpus.train[3])
    assert cached.stat().st_mtime_ns == stamp
    with pytest.raises(FileNotFoundError, match="--data"):
        load_corpus("c4", tmp_path, tmp_path, vocabulary=300, length=16)
    with pytest.raises(ValueError, match="fewer than a window"):
        load_corpus("wikitext2", data, tmp_path, vocabulary=300, length=10**6)


def test_synchronous_cells_share_one_run_for_all_levels() -> None:
    assert len({cell.canonical() for cell in (replace(SYNC, level=level) for level in LEVELS)}) == 1
    assert len({replace(DN_DYLU_GRACE, level=level).canonical() for level in LEVELS}) == len(LEVELS)
    equal = replace(SYNC, level="none")
    assert equal.slowdown() == pytest.approx(0.995 / 3.33)
    assert replace(equal, method="single").slowdown() == pytest.approx(0.995 / 0.58)


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (0.07, [0.07, 0.2, 0.02]),
        (0.2, [0.07, 0.2, 0.7]),
        (2.0, [0.07, 0.2, 0.7, 2.0]),
        (0.007, [0.07, 0.2, 0.02, 0.007]),
    ],
)
def test_outer_rate_is_searched_on_the_grid(tmp_path: Path, best: float, tried: list[float]) -> None:
    results = Results(tmp_path)

    def loss(cell: Cell) -> float:
        assert cell.lr is not None
        return abs(math.log(cell.lr / best))

    tuning_runs = add_tuning_runs(results, Cell("nesterov"), loss=loss)
    assert [cell.lr for cell in tuning_runs] == tried
    assert {cell.steps for cell in tuning_runs} == {Cell("nesterov").steps}, "tuning runs have the full length"
    assert results.resolved(Cell("nesterov")).lr == best
    # The run with the best rate is also the run of the table.
    assert results.find(Cell("nesterov"), TUNING_SEED) is not None
    # Rates are tuned again for eight workers, and sixteen workers use the same rates.
    with pytest.raises(NotTunedError):
        results.resolved(Cell("nesterov", workers=8))
    tuning_runs = add_tuning_runs(results, Cell("nesterov", workers=8), loss=loss)
    assert [(cell.lr, cell.workers) for cell in tuning_runs] == [(lr, 8) for lr in tried]
    assert results.resolved(Cell("nesterov", workers=16)).lr == best
    # Only MLA is tuned again for sixteen workers.
    assert [cells.tuning_workers(replace(cells.MLA_DYLU_GRACE, workers=count)) for count in (4, 8, 16)] == [4, 8, 16]
    # A run that diverges is worse than any other.
    tuning_runs = add_tuning_runs(results, Cell("sgd"), loss=lambda cell: math.nan if cell.lr != 0.07 else 4.0)
    assert [cell.lr for cell in tuning_runs] == [0.07, 0.2, 0.02]
    assert results.resolved(Cell("sgd")).lr == 0.07


def test_staleness_stage_is_tuned_with_the_tuned_learning_rate(tmp_path: Path) -> None:
    results = Results(tmp_path)

    def loss(cell: Cell) -> float:
        assert cell.stage is not None
        return invented_loss(cell) + abs(cell.stage - 30.0) / 100.0

    tuning_runs = add_tuning_runs(results, Cell("delay"), loss=loss)
    assert [(cell.lr, cell.stage) for cell in tuning_runs] == [
        *((lr, 1.0) for lr in (0.07, 0.2, 0.7)),
        *((0.2, stage) for stage in cells.STAGE_GRID["delay"][1:]),
    ]
    assert (results.resolved(Cell("delay")).lr, results.resolved(Cell("delay")).stage) == (0.2, 30.0)
    assert cells.staleness_stage(results.resolved(Cell("delay"))) is not None


def test_rounds_get_the_start_of_the_next_round() -> None:
    spans = [[0, 0.0, 5.0], [1, 0.0, 8.0], [0, 8.0, 13.0], [1, 8.0, 16.0]]
    assert add_next_start(spans) == [(1, 0.0, 8.0, 8.0), (0, 0.0, 5.0, 8.0), (1, 8.0, 16.0, None), (0, 8.0, 13.0, None)]


def test_tuning_runs_come_first(tmp_path: Path) -> None:
    results = Results(tmp_path)
    queue = Queue([PlannedRun("table_a", DN_DYLU_GRACE, 1), PlannedRun("table_a", Cell("single"), 0)], results)

    def next_runs(count: int) -> list[PlannedRun]:
        runs = [run for _ in range(count) if (run := queue.next()) is not None]
        assert len(runs) == count
        return runs

    def finish(runs: list[PlannedRun]) -> None:
        for run in runs:
            results.append(run.table, record(run.cell, run.seed, invented_loss(run.cell)))

    inner = next_runs(len(INNER_GRID) * len(OUTER_GRID_WITH_INNER))
    assert {(run.table, run.cell.method) for run in inner} == {(TUNING, "sync")}
    assert {run.cell.inner_lr for run in inner} == set(INNER_GRID)
    # The first planned run needs the results of these runs. Meanwhile, the second planned run is next.
    single = next_runs(len(INNER_GRID))
    assert {(run.table, run.cell.method, run.cell.lr) for run in single} == {(TUNING, "single", None)}
    assert queue.next() is None
    finish(inner)
    search = next_runs(2)
    assert [(run.cell.method, run.cell.dynamic, run.cell.lr) for run in search] == [
        ("dn", True, lr) for lr in (GRID_SEARCH_START["warm"], OUTER_GRID[3])
    ]
    assert {run.cell.inner_lr for run in search} == {INNER_GRID[1]}
    finish([*search, *single])
    # The results determine how the search continues.
    later = next_runs(2)
    assert [(run.table, run.cell.method, run.cell.lr) for run in later] == [
        (TUNING, "dn", OUTER_GRID[4]),
        ("table_a", "single", None),
    ]
    finish(later)
    assert [(run.table, run.cell.method, run.cell.lr, run.seed) for run in next_runs(1)] == [
        ("table_a", "dn", OUTER_GRID[3], 1)
    ]
    assert queue.next() is None


def test_all_runs_the_most_important_cells_first() -> None:
    runs = plan_runs("all", list(LEVELS), list(SEEDS), Results())
    first = runs[: len(SEEDS) * (len(cells.TABLE_A) + len(cells.CONTROLS))]
    assert {run.table for run in first} == {"table_a"}
    assert {run.cell.level for run in first} == {"very"}
    assert {run.table for run in runs} == {*TABLES, TUNING}
    # All other tables run their first seeds before their second seeds.
    later_seeds = [run.seed for run in runs if run.table not in ("table_a", "table_f", TUNING)]
    assert later_seeds == sorted(later_seeds)
    assert {run.cell for run in runs} == {cell for table in [*TABLES.values(), cells.RATE_CHECKS] for cell in table}
    assert {run.cell.method for run in plan_runs(TUNING, list(LEVELS), [0], Results())} == {
        cell.method for cell in TUNED
    }


def test_results_are_read_again_and_report_missing_runs(tmp_path: Path) -> None:
    results = Results(tmp_path)
    with pytest.raises(
        NotTunedError, match=f"{len(INNER_GRID) * len(OUTER_GRID_WITH_INNER)} runs that tune sync DiLoCo"
    ):
        results.resolved(DN_DYLU_GRACE)
    add_tuning_runs(results, DN_DYLU_GRACE)
    resolved = results.resolved(DN_DYLU_GRACE)
    assert (resolved.inner_lr, resolved.lr) == (INNER_GRID[1], OUTER_GRID[3])
    results.append("table_a", record(resolved, 1, 4.25))
    again = Results(tmp_path)
    run = again.find(DN_DYLU_GRACE, 1)
    assert run is not None
    assert run["final_loss"] == 4.25
    assert again.find(DN_DYLU_GRACE, 2) is None
    with (tmp_path / "table_a.jsonl").open("a") as file:
        file.write('{"cell": {"method": "dn", "colour": 1}, "seed": 0}\n')
    with pytest.raises(ValueError, match=r"table_a.jsonl:2 is not a valid run.*colour"):
        Results(tmp_path)


def test_time_to_loss_is_interpolated() -> None:
    curve = [[0, 0.0, 5.0], [100, 10.0, 4.0], [200, 20.0, 3.0]]
    assert time_to_loss(curve, 3.5) == pytest.approx(15.0)
    assert time_to_loss(curve, 5.0) == 0.0
    assert time_to_loss(curve, 2.9) is None
    # An early point below the loss does not count if the loss rises again.
    assert time_to_loss([[0, 0.0, 3.0], *curve], 3.5) == pytest.approx(15.0)


def test_report_fills_the_page_from_the_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures are drawn with the extra `docs`")
    results = Results(tmp_path / "results")
    add_tuning_runs(results, *TUNED)
    (tmp_path / "results" / f"{TUNING}.jsonl").rename(tmp_path / "results" / "earlier.jsonl")
    for seed in SEEDS:
        for cell in {results.resolved(cell) for table in TABLES.values() for cell in table if cell.size == "0.5m"}:
            loss = 4.0 if cell.method == "sync" else 4.0 + 0.01 * seed
            results.append("invented", record(cell, seed, loss, 300.0 if cell.method == "sync" else 90.0))
    page = tmp_path / "study.md"
    shutil.copy(PAGE, page)
    write_report(Results(tmp_path / "results"), page, tmp_path / "images")
    text = page.read_text()
    very = text.split("table_a_very:begin")[1].split("table_a_very:end")[0]
    mean, deviation = 1.01005, 0.0101
    row = f"| DN + DyLU + grace | 0.2 | {math.exp(4.0) * mean:.2f} ± {math.exp(4.0) * deviation:.2f} |"
    assert f"{row} +0.55 ± 0.55 | 3 | 90 s |" in very
    assert "90 s (1 of 3) | 1.5 / 4 | 25% |" in very
    none = text.split("table_a_none:begin")[1].split("table_a_none:end")[0]
    assert f"| sync DiLoCo | 0.2 | 54.60 ± 0.00 |  | 3 | {300 * 0.995 / 3.33:.0f} s |" in none
    # Model sizes without results have dashes.
    assert "| sync DiLoCo | 1.5 M | 0.2 | - | - |" in text
    assert {path.name for path in (tmp_path / "images").iterdir()} == set(FIGURES)
    assert all(f"](images/{name})" in text for name in FIGURES)
    # The same results give the same page.
    write_report(Results(tmp_path / "results"), page, tmp_path / "images")
    assert page.read_text() == text


def test_page_has_markers_for_all_tables() -> None:
    text = PAGE.read_text()
    for name in render_tables(Results(PAGE.parent / "results")):
        assert replace_section(text, name, "new").count("new\n\n<!--") == 1
    with pytest.raises(ValueError, match="table_x"):
        replace_section(text, "table_x", "new")


def test_small_runs_need_another_results_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["table_a", "--small"])
    assert "--results" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["table_a", "--data", str(tmp_path / "nothing")])
    assert "is not a folder" in capsys.readouterr().err


def test_every_cell_has_its_own_strategy_options() -> None:
    trained = {cell for table in [*TABLES.values(), equal_time.TABLE_G] for cell in table if cell.workers_apart}
    for cell in trained:
        options = strategy_options(replace(cell, lr=0.2, stage=1.0 if cell.method == "delay" else 0.0))
        SimulatedAsyncLocalSGDStrategy(cell.seconds_per_step, **options)
        AsyncLocalSGDStrategy(**options)
    at_very = [cell for cell in [*cells.TABLE_A, *cells.CONTROLS, *cells.LATER_CELLS] if cell.method != "single"]
    options = {repr(strategy_options(replace(cell, lr=0.2, stage=0.5))) for cell in at_very}
    assert len(options) == len(set(at_very))


def test_every_run_of_equal_time_takes_the_steps_of_its_devices() -> None:
    # The paper's devices take 0.58, 0.75, 1.51 and 3.33 s a step.
    assert steps_in(equal_time.ALONE) == int(1000.0 / 0.58)
    assert steps_in(equal_time.DDP) == int(1000.0 / 3.33)
    assert steps_in(replace(equal_time.DDP, exchange_seconds=0.5)) == int(1000.0 / 4.33)
    sync = replace(equal_time.DDP, method="sync", local_steps=20, lr=0.7)
    assert steps_in(sync) == pytest.approx(1000.0 / 3.33, abs=1)
    together = 1000.0 * sum(1.0 / seconds for seconds in sync.seconds_per_step) / 4
    without_grace = replace(equal_time.DEFAULTS, method="sgd", lr=0.5, local_steps=20, grace=0.0)
    assert 0.98 * together < steps_in(without_grace) <= together + 1
    assert 0.85 * together < steps_in(equal_time.DEFAULTS) <= together + 1
    # Only the fastest device matters alone.
    elsewhere = replace(equal_time.ALONE, level="1:10", workers=2, exchange_seconds=0.1)
    assert elsewhere.canonical() == equal_time.ALONE
    assert replace(equal_time.ALONE, level="none").canonical() != equal_time.ALONE


def test_share_of_the_time_to_a_loss_is_interpolated() -> None:
    points = [(0.25, 5.0), (0.5, 4.0), (1.0, 3.0)]
    assert share_to_loss(points, 4.0) == pytest.approx(0.5)
    assert share_to_loss(points, 3.5) == pytest.approx(0.5 * 2**0.5)
    assert share_to_loss(points, 5.5) == 0.25
    assert share_to_loss(points, 2.9) == math.inf


@pytest.mark.slow
def test_table_runs_and_resumes(data: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"

    def run_study() -> str:
        command = [sys.executable, "-m", "benchmarks.study", "table_h", "--small", "--seeds", "0"]
        command += ["--data", str(data), "--cache", str(tmp_path / "cache"), "--results", str(results)]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stderr

    run_study()
    lines = (results / "table_h.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    assert len(runs) == len(TABLES["table_h"])
    for run in runs:
        cell = Cell(**run["cell"])
        assert run["curve"][0][:2] == [0, 0.0]
        assert run["curve"][-1][:2] == [cell.steps * cell.workers, run["seconds"]]
        assert math.isfinite(run["final_loss"])
        assert sum(run["steps_by_worker"]) == cell.steps * cell.workers
    by_label = {Cell(**run["cell"]).label: run for run in runs}
    assert by_label["sync DiLoCo"]["seconds"] > 2 * by_label["DN + DyLU"]["seconds"]
    assert by_label["sync DiLoCo"]["staleness"]["max"] == 0
    # No run is repeated.
    assert run_study() == ""
    # A lost line is run again, with the same result.
    (results / "table_h.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    run_study()
    again = json.loads((results / "table_h.jsonl").read_text().splitlines()[-1])
    assert again["curve"] == runs[-1]["curve"]


def test_other_seeds_of_table_g_run_the_best_rates_only(tmp_path: Path) -> None:
    results = Results(tmp_path)
    assert equal_time.with_best_rates(results, 0) == equal_time.TABLE_G
    assert equal_time.with_best_rates(results, 1) == []
    defaults, rates = equal_time.DEFAULTS, equal_time.data_parallel(replace(equal_time.DDP, warm_steps=0))
    results.append("table_g", record(replace(defaults, warm_steps=0), 0, 5.0))
    for cell, loss in zip(rates[:2], (6.0, 5.5), strict=True):
        results.append("table_g", record(cell, 0, loss))
    assert equal_time.with_best_rates(results, 1) == [replace(defaults, warm_steps=0)]
    results.append("table_g", record(rates[2], 0, float("nan")))
    assert set(equal_time.with_best_rates(results, 1)) == {replace(defaults, warm_steps=0), rates[1]}
