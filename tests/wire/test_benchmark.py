"""The output of the exchange benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "exchange.py"


@pytest.mark.slow
def test_exchange_benchmark_prints_table_and_json_lines() -> None:
    command = [sys.executable, str(SCRIPT), "--sizes", "1e4", "--repeats", "2", "--stall-seconds", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    ratios = {row["name"]: row for row in rows if row["kind"] == "ratio"}
    assert {name: row["bar"] for name, row in ratios.items() if row["bar"] is not None} == {
        "whole exchange / memory passes": 3.0,
        "tcp / plain socket": 1.3,
        "tcp with CURVE / plain socket": 4.0,
        "peak memory of the server / model": 5.0,
        "four at once / four one by one": 1.5,
        "beside / without a stalled upload": 1.2,
    }
    assert all(row["parameters"] == 10_000 and row["low"] <= row["high"] for row in rows)
    assert all(row["passed"] is None for row in ratios.values()), "the bars apply to 100 M parameters"
    assert all(name in done.stdout for name in ratios)
