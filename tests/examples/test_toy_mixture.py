"""examples/toy_mixture: the data, the paper's finding on it, and what the command prints and draws."""

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


def made_up(method: str, seed: int, final_loss: float, outer_lr: float = 0.7) -> Run:
    curve = [(400, 100.0, 1.0), (800, 200.0, final_loss)]
    return Run(method, outer_lr, seed, curve, final_loss, (1.0 + final_loss) / 2, 0.9, 0.05, 200.0, 1.5)


# -------------------------------------------------------------------------------------------------- data


def test_a_class_is_made_of_clusters_of_unit_variance() -> None:
    mixture = Mixture(dimensions=64, classes=2, clusters=3, spread=5.0)
    points, classes = mixture.draw(3000, number=0)
    nearest = torch.cdist(points, mixture.centres).argmin(1)
    assert nearest.bincount(minlength=6).min() > 400
    assert torch.equal(nearest // 3, classes)
    assert (points - mixture.centres[nearest]).std().item() == pytest.approx(1.0, abs=0.01)


def test_the_same_number_gives_the_same_points() -> None:
    first, second = Mixture(seed=1), Mixture(seed=1)
    points, classes = first.draw(8, number=3)
    first.draw(8, number=4)
    again, classes_again = second.draw(8, number=3)
    assert torch.equal(points, again)
    assert torch.equal(classes, classes_again)
    assert not torch.equal(points, second.draw(8, number=4)[0])
    assert not torch.equal(points, Mixture(seed=2).draw(8, number=3)[0])


def test_who_knows_the_centres_does_better_where_they_are_further_apart() -> None:
    losses = []
    for spread in (0.01, 0.1, 0.2):
        mixture = Mixture(spread=spread)
        losses.append(mixture.best_loss(*mixture.draw(2000, number=0)))
    assert losses[0] == pytest.approx(math.log(4), abs=0.1)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.1


def test_no_point_is_both_trained_and_validated_on() -> None:
    data = MixtureData(train_batches=3, batch_size=4, validation_points=4)
    batches = [points for points, _ in data.train_dataloader()]
    [(validation, _)] = list(data.val_dataloader())
    assert len(batches) == 3
    assert torch.cdist(torch.cat(batches), validation).min() > 1.0
    with pytest.raises(IndexError, match="batch 3 of 3"):
        data.train_data[3]


@pytest.mark.parametrize("name", ["train_batches", "batch_size", "validation_points"])
def test_data_without_points_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        MixtureData(**{name: 0})


def test_mixtures_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"spread=0\.0 must be above 0"):
        Mixture(spread=0.0)
    with pytest.raises(ValueError, match="classes=1 must be at least 2"):
        Mixture(classes=1)


# --------------------------------------------------------------------------------------------- the finding


def trained(names: Sequence[str], seed: int, settings: Settings) -> dict[str, Run]:
    """What :func:`compare.train` gives for each method, two at a time."""
    return {run.method: run for run in compare.compare(names, [seed], settings, None, jobs=2)}


@pytest.mark.slow
def test_times_and_ages_are_those_of_the_readme() -> None:
    """They are the same on every machine, and whatever the network."""
    row = next(line for line in README.read_text().splitlines() if "(DyLU) and grace" in line)
    run = compare.train("DN+DyLU+grace", 0.7, 0, Settings(width=1, validations=1))
    assert row.endswith(f"| {run.staleness:.2f} | {run.virtual_seconds:.0f} |")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_asynchronous_training_needs_delayed_nesterov_and_then_loses_nothing() -> None:
    names = ["sync Nesterov", "async Nesterov", "DN+DyLU+grace", "sync SGD", "async SGD"]
    found = trained(names, seed=3, settings=Settings(max_steps=600))
    sync, paper = found["sync Nesterov"], found["DN+DyLU+grace"]
    # With momentum at every push, asynchronous training is behind for each local step that it takes.
    assert found["async Nesterov"].mean_loss > 1.1 * sync.mean_loss
    # Without momentum it is ahead.
    assert found["async SGD"].mean_loss < 0.95 * found["sync SGD"].mean_loss
    # With Delayed Nesterov, speed-aware steps and grace it is as good, in a third of the time.
    assert paper.mean_loss < 1.05 * sync.mean_loss
    assert paper.virtual_seconds < sync.virtual_seconds / 3
    assert sync.virtual_seconds == pytest.approx(600 * max(SECONDS_PER_STEP))


def test_a_run_is_what_its_seed_says() -> None:
    settings = Settings(max_steps=20, local_steps=4, width=8, validations=2)
    first, second, other = (compare.train("DN+DyLU+grace", 0.7, seed, settings) for seed in (0, 0, 1))
    assert first == second
    assert first.curve != other.curve
    assert [steps for steps, _, _ in first.curve] == [40, 80]
    assert first.curve[-1] == (80, first.virtual_seconds, first.final_loss)


# ------------------------------------------------------------------------------------------- the command


def test_the_table_has_means_and_deviations_over_seeds() -> None:
    text = table([made_up("DN", 0, 0.2), made_up("DN", 1, 0.4), made_up("sync SGD", 0, 0.3, outer_lr=1.0)])
    heading, delayed, sync = text.splitlines()
    assert heading.split()[0] == "method"
    assert delayed.split()[:3] == ["DN", "0.7", "2"]
    assert "0.300 +- 0.141" in delayed
    assert "0.300" in sync
    assert "+-" not in sync


def test_every_run_is_printed_and_then_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def runs(*arguments: object) -> list[Run]:
        asked.append(arguments)
        return [made_up("DN", 0, 0.2)]

    monkeypatch.setattr(compare, "compare", runs)
    main(["--methods", "DN", "--seeds", "5", "--outer-lrs", "0.2", "--width", "16", "--max-steps", "40"])
    assert asked == [(["DN"], [5], Settings(max_steps=40, width=16), [0.2], asked[0][-1])]
    line, *rest = capsys.readouterr().out.splitlines()
    assert json.loads(line)["final_loss"] == 0.2
    assert rest[0].startswith("method")


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [("--max-steps", "30", "multiple of 20"), ("--jobs", "0", "at least 1"), ("--width", "-1", "at least 1")],
)
def test_options_out_of_range_are_named(option: str, value: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([option, value])
    error = capsys.readouterr().err
    assert f"{option} {value}" in error
    assert text in error


def test_the_figure_has_a_line_for_each_method_in_both_halves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figure is drawn with the extra `docs`")
    from figure import STYLES, draw

    assert list(STYLES) == list(METHODS)
    figure = draw([made_up("DN", 0, 0.2), made_up("DN", 1, 0.4), made_up("sync SGD", 0, 0.3)])
    by_steps, by_time = figure.axes
    assert [line.get_label() for line in by_steps.lines] == ["DN, lr 0.7", "sync SGD, lr 0.7"]
    assert list(by_steps.lines[0].get_xdata()) == [400, 800]
    assert list(by_time.lines[0].get_xdata()) == [100.0, 200.0]
    assert list(by_time.lines[0].get_ydata()) == pytest.approx([1.0, 0.3])
    figure.savefig(tmp_path / "toy.png")
    assert (tmp_path / "toy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
