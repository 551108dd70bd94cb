"""examples/toy_mixture: the data, the result that it demonstrates, and the output of the command."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import compare
import pytest
import torch
from compare import METHODS, SECONDS_PER_STEP, Run, Settings, main, table
from mixture import Mixture, MixtureData

README = Path(compare.__file__).with_name("README.md")


def make_run(method: str, seed: int, final_loss: float, outer_lr: float = 0.7) -> Run:
    curve = [(400, 100.0, 1.0), (800, 200.0, final_loss)]
    return Run(method, outer_lr, seed, curve, final_loss, (1.0 + final_loss) / 2, 0.9, 0.05, 200.0, 1.5)


# -------------------------------------------------------------------------------------------------- data


def test_classes_consist_of_clusters_with_unit_variance() -> None:
    mixture = Mixture(dimensions=64, classes=2, clusters=3, spread=5.0)
    points, classes = mixture.draw(3000, number=0)
    nearest = torch.cdist(points, mixture.centers).argmin(1)
    assert nearest.bincount(minlength=6).min() > 400
    assert torch.equal(nearest // 3, classes)
    assert (points - mixture.centers[nearest]).std().item() == pytest.approx(1.0, abs=0.01)


def test_points_depend_only_on_seed_and_number() -> None:
    first, second = Mixture(seed=1), Mixture(seed=1)
    points, classes = first.draw(8, number=3)
    first.draw(8, number=4)
    again, classes_again = second.draw(8, number=3)
    assert torch.equal(points, again)
    assert torch.equal(classes, classes_again)
    assert not torch.equal(points, second.draw(8, number=4)[0])
    assert not torch.equal(points, Mixture(seed=2).draw(8, number=3)[0])


def test_best_loss_falls_with_the_distance_of_the_centers() -> None:
    losses = []
    for spread in (0.01, 0.1, 0.2):
        mixture = Mixture(spread=spread)
        losses.append(mixture.best_loss(*mixture.draw(2000, number=0)))
    assert losses[0] == pytest.approx(math.log(4), abs=0.1)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.1


def test_training_and_validation_points_are_disjoint() -> None:
    data = MixtureData(train_batches=3, batch_size=4, validation_points=4)
    batches = [points for points, _ in data.train_dataloader()]
    [(validation, _)] = list(data.val_dataloader())
    assert len(batches) == 3
    assert torch.cdist(torch.cat(batches), validation).min() > 1.0
    with pytest.raises(IndexError, match="batch 3 of 3"):
        data.train_data[3]


@pytest.mark.parametrize("name", ["train_batches", "batch_size", "validation_points"])
def test_data_without_points_is_rejected(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        MixtureData(**{name: 0})


def test_invalid_mixtures_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"spread=0\.0 must be > 0"):
        Mixture(spread=0.0)
    with pytest.raises(ValueError, match="classes=1 must be at least 2"):
        Mixture(classes=1)


# --------------------------------------------------------------------------------------------- the result


def trained(names: Sequence[str], seed: int, settings: Settings) -> dict[str, Run]:
    """Return the run of each method, trained two at a time."""
    return {run.method: run for run in compare.compare(names, [seed], settings, None, jobs=2)}


@pytest.mark.slow
def test_time_and_staleness_match_the_readme() -> None:
    """They do not depend on the machine or on the size of the network."""
    row = next(line for line in README.read_text().splitlines() if "(DyLU) and grace" in line)
    run = compare.train("DN+DyLU+grace", 0.7, 0, Settings(width=1, validations=1))
    assert row.endswith(f"| {run.staleness:.2f} | {run.virtual_seconds:.0f} |")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_asynchronous_training_with_delayed_nesterov_matches_synchronous_training() -> None:
    names = ["sync Nesterov", "async Nesterov", "DN+DyLU+grace", "sync SGD", "async SGD"]
    runs = trained(names, seed=3, settings=Settings(max_steps=600))
    sync, paper = runs["sync Nesterov"], runs["DN+DyLU+grace"]
    # With momentum at every push, asynchronous training learns less per local step.
    assert runs["async Nesterov"].mean_loss > 1.1 * sync.mean_loss
    # Without momentum, asynchronous training learns more per local step.
    assert runs["async SGD"].mean_loss < 0.95 * runs["sync SGD"].mean_loss
    # With Delayed Nesterov, speed-aware steps and grace it is as good as synchronous training, in a third of the time.
    assert paper.mean_loss < 1.05 * sync.mean_loss
    assert paper.virtual_seconds < sync.virtual_seconds / 3
    assert sync.virtual_seconds == pytest.approx(600 * max(SECONDS_PER_STEP))


def test_run_depends_only_on_its_seed() -> None:
    settings = Settings(max_steps=20, local_steps=4, width=8, validations=2)
    first, repeated, different = (compare.train("DN+DyLU+grace", 0.7, seed, settings) for seed in (0, 0, 1))
    assert first == repeated
    assert first.curve != different.curve
    assert [steps for steps, _, _ in first.curve] == [40, 80]
    assert first.curve[-1] == (80, first.virtual_seconds, first.final_loss)


# ------------------------------------------------------------------------------------------- the command


def test_table_shows_means_and_deviations_over_seeds() -> None:
    text = table([make_run("DN", 0, 0.2), make_run("DN", 1, 0.4), make_run("sync SGD", 0, 0.3, outer_lr=1.0)])
    heading, delayed, sync = text.splitlines()
    assert heading.split()[0] == "method"
    assert delayed.split()[:3] == ["DN", "0.7", "2"]
    assert "0.300 +- 0.141" in delayed
    assert "0.300" in sync
    assert "+-" not in sync


def test_runs_are_printed_before_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def runs(*arguments: object) -> list[Run]:
        calls.append(arguments)
        return [make_run("DN", 0, 0.2)]

    monkeypatch.setattr(compare, "compare", runs)
    main(["--methods", "DN", "--seeds", "5", "--outer-lrs", "0.2", "--width", "16", "--max-steps", "40"])
    assert calls == [(["DN"], [5], Settings(max_steps=40, width=16), [0.2], calls[0][-1])]
    line, *rest = capsys.readouterr().out.splitlines()
    assert json.loads(line)["final_loss"] == 0.2
    assert rest[0].startswith("method")


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [("--max-steps", "30", "multiple of 20"), ("--jobs", "0", "at least 1"), ("--width", "-1", "at least 1")],
)
def test_option_out_of_range_is_reported(
    option: str, value: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([option, value])
    error = capsys.readouterr().err
    assert f"{option} {value}" in error
    assert text in error


def test_figure_has_a_line_for_each_method_in_both_panels(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra `docs`")
    from figure import STYLES, draw

    assert list(STYLES) == list(METHODS)
    figure = draw([make_run("DN", 0, 0.2), make_run("DN", 1, 0.4), make_run("sync SGD", 0, 0.3)])
    by_steps, by_time = figure.axes
    assert [line.get_label() for line in by_steps.lines] == ["DN, lr 0.7", "sync SGD, lr 0.7"]
    assert list(by_steps.lines[0].get_xdata()) == [400, 800]
    assert list(by_time.lines[0].get_xdata()) == [100.0, 200.0]
    assert list(by_time.lines[0].get_ydata()) == pytest.approx([1.0, 0.3])
    figure.savefig(tmp_path / "toy.png")
    assert (tmp_path / "toy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
