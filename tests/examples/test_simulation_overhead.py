"""benchmarks/simulation_overhead.py computes its result correctly, and both of its runs train."""

from __future__ import annotations

import json

import pytest
import simulation_overhead
from simulation_overhead import KINDS, main, measure, report, table


def repetitions(*ratios: float) -> list[dict[str, float]]:
    return [dict(zip(KINDS, (10.0 * n, 10.0 * n * ratio), strict=True)) for n, ratio in enumerate(ratios, start=1)]


def test_overhead_is_the_median_ratio() -> None:
    result = report(repetitions(1.02, 1.40, 1.10), steps=400)
    assert (result["overhead"], result["lowest"], result["highest"]) == (0.1, 0.02, 0.4)
    assert result["passed"] is True
    assert result["ms_per_step"]["single device"] == 50.0
    last = table(result).splitlines()[-1]
    assert last == "overhead 10.0% (2.0% to 40.0% in 3 repetitions), limit 15%: passed"


def test_overhead_above_the_limit_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    measured_kinds = []

    def fake_measure(kind: str, steps: int) -> float:
        measured_kinds.append(kind)
        return 12.0 if kind == "simulated cluster" else 10.0

    monkeypatch.setattr(simulation_overhead, "measure", fake_measure)
    monkeypatch.setattr("sys.argv", ["simulation_overhead.py", "--turns", "2", "--steps", "8"])
    assert main() == 1
    # Each run goes first in every other repetition.
    assert measured_kinds == [*KINDS, *KINDS[::-1]]
    line, *_, verdict = capsys.readouterr().out.splitlines()
    assert json.loads(line)["overhead"] == 0.2
    assert verdict.endswith("FAILED")


@pytest.mark.parametrize(("option", "value"), [("--steps", "6"), ("--steps", "0"), ("--turns", "0")])
def test_invalid_option_is_refused_with_its_name(
    option: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["simulation_overhead.py", option, value])
    with pytest.raises(SystemExit):
        main()
    assert f"{option} {value}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_run_trains_and_reports_its_time(kind: str) -> None:
    assert measure(kind, steps=8) > 0.0
