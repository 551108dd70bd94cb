"""benchmarks/plot_heterogeneous.py draws what benchmarks/heterogeneous.py prints."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the figure is drawn with the extra `docs`")

from heterogeneous import Measurement, compare, measure, table
from plot_heterogeneous import draw, main, read


def _run(run: str, seconds_per_step: list[float], counts: list[int], losses: list[float]) -> Measurement:
    """Return the measurement of an invented run whose ranks never pause."""
    records: list[dict[str, Any]] = []
    for seconds, count in zip(seconds_per_step, counts, strict=True):
        steps = [seconds * (step + 1) for step in range(count)]
        records.append({"start": 0.0, "end": steps[-1], "steps": steps, "validations": [], "cpu_seconds": 1.0})
    end = max(record["end"] for record in records)
    moments = [end * (index + 1) / len(losses) for index in range(len(losses))]
    records[0]["validations"] = [
        [moment, moment + 0.1, loss] for moment, loss in zip(moments[:-1], losses[:-1], strict=True)
    ]
    records[0]["final_loss"] = losses[-1]
    return measure(run, records, seconds_per_step, None)


@pytest.fixture
def printed() -> str:
    runs = [
        _run("async", [0.1, 0.4], [1280, 320], [4.4, 3.8, 3.5, 3.4]),
        _run("ddp", [0.4, 0.4], [800, 800], [4.5, 4.0, 3.7, 3.6]),
        _run("single", [0.1], [1600], [4.2, 3.6, 3.4, 3.3]),
    ]
    comparison = compare(runs)
    lines = [*(json.dumps(asdict(run)) for run in runs), json.dumps(comparison), table(runs, comparison)]
    return "\n".join(lines) + "\n"


def test_figure_shows_losses_and_steps(printed: str) -> None:
    measurements = read(printed.splitlines())
    assert list(measurements) == ["async", "ddp", "single"]
    losses, steps = draw(measurements).axes
    curves = {line.get_label().split(":")[0]: line for line in losses.lines}
    assert list(curves["async_localsgd"].get_ydata()) == [4.4, 3.8, 3.5, 3.4]
    assert list(curves["async_localsgd"].get_xdata())[-1] == pytest.approx(128.0)
    assert list(curves["fastest device alone"].get_ydata())[-1] == 3.3
    # A run with a single rank is not in the plot of the steps.
    assert [bar.get_height() for bars in steps.containers for bar in bars] == [1280, 320, 800, 800]
    assert steps.get_legend().get_texts()[0].get_text() == "async_localsgd: 100%"


def test_figure_of_a_single_rank_has_no_steps(printed: str) -> None:
    only = {run: seeds for run, seeds in read(printed.splitlines()).items() if run == "single"}
    assert len(draw(only).axes) == 1


def test_last_measurement_of_a_repeated_run_counts(printed: str) -> None:
    again = json.dumps({**json.loads(printed.splitlines()[0]), "final_loss": 1.5})
    assert [values["final_loss"] for values in read([*printed.splitlines(), again])["async"]] == [1.5]


def test_every_seed_has_a_line_and_the_legend_their_mean(printed: str) -> None:
    other = json.dumps({**json.loads(printed.splitlines()[0]), "seed": 1, "final_loss": 3.0})
    losses = draw(read([*printed.splitlines(), other])).axes[0]
    assert len(losses.lines) == 4
    assert losses.get_legend().get_texts()[0].get_text() == "async_localsgd: 3.20"


def test_image_is_written(printed: str, tmp_path: Path) -> None:
    (tmp_path / "measurements.txt").write_text(printed)
    output = tmp_path / "images" / "run.png"
    main([str(tmp_path / "measurements.txt"), "--output", str(output)])
    data = output.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1800, 740)


def test_file_without_measurement_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("nothing\n[1]\n")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "empty.txt"), "--output", str(tmp_path / "run.png")])
    assert "no JSON line of a run" in capsys.readouterr().err
    assert not (tmp_path / "run.png").exists()
