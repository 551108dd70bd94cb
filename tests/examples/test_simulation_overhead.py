"""benchmarks/simulation_overhead.py: how it works out its figures, and that both of its runs run."""

from __future__ import annotations

import json

import pytest
import simulation_overhead
from simulation_overhead import KINDS, main, measure, report, table


def turns(*ratios: float) -> list[dict[str, float]]:
    return [dict(zip(KINDS, (10.0 * at, 10.0 * at * ratio), strict=True)) for at, ratio in enumerate(ratios, start=1)]


def test_the_overhead_is_the_median_of_the_turns_ratios() -> None:
    found = report(turns(1.02, 1.40, 1.10), steps=400)
    assert (found["overhead"], found["lowest"], found["highest"]) == (0.1, 0.02, 0.4)
    assert found["passed"] is True
    assert found["ms_per_step"]["single device"] == 50.0
    last = table(found).splitlines()[-1]
    assert last == "overhead 10.0% (2.0% to 40.0% in 3 turns), bar 15%: passed"


def test_more_than_the_bar_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def measured(kind: str, steps: int) -> float:
        asked.append(kind)
        return 12.0 if kind == "simulated cluster" else 10.0

    monkeypatch.setattr(simulation_overhead, "measure", measured)
    monkeypatch.setattr("sys.argv", ["simulation_overhead.py", "--turns", "2", "--steps", "8"])
    assert main() == 1
    # Each of them goes first in every other turn.
    assert asked == [*KINDS, *KINDS[::-1]]
    line, *_, verdict = capsys.readouterr().out.splitlines()
    assert json.loads(line)["overhead"] == 0.2
    assert verdict.endswith("FAILED")


@pytest.mark.parametrize(("option", "value"), [("--steps", "6"), ("--steps", "0"), ("--turns", "0")])
def test_options_out_of_range_are_named(
    option: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["simulation_overhead.py", option, value])
    with pytest.raises(SystemExit):
        main()
    assert f"{option} {value}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_and_says_how_long_it_took(kind: str) -> None:
    assert measure(kind, steps=8) > 0.0
