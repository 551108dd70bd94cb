"""Table I of the study: fewer bits and overlap over links of several speeds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study import cells, fewer_bits
from benchmarks.study.__main__ import plan_runs
from benchmarks.study.bandwidth import link_of, packed_share
from benchmarks.study.cells import LEVELS, SEEDS, Cell
from benchmarks.study.equal_time import steps_in
from benchmarks.study.fewer_bits import BLOCKING, INT4, INT8, OVERLAP, OVERLAP_INT8, TABLE_I, over_link, reference
from benchmarks.study.fewer_bits_report import render
from benchmarks.study.results import Results
from benchmarks.study.running import RunContext
from benchmarks.study.scheduling import PlannedRun, Queue, run_queue
from tests.examples.study_data import write_texts


def record(cell: Cell, seed: int, loss: float) -> dict[str, Any]:
    """Return an invented result."""
    return {
        "cell": cell.as_dict(),
        "seed": seed,
        "final_loss": loss,
        "seconds": 1000.0,
        "pushes": 100,
        "bytes": 2_000_000,
        "exchange_share": 0.08,
        "waiting_share": 0.02,
        "steps_by_worker": [500, 300, 150, 50],
    }


def test_runs_that_decide_the_bars_come_first_with_all_seeds() -> None:
    runs = plan_runs("table_i", list(LEVELS), list(SEEDS), Results())
    assert len(runs) == len(TABLE_I) * len(SEEDS) == len(set(runs))
    first = runs[: 3 * len(fewer_bits.FREE)]
    assert {(run.cell, run.seed) for run in first} == {(cell, seed) for cell in fewer_bits.FREE for seed in SEEDS}
    following = {run.cell for run in runs[len(first) : len(first) + 9]}
    assert following == {over_link(BLOCKING, 0.1), over_link(OVERLAP, 0.1), fewer_bits.WITHOUT_GRACE}


def test_every_cell_is_compared_with_one_of_the_table() -> None:
    assert {reference(cell) for cell in TABLE_I} <= set(TABLE_I)
    assert reference(fewer_bits.WITHOUT_GRACE) == reference(over_link(OVERLAP_INT8, 0.1)) == over_link(BLOCKING, 0.1)


def test_links_carry_the_bytes_of_the_encodings() -> None:
    cell = over_link(BLOCKING, 0.1)
    parameters = 10_000
    link = link_of(cell, parameters)
    assert link.seconds(8 * parameters) == pytest.approx(0.5 * 0.1 * cells.ROUND_SECONDS), "with second moments"
    assert link_of(replace(cell, moments=False), parameters).bytes_per_second == link.bytes_per_second / 2
    assert link_of(BLOCKING, parameters).seconds(10**9) == 0.0
    assert packed_share(cell) == 1.0
    assert packed_share(INT8) == pytest.approx((260 / 1024 + 0.5) / 2, rel=1e-6), "second moments travel as bf16"
    assert packed_share(replace(INT8, moments=False)) == pytest.approx(260 / 1024)
    assert packed_share(replace(INT4, moments=False)) == pytest.approx((132 + 260) / 2048)


def test_faster_exchanges_take_more_steps_in_the_same_time() -> None:
    slow, hidden, fewer = (
        steps_in(fewer_bits.at_equal_time(over_link(cell, 0.5))) for cell in (BLOCKING, OVERLAP, INT8)
    )
    assert slow < 0.75 * hidden
    assert slow < fewer < hidden


def test_table_compares_runs_of_a_seed_over_the_same_link(tmp_path: Path) -> None:
    results = Results(tmp_path)
    base, overlap = over_link(BLOCKING, 0.1), over_link(OVERLAP, 0.1)
    for seed, difference in ((0, 0.01), (1, 0.03)):
        results.append("table_i", record(base, seed, 4.0 + seed))
        results.append("table_i", record(overlap, seed, 4.0 + seed + difference))
    results.append("table_i", record(OVERLAP, 0, 3.0))
    tables = render(Results(tmp_path))
    mean = 50.0 * (math.expm1(0.01) + math.expm1(0.03))
    row = next(line for line in tables["table_i_updates"].splitlines() if "| 10% | fp32, overlap |" in line)
    assert f"| +{mean:.2f} ± 1.44 % | 2 | 0.02 | 1,000 s | 10% |" in row
    assert "| checkpoint | 20 | free | bf16 | - |" in tables["table_i_updates"]
    assert "| random weights | auto | 10% | int4, models int8 | - |" in tables["table_i_time"]
    assert tables["table_i_updates"].count("\n") + tables["table_i_time"].count("\n") == len(TABLE_I) + 2


@pytest.mark.slow
def test_cell_with_all_options_runs(tmp_path: Path) -> None:
    write_texts(tmp_path / "data")
    results = Results(tmp_path / "results")
    (cell,) = cells.shrink([over_link(OVERLAP_INT8, 0.1)])
    context = RunContext(tmp_path / "data", tmp_path / "cache")
    assert run_queue(Queue([PlannedRun("table_i", cell, 0)], results), results, context, 1) == []
    run = results.find(cell, 0)
    assert run is not None
    assert math.isfinite(run["final_loss"])
    assert 0.0 <= run["exchange_share"] < 1.0
    assert run["bytes"] > 0
