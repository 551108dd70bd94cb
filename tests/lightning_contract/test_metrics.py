"""Metrics of all workers on rank 0, and learning rates that follow a metric, with three ranks of unequal speed."""

from __future__ import annotations

import csv
import math
import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection

from lightning_async_localsgd.lightning.loop.metrics import _ServerMetrics, _WorkerMetrics
from lightning_async_localsgd.lightning.loop.plateau import PlateauSync
from lightning_async_localsgd.protocol.messages import MAX_TEXT
from tests.lightning_contract import metrics_job
from tests.lightning_contract.metrics_job import CONSTANTS, RANKS
from tests.lightning_models import quiet_trainer
from tests.processes import Outcome, jobs


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Run the job."""
    out = tmp_path_factory.mktemp("metrics")
    with jobs() as started:
        text = started.run(metrics_job.__file__, out, timeout=280)
    return Outcome(0, text, out)


@pytest.fixture
def everything(outcome: Outcome) -> list[dict[str, Any]]:
    return [rank["everything"] for rank in outcome.ranks]


def logged_values(ranks: list[dict[str, Any]]) -> list[tuple[float, int]]:
    """Return the values that all ranks logged, with their weights."""
    return [(value, weight) for rank in ranks for value, weight in rank["values"]]


def test_step_metrics_are_means_over_workers(everything: list[dict[str, Any]]) -> None:
    end = everything[0]["ends"][-1]
    for name in ("both_step", "step", "synced", "silent"):
        assert end[name] == pytest.approx(sum(CONSTANTS) / RANKS), name
    assert everything[0]["shown"][1]["both_step"] == pytest.approx(37)
    assert everything[0]["bar"][-1] == pytest.approx(37), "the progress bar shows the mean, too"
    assert "silent" not in everything[0]["shown"][1], "logger=False"
    # With rank_zero_only, only rank 0 logs.
    assert end["rank_zero"] == CONSTANTS[0]


def test_epoch_metrics_are_reduced_over_all_pushed_samples(everything: list[dict[str, Any]]) -> None:
    values = logged_values(everything)
    assert len(values) == 3 * 40
    end = everything[0]["ends"][-1]
    weighted = sum(value * weight for value, weight in values) / sum(weight for _, weight in values)
    assert end["weighted"] == pytest.approx(weighted, rel=1e-5)
    assert end["most"] == max(value for value, _ in values)
    assert end["least"] == -end["most"]
    assert end["count"] == len(values)
    by_rank = [constant * len(rank["values"]) for constant, rank in zip(CONSTANTS, everything, strict=True)]
    assert end["both_epoch"] == end["both"] == pytest.approx(sum(by_rank) / len(values), rel=1e-5)


def test_metrics_logged_only_by_other_ranks_reach_rank_0(everything: list[dict[str, Any]]) -> None:
    end = everything[0]["ends"][-1]
    assert end["foreign_step"] == end["foreign_epoch"] == end["foreign"] == 7.0
    assert end["foreign_count"] == len(everything[1]["values"])
    assert math.isnan(end["undefined"])
    assert everything[0]["shown"][1]["foreign_epoch"] == 7.0


def test_loggers_get_the_metrics_of_the_trainer(outcome: Outcome, everything: list[dict[str, Any]]) -> None:
    columns: dict[str, list[float]] = {}
    with (outcome.out / "metrics" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value:
                    columns.setdefault(name, []).append(float(value))
    end = everything[0]["ends"][-1]
    assert columns["both_step"][-1] == pytest.approx(37)
    for name in ("both_epoch", "weighted", "count", "most", "foreign_epoch", "foreign_count"):
        assert columns[name] == [pytest.approx(end[name])], name
    assert columns["foreign_step"][-1] == 7.0
    assert math.isnan(columns["undefined"][-1])
    assert "silent" not in columns


def test_other_ranks_see_their_own_values(everything: list[dict[str, Any]]) -> None:
    for rank in (1, 2):
        end = everything[rank]["ends"][-1]
        assert end["both_step"] == end["both_epoch"] == CONSTANTS[rank]
        assert end["count"] == len(everything[rank]["values"])


def test_all_ranks_have_the_metrics_of_rank_0_after_training(everything: list[dict[str, Any]]) -> None:
    for rank in everything:
        for shown, first in zip(rank["shown"], everything[0]["shown"], strict=True):
            assert shown == pytest.approx(first, nan_ok=True)
        assert rank["shown"][0]["val_loss"] > 0
        assert rank["shown"][2]["both_epoch"] == rank["shown"][1]["both_epoch"]


def test_callbacks_on_other_ranks_can_read_validation_metrics_of_rank_0(outcome: Outcome) -> None:
    for rank in outcome.ranks:
        seen = rank["plateau"]["monitored"]
        assert seen
        assert seen == sorted(seen)
        assert set(seen) <= {1.0, 2.0, 3.0, 4.0}


def test_operations_that_are_local_in_training_are_warned_about_once(everything: list[dict[str, Any]]) -> None:
    texts = everything[0]["warnings"]
    for said in ("self.all_gather", "sync_dist=True", "dist_sync_on_step=True", "torchmetrics.Metric"):
        assert sum(said in text for text in texts) == 1, said
    assert any(text.startswith("state: ") for text in texts), "the warning names the metric"
    assert any(text.startswith("on_step_only: ") for text in texts)
    assert everything[0]["ends"][-1]["state"] == CONSTANTS[0]


def test_evaluation_before_and_after_fit_uses_real_collectives(everything: list[dict[str, Any]]) -> None:
    for rank in everything:
        for stage in ("before", "after", "tested"):
            assert rank[stage] == everything[0][stage], "all ranks have the same result"
            assert rank[stage]["rank_mean"] == 1.0
            assert rank[stage]["rows"] == 24.0
            assert rank[stage]["samples_mean"] == 11.5


def test_logger_connector_is_restored_after_fit(everything: list[dict[str, Any]]) -> None:
    assert all(rank["class"] == "_LoggerConnector" for rank in everything)


def test_excess_metrics_are_left_out_with_a_warning(outcome: Outcome) -> None:
    crowds = [rank["crowd"]["arrived"] for rank in outcome.ranks]
    # Metrics above zero on rank 0 came from other ranks.
    assert 200 < crowds[0] < 400
    assert f"{400 - crowds[0]} of 400 training metrics of this rank were left out" in outcome.text
    assert outcome.text.count("were left out") == 2, "once on each rank that pushes"


@pytest.mark.parametrize("name", ["plateau", "plateau_manual"])
def test_all_ranks_use_the_learning_rates_of_rank_0(outcome: Outcome, name: str) -> None:
    ranks = [rank[name] for rank in outcome.ranks]
    assert ranks[0]["last"] in [[0.01 / 2**n, 0.02 / 2**n] for n in range(2, 8)]
    for rank in ranks:
        for known in ("last", "best", "shown", "frequency", "class", "state"):
            assert rank[known] == ranks[0][known], known
        # Reduced rates were also used in training, not only set at its end.
        assert {tuple(rates) for rates in rank["rates"]} > {(0.01, 0.02)}
        assert all(rates in [[0.01 / 2**n, 0.02 / 2**n] for n in range(8)] for rates in rank["rates"])
    assert ranks[0]["class"] == "ReduceLROnPlateau"
    assert ranks[0]["frequency"] == 1
    assert "_last_lr" in ranks[0]["state"]
    assert "step" not in ranks[0]["state"]


def test_schedule_over_steps_continues_beside_a_plateau_schedule(outcome: Outcome) -> None:
    ranks = [rank["plateau_besides"] for rank in outcome.ranks]
    rate = 0.01 * 0.99**60
    reductions = round(math.log(ranks[0]["last"][0] / rate, 0.8))
    assert reductions >= 1
    for rank in ranks:
        assert rank["last"] == pytest.approx([rate * 0.8**reductions, 2 * rate * 0.8**reductions])
        # No rank returns to an earlier rate. The same product in another order may differ in its last digit.
        rates = [group[0] for group in rank["rates"]]
        assert rates == pytest.approx(sorted(rates, reverse=True), rel=1e-12)


def test_single_rank_uses_metrics_and_plateau_schedules_of_lightning(tmp_path: Path) -> None:
    class Module(BoringModel):
        def training_step(self, batch: Any, index: int) -> Any:
            self.log("loss", 1.0)
            return super().training_step(batch, index)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.5)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "loss"}}

    trainer = quiet_trainer(max_epochs=3, limit_train_batches=4, limit_val_batches=0, default_root_dir=tmp_path)
    trainer.fit(Module())
    assert trainer.callback_metrics["loss"] == 1.0
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)


def test_plateau_schedule_over_too_many_parameter_groups_is_rejected() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.001 * n} for n in range(1, 302)]
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD(groups))
    config = SimpleNamespace(scheduler=plateau, reduce_on_plateau=True, frequency=1)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(lr_scheduler_configs=[config]))
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau over 301 parameter groups"):
        PlateauSync(trainer, None)


def test_values_are_pushed_once_and_survive_the_end_of_an_epoch() -> None:
    results = _ResultCollection(training=True)
    trainer: Any = SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_results=results)))
    side = _WorkerMetrics(trainer)

    def log(value: float, size: int) -> None:
        results.log("training_step", "a", torch.tensor(value), on_step=True, on_epoch=True, batch_size=size)
        side.record_step()

    assert side.encode() == ""
    log(1.0, 2)
    log(2.0, 4)
    assert side.encode() == '{"training_step.a":["mean","sel",1.5,10.0,6.0]}'
    assert side.encode() == ""
    log(5.0, 1)
    with side.ending_epoch():
        results.reset()
    log(7.0, 1)
    assert side.encode() == '{"training_step.a":["mean","sel",6.0,12.0,2.0]}'
    log(math.inf, 1)
    assert side.encode() == '{"training_step.a":["mean","sel","inf","inf",1.0]}'
    for n in range(3000):
        results.log("training_step", f"name_{n}", torch.tensor(0.1), on_step=True, on_epoch=False)
    assert MAX_TEXT - 100 < len(side.encode()) <= MAX_TEXT


def test_received_values_are_shown_in_their_epoch() -> None:
    results = _ResultCollection(training=True)
    received: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
    snapshot = SimpleNamespace(workers={0: None, 1: None, 2: None})
    runtime: Any = SimpleNamespace(server=SimpleNamespace(received_metrics=received, snapshot=snapshot))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_results=results))
    trainer: Any = SimpleNamespace(fit_loop=loop, training=True)
    side = _ServerMetrics(trainer, runtime)

    def shown(on_step: bool) -> dict[str, float]:
        metrics = side.complete(results.metrics(on_step), on_step)["callback"]
        return {name: value.item() for name, value in metrics.items()}

    received.put((1, '{"training_step.a":["mean","sel",5.0,20.0,2.0]}'))
    assert shown(on_step=False) == {}, "between two epochs, values of the next one are hidden"
    results.log("training_step", "a", torch.tensor(1.0), on_step=True, on_epoch=True, batch_size=2)
    side.record_step()
    assert shown(on_step=True) == {"a": 3.0, "a_step": 3.0}
    assert shown(on_step=False) == {"a": 5.5, "a_epoch": 5.5}
    # A dead worker has no step metrics, but its steps stay in the epoch metrics.
    received.put((2, '{"training_step.a":["mean","sel","nan",6.0,2.0]}'))
    assert math.isnan(shown(on_step=True)["a"])
    del snapshot.workers[2]
    assert shown(on_step=True)["a"] == 3.0
    assert shown(on_step=False)["a"] == pytest.approx(28 / 6)
    received.put((1, '{"training_step.a":["median","s",1.0]}'))
    with pytest.warns(UserWarning, match="Metrics of worker 1 could not be read"):
        shown(on_step=True)
    with side.ending_epoch():
        results.reset()
    results.log("training_step", "a", torch.tensor(4.0), on_step=True, on_epoch=True, batch_size=2)
    side.record_step()
    assert shown(on_step=False)["a"] == 4.0, "no values of the last epoch"
    assert shown(on_step=True)["a"] == 4.5, "the latest values of live workers"
