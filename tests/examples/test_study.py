"""benchmarks/study: a table from nothing, resumed; which run comes next; and the page that is made of the results."""

from __future__ import annotations

import gzip
import json
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study import cells
from benchmarks.study.__main__ import jobs_of, main
from benchmarks.study.cells import (
    BEST,
    INNER_GRID,
    LEVELS,
    OUTER_GRID,
    OUTER_WITH_INNER,
    SEEDS,
    SYNC,
    TABLES,
    TUNED,
    WALK_FROM,
    Cell,
    strategy_options,
)
from benchmarks.study.report import FIGURES, PAGE, fill, report, tables, time_to, with_next
from benchmarks.study.results import TUNING, TUNING_SEED, Results, Untuned
from benchmarks.study.scheduling import Job, Queue
from benchmarks.study.text import DOMAINS, load
from lightning_async_localsgd import AsyncLocalSGDStrategy, SimulatedAsyncLocalSGDStrategy

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of the real text, with made-up words."""
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioklmnrst", k=draw.randint(2, 6))) for _ in range(60)]

    def documents(count: int) -> str:
        texts = (" ".join(draw.choices(words, k=300)) for _ in range(count))
        return "".join(json.dumps({"text": text}) + "\n" for text in texts)

    names = {f"c4_en/{split}.jsonl.gz": 20 for split in ("train", "valid")}
    names |= {f"domains/{domain}.jsonl.gz": 20 for domain in DOMAINS}
    names |= {f"wikitext2/{split}.txt.gz": 20 for split in ("train", "valid")}
    for name, count in names.items():
        (folder / name).parent.mkdir(exist_ok=True)
        with gzip.open(folder / name, "wt") as file:
            file.write(documents(count))
    return folder


def record(cell: Cell, seed: int, loss: float, seconds: float = 100.0) -> dict[str, Any]:
    """A made-up line."""
    done = cell.steps * cell.workers
    return {
        "table": "made_up",
        "cell": cell.as_dict(),
        "seed": seed,
        "final_loss": loss,
        "seconds": seconds,
        "curve": [[0, 0.0, 5.0], [done, seconds, loss]],
        "staleness": {"mean": 1.5, "max": 4, "histogram": {"0": 1, "3": 1}},
        "waiting_share": 0.25,
        "cosine": [[0, 0.1], [100, 0.2]],
        "timeline": [[0, 0.0, 10.0], [1, 2.0, 12.0]],
        "wall_seconds": 1.0,
    }


def made_up_loss(cell: Cell) -> float:
    """The best values are the second of the inner grid and the fourth of the outer."""
    outer = 0 if cell.lr is None else abs(OUTER_GRID.index(cell.lr) - 3)
    return 4.0 + abs(INNER_GRID.index(cell.inner_lr or 0.0) - 1) + 0.1 * outer


def tuned(results: Results, *of: Cell, loss: Callable[[Cell], float] = made_up_loss) -> list[Cell]:
    """Makes up the runs that tune, which it returns, in the order in which they are asked for."""
    inner = cells.inner_tuning()
    for cell in [*inner, *(replace(cell, warm_steps=0) for cell in inner)]:
        resolved = results.resolved(cell)
        results.append(TUNING, record(resolved, TUNING_SEED, made_up_loss(resolved)))
    asked: list[Cell] = []
    for cell in of:
        while True:
            try:
                results.resolved(cell)
                break
            except Untuned as untuned:
                for missing in map(results.resolved, untuned.missing):
                    asked.append(missing)
                    results.append(TUNING, record(missing, TUNING_SEED, loss(missing)))
    return asked


def test_text_is_divided_and_kept(data: Path, tmp_path: Path) -> None:
    corpus = load("domains", data, tmp_path, vocabulary=300, length=16)
    assert len(corpus.train) == len(corpus.validation) == len(DOMAINS)
    assert corpus.train[0].shape[1] == 17
    assert len(corpus.mixture) == sum(map(len, corpus.train))
    assert len(corpus.validation_windows(8)) == 8
    (kept,) = tmp_path.glob("domains-300-*.pt")
    stamp = kept.stat().st_mtime_ns
    again = load("domains", data, tmp_path, vocabulary=300, length=16)
    assert again.train[3].equal(corpus.train[3])
    assert kept.stat().st_mtime_ns == stamp
    with pytest.raises(FileNotFoundError, match="--data"):
        load("c4", tmp_path, tmp_path, vocabulary=300, length=16)
    with pytest.raises(ValueError, match="fewer than a window"):
        load("wikitext2", data, tmp_path, vocabulary=300, length=10**6)


def test_synchronous_cells_are_run_once_for_all_levels() -> None:
    assert len({cell.canonical() for cell in (replace(SYNC, level=level) for level in LEVELS)}) == 1
    assert len({replace(BEST, level=level).canonical() for level in LEVELS}) == len(LEVELS)
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
def test_the_outer_rate_is_found_by_a_walk_over_the_grid(tmp_path: Path, best: float, tried: list[float]) -> None:
    results = Results(tmp_path)

    def loss(cell: Cell) -> float:
        assert cell.lr is not None
        return abs(math.log(cell.lr / best))

    asked = tuned(results, Cell("nesterov"), loss=loss)
    assert [cell.lr for cell in asked] == tried
    assert {cell.steps for cell in asked} == {Cell("nesterov").steps}, "as long as any other run"
    assert results.resolved(Cell("nesterov")).lr == best
    # The run with the best rate is the table's own.
    assert results.find(Cell("nesterov"), TUNING_SEED) is not None
    # Eight workers have rates of their own, which more of them use.
    with pytest.raises(Untuned):
        results.resolved(Cell("nesterov", workers=8))
    asked = tuned(results, Cell("nesterov", workers=8), loss=loss)
    assert [(cell.lr, cell.workers) for cell in asked] == [(lr, 8) for lr in tried]
    assert results.resolved(Cell("nesterov", workers=16)).lr == best
    # But for MLA, where sixteen have theirs, too.
    assert [cells.tuned_workers(replace(cells.MLA, workers=count)) for count in (4, 8, 16)] == [4, 8, 16]
    # What diverges is worse than anything.
    asked = tuned(results, Cell("sgd"), loss=lambda cell: math.nan if cell.lr != 0.07 else 4.0)
    assert [cell.lr for cell in asked] == [0.07, 0.2, 0.02]
    assert results.resolved(Cell("sgd")).lr == 0.07


def test_what_a_stage_has_of_its_own_is_tuned_with_the_rate_that_was_found(tmp_path: Path) -> None:
    results = Results(tmp_path)

    def loss(cell: Cell) -> float:
        assert cell.stage is not None
        return made_up_loss(cell) + abs(cell.stage - 30.0) / 100.0

    asked = tuned(results, Cell("delay"), loss=loss)
    assert [(cell.lr, cell.stage) for cell in asked] == [
        *((lr, 1.0) for lr in (0.07, 0.2, 0.7)),
        *((0.2, stage) for stage in cells.STAGE_GRID["delay"][1:]),
    ]
    assert (results.resolved(Cell("delay")).lr, results.resolved(Cell("delay")).stage) == (0.2, 30.0)
    assert cells.staleness(results.resolved(Cell("delay"))) is not None


def test_a_worker_waits_until_its_next_round() -> None:
    spans = [[0, 0.0, 5.0], [1, 0.0, 8.0], [0, 8.0, 13.0], [1, 8.0, 16.0]]
    assert with_next(spans) == [(1, 0.0, 8.0, 8.0), (0, 0.0, 5.0, 8.0), (1, 8.0, 16.0, None), (0, 8.0, 13.0, None)]


def test_what_has_to_be_tuned_comes_first(tmp_path: Path) -> None:
    results = Results(tmp_path)
    queue = Queue([Job("table_a", BEST, 1), Job("table_a", Cell("single"), 0)], results)

    def take(count: int) -> list[Job]:
        jobs = [job for _ in range(count) if (job := queue.next()) is not None]
        assert len(jobs) == count
        return jobs

    def finish(jobs: list[Job]) -> None:
        for job in jobs:
            results.append(job.table, record(job.cell, job.seed, made_up_loss(job.cell)))

    inner = take(len(INNER_GRID) * len(OUTER_WITH_INNER))
    assert {(job.table, job.cell.method) for job in inner} == {(TUNING, "sync")}
    assert {job.cell.inner_lr for job in inner} == set(INNER_GRID)
    # The first job cannot go on before those have ended: meanwhile it is the second one's turn.
    single = take(len(INNER_GRID))
    assert {(job.table, job.cell.method, job.cell.lr) for job in single} == {(TUNING, "single", None)}
    assert queue.next() is None
    finish(inner)
    walk = take(2)
    assert [(job.cell.method, job.cell.dynamic, job.cell.lr) for job in walk] == [
        ("dn", True, lr) for lr in (WALK_FROM["warm"], OUTER_GRID[3])
    ]
    assert {job.cell.inner_lr for job in walk} == {INNER_GRID[1]}
    finish([*walk, *single])
    # Where the walk goes on is known now.
    further = take(2)
    assert [(job.table, job.cell.method, job.cell.lr) for job in further] == [
        (TUNING, "dn", OUTER_GRID[4]),
        ("table_a", "single", None),
    ]
    finish(further)
    assert [(job.table, job.cell.method, job.cell.lr, job.seed) for job in take(1)] == [
        ("table_a", "dn", OUTER_GRID[3], 1)
    ]
    assert queue.next() is None


def test_the_whole_study_begins_with_what_matters_most() -> None:
    jobs = jobs_of("all", list(LEVELS), list(SEEDS))
    first = jobs[: len(SEEDS) * (len(cells.TABLE_A) + len(cells.CONTROLS))]
    assert {job.table for job in first} == {"table_a"}
    assert {job.cell.level for job in first} == {"very"}
    assert {job.table for job in jobs} == {*TABLES, TUNING}
    # The others get their second seeds when all have their first.
    others = [job.seed for job in jobs if job.table not in ("table_a", "table_f", TUNING)]
    assert others == sorted(others)
    assert {job.cell for job in jobs} == {cell for table in [*TABLES.values(), cells.CHECKED] for cell in table}
    assert {job.cell.method for job in jobs_of(TUNING, list(LEVELS), [0])} == {cell.method for cell in TUNED}


def test_results_survive_and_say_what_they_lack(tmp_path: Path) -> None:
    results = Results(tmp_path)
    with pytest.raises(Untuned, match=f"{len(INNER_GRID) * len(OUTER_WITH_INNER)} runs that tune sync DiLoCo"):
        results.resolved(BEST)
    tuned(results, BEST)
    resolved = results.resolved(BEST)
    assert (resolved.inner_lr, resolved.lr) == (INNER_GRID[1], OUTER_GRID[3])
    results.append("table_a", record(resolved, 1, 4.25))
    again = Results(tmp_path)
    found = again.find(BEST, 1)
    assert found is not None
    assert found["final_loss"] == 4.25
    assert again.find(BEST, 2) is None
    with (tmp_path / "table_a.jsonl").open("a") as file:
        file.write('{"cell": {"method": "dn", "colour": 1}, "seed": 0}\n')
    with pytest.raises(ValueError, match=r"table_a.jsonl:2 is no line of a run.*colour"):
        Results(tmp_path)


def test_time_to_a_loss_lies_between_two_points() -> None:
    curve = [[0, 0.0, 5.0], [100, 10.0, 4.0], [200, 20.0, 3.0]]
    assert time_to(curve, 3.5) == pytest.approx(15.0)
    assert time_to(curve, 5.0) == 0.0
    assert time_to(curve, 2.9) is None
    # What is not kept does not count.
    assert time_to([[0, 0.0, 3.0], *curve], 3.5) == pytest.approx(15.0)


def test_the_page_is_made_of_the_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures are drawn with the extra `docs`")
    results = Results(tmp_path / "results")
    tuned(results, *TUNED)
    (tmp_path / "results" / f"{TUNING}.jsonl").rename(tmp_path / "results" / "earlier.jsonl")
    for seed in SEEDS:
        for cell in {results.resolved(cell) for table in TABLES.values() for cell in table if cell.size == "0.5m"}:
            loss = 4.0 if cell.method == "sync" else 4.0 + 0.01 * seed
            results.append("made_up", record(cell, seed, loss, 300.0 if cell.method == "sync" else 90.0))
    page = tmp_path / "study.md"
    shutil.copy(PAGE, page)
    report(Results(tmp_path / "results"), page, tmp_path / "images")
    text = page.read_text()
    very = text.split("table_a_very:begin")[1].split("table_a_very:end")[0]
    mean, deviation = 1.01005, 0.0101
    row = f"| DN + DyLU + grace | 0.2 | {math.exp(4.0) * mean:.2f} ± {math.exp(4.0) * deviation:.2f} |"
    assert f"{row} +0.55 ± 0.55 | 3 | 90 s |" in very
    assert "90 s (1 of 3) | 1.5 / 4 | 25% |" in very
    none = text.split("table_a_none:begin")[1].split("table_a_none:end")[0]
    assert f"| sync DiLoCo | 0.2 | 54.60 ± 0.00 |  | 3 | {300 * 0.995 / 3.33:.0f} s |" in none
    # Sizes that have not been run are dashes.
    assert "| sync DiLoCo | 1.5 M | 0.2 | - | - |" in text
    assert {path.name for path in (tmp_path / "images").iterdir()} == set(FIGURES)
    assert all(f"](images/{name})" in text for name in FIGURES)
    # Again, with the same results: the same page.
    report(Results(tmp_path / "results"), page, tmp_path / "images")
    assert page.read_text() == text


def test_the_page_has_every_table() -> None:
    text = PAGE.read_text()
    for name in tables(Results(PAGE.parent / "results")):
        assert fill(text, name, "new").count("new\n\n<!--") == 1
    with pytest.raises(ValueError, match="table_x"):
        fill(text, "table_x", "new")


def test_small_runs_keep_away_from_the_results(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["table_a", "--small"])
    assert "--results" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["table_a", "--data", str(tmp_path / "nothing")])
    assert "is no folder" in capsys.readouterr().err


def test_every_cell_is_a_strategy_of_its_own() -> None:
    wanted = {cell for table in TABLES.values() for cell in table if cell.method != "single"}
    for cell in wanted:
        options = strategy_options(replace(cell, lr=0.2, stage=1.0 if cell.method == "delay" else 0.0))
        SimulatedAsyncLocalSGDStrategy(cell.seconds_per_step, **options)
        AsyncLocalSGDStrategy(**options)
    at_very = [cell for cell in [*cells.TABLE_A, *cells.CONTROLS, *cells.RULES] if cell.method != "single"]
    told = {repr(strategy_options(replace(cell, lr=0.2, stage=0.5))) for cell in at_very}
    assert len(told) == len(set(at_very))


@pytest.mark.slow
def test_a_table_from_nothing_and_continued(data: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"

    def study() -> str:
        command = [sys.executable, "-m", "benchmarks.study", "table_h", "--small", "--seeds", "0"]
        command += ["--data", str(data), "--cache", str(tmp_path / "cache"), "--results", str(results)]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stderr

    study()
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
    # Nothing is left to do.
    assert study() == ""
    # One line is lost: it is run again, with the same outcome.
    (results / "table_h.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    study()
    again = json.loads((results / "table_h.jsonl").read_text().splitlines()[-1])
    assert again["curve"] == runs[-1]["curve"]
