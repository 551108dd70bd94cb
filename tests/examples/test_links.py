"""benchmarks/links.py: its figures, its bars, and a run over a link."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import links
from benchmarks.links import MODES, blocked_share, bytes_a_round, latest, missed_bars, speed_of, table
from tests.wire.fakes import wait_for

PROJECT = Path(__file__).resolve().parents[2]


def children_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the processes that a process has started, and those that these have started."""
    return psutil.Process(process.pid).children(recursive=True)


def is_job(process: psutil.Process) -> bool:
    """Return whether a process is one of the benchmark's job. Imports may start others for a moment."""
    with contextlib.suppress(psutil.Error):
        return "links_job.py" in " ".join(process.cmdline())
    return False


def measured(**changes: Any) -> dict[str, Any]:
    """Return an invented measurement."""
    return {
        "mode": "int8-overlap",
        "parameters": 20_000_000,
        "ranks": 2,
        "seconds_per_step": 0.25,
        "local_steps": 50,
        "delay": 0.05,
        "megabits": 100.0,
        "rounds": 3,
        "bytes": 40_625_000,
        "exchange_seconds": 3.35,
        "blocked": 0.005,
        "speed": 0.98,
        "predicted_speed": 1.0,
        **changes,
    }


def test_bytes_of_each_way_of_exchanging() -> None:
    numel = 1024 * 256
    assert bytes_a_round(numel, MODES["fp32"]) == (4 * numel, 4 * numel)
    assert bytes_a_round(numel, MODES["bf16-overlap"]) == (2 * numel, 2 * numel)
    assert bytes_a_round(numel, MODES["int8"]) == (1024 * 260, 1024 * 260)
    assert bytes_a_round(numel, MODES["int4"]) == (1024 * 132, 1024 * 260)


def test_speed_leaves_out_the_first_and_the_unfinished_round() -> None:
    def push(worker: int, seconds: float, steps: int, refused: str | None = None) -> dict[str, Any]:
        return {"worker": worker, "seconds": seconds, "steps": steps, "refused": refused}

    pushes = [push(0, 1.0, 10), push(1, 9.0, 10), push(1, 14.0, 10), push(1, 15.0, 5, "old"), push(1, 19.0, 10)]
    assert speed_of([*pushes, push(1, 20.0, 1)], ranks=2, seconds_per_step=0.25) == pytest.approx(0.5)
    other = [push(2, 10.0, 10), push(2, 12.5, 10), push(2, 13.0, 1)]
    assert speed_of([*pushes, push(1, 20.0, 1), *other], ranks=3, seconds_per_step=0.25) == pytest.approx(0.75)


def test_blocked_time_is_counted_between_the_first_and_the_last_model() -> None:
    assert blocked_share([[100.0, 7.0, 10], [110.0, 8.0, 20], [120.0, 9.0, 30]]) == pytest.approx(0.1)


def test_bars() -> None:
    assert missed_bars(measured()) == []
    assert "blocked" in missed_bars(measured(blocked=0.02))[0]
    # An exchange that takes longer than a third of a round cannot be hidden with certainty.
    assert missed_bars(measured(blocked=0.02, exchange_seconds=5.0)) == []
    assert missed_bars(measured(blocked=0.5, mode="fp32", speed=0.5, predicted_speed=0.51)) == []
    assert "predicted" in missed_bars(measured(predicted_speed=1.04))[0]


def test_report_shows_the_last_measurement_of_each_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, page = tmp_path / "links.jsonl", tmp_path / "page.md"
    records = [measured(blocked=0.5), measured(mode="fp32", bytes=160_000_000), measured(blocked=0.004)]
    results.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert [record["mode"] for record in latest(results)] == ["fp32", "int8-overlap"]
    page.write_text("before\n<!-- links:begin -->\n<!-- links:end -->\nafter")
    monkeypatch.setattr(links, "PAGE", page)
    assert links.main(["--report", "--results", str(results)]) == 0
    text = page.read_text()
    assert table(latest(results)) in text
    assert "| 20 M | 2 | 100 Mbit/s, 50 ms | 50 x 250 ms | int8, overlap | 40.6 MB | 3.35 s | 0.4% | 98.0% |" in text


def test_page_has_the_stored_measurements() -> None:
    assert table(latest(links.RESULTS)) in links.PAGE.read_text()


@pytest.mark.slow
def test_ended_benchmark_leaves_no_rank_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.links", "--parameters", "1e4", "--seconds-per-step", "10"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, cwd=PROJECT, env=environment, stderr=subprocess.DEVNULL)
    ranks: list[psutil.Process] = []
    try:
        wait_for(lambda: any(map(is_job, children_of(process))), "the job starts")
        ranks = children_of(process)
        process.terminate()
        assert process.wait(30.0) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert psutil.wait_procs(ranks, 30.0)[1] == []
    assert list(tmp_path.glob("async_localsgd_links_*")) == []


@pytest.mark.slow
def test_benchmark_measures_real_ranks_over_a_link() -> None:
    command = [sys.executable, "-m", "benchmarks.links", "--parameters", "1e5", "--megabits", "10", "--delays", "0.01"]
    command += ["--seconds-per-step", "0.02", "--local-steps", "10", "--rounds", "2", "--modes", "fp32", "int8-overlap"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode in (0, 1), done.stderr
    fp32, packed = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    # The exchange takes 0.66 s and the round 0.2 s. No link can be faster than that.
    assert fp32["blocked"] > 0.7
    assert fp32["speed"] < 1.1 * fp32["predicted_speed"] < 0.3
    assert packed["bytes"] < 0.26 * fp32["bytes"]
    assert packed["blocked"] < fp32["blocked"]
