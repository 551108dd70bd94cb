"""What a simulated run computes and counts, and what it reports."""

from __future__ import annotations

import hashlib
import json
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_async_localsgd import (
    Arrival,
    AsyncLocalSGDCallback,
    Death,
    Link,
    MergeOptions,
    Slowdown,
    StepSeconds,
    TorchOptimizer,
)
from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy as Simulated
from lightning_async_localsgd.outer import Buffer, MomentumRestart
from lightning_async_localsgd.server.event_file import read_pushes
from tests.lightning_models import Regression, ScheduleFree, network, same_weights
from tests.unit.lightning.simulated.support import (
    SPEEDS,
    Model,
    NoSchedule,
    RunRecorder,
    SampleModel,
    StopAt,
    fit,
    loader,
)


def test_same_seed_gives_same_weights() -> None:
    def run(**options: Any) -> Any:
        speeds = [StepSeconds(seconds, jitter=0.2) for seconds in SPEEDS]
        return fit(Simulated(speeds, exchange_seconds=Link(0.02, 1e5), local_steps=6, **options))[0]

    first = run()
    assert same_weights(first, run())
    assert same_weights(first, run(inner_states_on_cpu=True))
    assert not same_weights(first, run(seed=1))


def test_order_of_pushes_depends_only_on_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    speeds = [StepSeconds(seconds, jitter=0.4) for seconds in SPEEDS]
    schedule = [Slowdown(0, 2.0, 3.0, 2.5), Death(1, 1.7, back_at=2.9), Arrival(2.2, StepSeconds(0.15, 0.2), 0.0)]
    strategy = Simulated(
        speeds, Link(0.01, 1e6), schedule, seed=11, local_steps=6, merge=MergeOptions(max_update_norm=None)
    )
    fit(strategy, module=NoSchedule, callbacks=[AsyncLocalSGDCallback(table=False, events=path)])
    lines = read_pushes(path)
    # Sums and quotients of rounded times are the same on all platforms.
    order = [f"{line['worker']} {line['steps']} {line['seconds']:.9f}" for line in lines]
    assert order[:6] == [
        "1 6 0.641293825",
        "0 6 0.740095425",
        "2 2 0.761511217",
        "2 1 1.227062936",
        "0 4 1.323630962",
        "2 1 1.798004310",
    ]
    digest = hashlib.sha256("\n".join(order).encode()).hexdigest()
    assert (len(order), digest) == (28, "731afa98677b98165b2bfec1f1eee36a50702ac2ad5ccbfa5758f2981220a581")


def test_real_time_of_steps_validation_and_saving_does_not_change_the_weights(tmp_path: Path) -> None:
    class Slow(Model):
        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            if index % 7 == 0:
                time.sleep(0.02)
            return super().training_step(batch, index)

    fast, slow = (fit(Simulated(SPEEDS, local_steps=6), module=module)[0] for module in (Model, Slow))
    assert same_weights(fast, slow)
    assert same_weights(fast, fit(Simulated(SPEEDS, local_steps=6), val_check_interval=3)[0]), (
        "validation takes no virtual time"
    )
    # Saving takes no virtual time either.
    options = {"checkpoint_every": 1, "local_steps": 6}
    assert same_weights(fast, fit(Simulated(SPEEDS, **options), default_root_dir=tmp_path)[0])


def test_pushes_with_nan_are_refused_and_the_other_workers_continue() -> None:
    class Broken(Model):
        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss = super().training_step(batch, index)
            return loss * float("nan") if self.trainer.strategy.runtime.worker.number == 1 else loss

    recorder = RunRecorder()
    module, _ = fit(Simulated([0.1, 0.1, 0.2], local_steps=2), module=Broken, callbacks=[recorder])
    assert recorder.totals[1].refused == 5
    assert recorder.totals[1].steps == 0 < recorder.totals[2].steps
    assert all(torch.isfinite(tensor).all() for tensor in module.state_dict().values())


def test_budget_is_shared_and_fast_workers_take_more_steps() -> None:
    recorder = RunRecorder()
    module, trainer = fit(Simulated(SPEEDS, local_steps=6), callbacks=[recorder], val_check_interval=10)
    steps = [recorder.totals[n].steps for n in range(3)]
    assert sum(steps) == 90 == len(module.samples) // 8
    assert trainer.global_step == 30
    assert steps[0] > steps[1] > steps[2] > 0
    # The steps per second of the whole cluster, up to the last round of the slowest worker.
    assert recorder.seconds == pytest.approx(90 / sum(1 / seconds for seconds in SPEEDS), abs=2.0)
    # Validations come at multiples of the interval, at increasing virtual times.
    assert [step for step, _ in module.validated] == [10, 20, 30]
    assert sorted(seconds for _, seconds in module.validated) == [seconds for _, seconds in module.validated]
    # Every worker has followed the schedule to its end, regardless of its speed.
    assert all(rates[-1] < 1e-3 < 0.009 < max(rates) for rates in module.rates.values())


def test_synchronous_run_equals_handwritten_diloco() -> None:
    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Linear(8, 1)

    def inner(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)

    class Plain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return inner(self.parameters())

    shards = [loader(10, seed=n, shuffle=False) for n in range(3)]
    strategy = Simulated(
        [0.1, 0.2, 0.4], worker_data=lambda n: shards[n], local_steps=5, dynamic_local_steps=False, quorum="all"
    )
    module, _ = fit(strategy, module=Plain, data=shards[0], max_steps=20)

    net = network()
    theta = [parameter.detach().clone().requires_grad_() for parameter in net.parameters()]
    outer = torch.optim.SGD(theta, lr=0.7, momentum=0.9, nesterov=True)
    optimizers = [inner(net.parameters()) for _ in shards]
    streams = [[batch for _ in range(2) for batch in shard] for shard in shards]
    for begin in range(0, 20, 5):
        gradients = []
        for optimizer, stream in zip(optimizers, streams, strict=True):
            with torch.no_grad():
                for own, given in zip(net.parameters(), theta, strict=True):
                    own.copy_(given)
            for batch in stream[begin : begin + 5]:
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(net(batch[0]), batch[1]).backward()
                optimizer.step()
            gradients.append([g.detach() - own.detach() for g, own in zip(theta, net.parameters(), strict=True)])
        for tensor, parts in zip(theta, zip(*gradients, strict=True), strict=True):
            tensor.grad = (parts[0] + parts[1] + parts[2]) / 3
        outer.step()
    for own, given in zip(module.net.parameters(), theta, strict=True):
        assert torch.equal(own, given)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}])
def test_single_worker_with_plain_outer_step_trains_like_a_single_device(options: dict[str, Any]) -> None:
    outer = TorchOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    data = loader(60, shuffle=False)
    simulated, _ = fit(Simulated([0.1], local_steps=4, outer_optimizer=outer), module=NoSchedule, data=data, **options)
    plain, _ = fit("auto", module=NoSchedule, data=data, callbacks=[], **options)
    assert simulated.samples == plain.samples
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(simulated.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 7}])
def test_each_epoch_uses_every_sample_once(options: dict[str, Any]) -> None:
    recorder = RunRecorder()
    module, trainer = fit(Simulated(SPEEDS, local_steps=4), max_epochs=2, max_steps=-1, callbacks=[recorder], **options)
    assert sorted(module.samples) == sorted(2 * list(range(480)))
    assert trainer.current_epoch == 2
    windows = 2 * -(-60 // options.get("accumulate_grad_batches", 1))
    assert sum(totals.steps for totals in recorder.totals.values()) == windows


def test_manual_optimization_with_two_optimizers_and_accumulation() -> None:
    class Manual(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            first, second = self.optimizers()
            self.manual_backward(super().training_step(batch, index))
            if len(self.samples) % 16 == 0:
                for optimizer in (first, second):
                    optimizer.step()
                    optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            return [torch.optim.AdamW(self.net[:2].parameters()), torch.optim.SGD(self.net[3:].parameters(), lr=0.1)]

    recorder = RunRecorder()
    module, _ = fit(Simulated([0.5, 0.5], local_steps=4), module=Manual, max_steps=32, callbacks=[recorder])
    # Lightning counts the steps of both optimizers. A local step takes two batches, and therefore twice the time.
    assert sum(totals.steps for totals in recorder.totals.values()) == 32
    assert len(module.samples) == 2 * 8 * 32
    assert recorder.seconds == pytest.approx(16.0)


def test_buffer_that_the_module_replaces_belongs_to_its_worker() -> None:
    class Counting(NoSchedule):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros((), dtype=torch.long))

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            self.count = self.count + 1
            return super().training_step(batch, index)

    recorder = RunRecorder()
    module, _ = fit(Simulated(SPEEDS, local_steps=5), module=Counting, callbacks=[recorder])
    assert int(module.count) == recorder.totals[0].steps < sum(totals.steps for totals in recorder.totals.values())


def test_metrics_and_summary_are_written_and_testing_keeps_the_weights(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    module, trainer = fit(
        Simulated(SPEEDS, local_steps=5), logger=logger, log_every_n_steps=5, default_root_dir=tmp_path
    )
    text = Path(logger.log_dir, "metrics.csv").read_text()
    assert all(name in text for name in ("async/virtual_seconds", "async/staleness/mean", "train_loss"))
    assert "worker_2" not in text
    summary = json.loads(Path(logger.log_dir, "async_localsgd_summary.json").read_text())
    assert summary["virtual"] is True
    assert summary["steps"] == 90
    assert summary["bytes_sent"] > 0 < summary["bytes_received"]
    assert summary["fastest_worker_seconds"] == pytest.approx(summary["steps"] * min(SPEEDS))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert trainer.test(module, loader(4, 9), verbose=False)[0]["val_loss"] > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_validation_interval_holds_if_batches_do_not_divide_by_workers() -> None:
    # Ten batches for three workers are 3.33 batches for each, so epochs do not begin at multiples of four steps.
    module, _ = fit(Simulated([0.1] * 3, local_steps=4), data=loader(10), max_steps=60, val_check_interval=2)
    steps = [step for step, _ in module.validated]
    assert len(steps) == 2 * 18
    assert max(after - before for before, after in pairwise([0, *steps, 60])) <= 3


@pytest.mark.parametrize("speeds", [[1.0, 1.0, 2.0], [1.0, 1.0, 1.0], [3.3, 1.3, 3.3, 1.0]])
@pytest.mark.parametrize("local_steps", [5, 50])
def test_last_validation_uses_the_final_model(speeds: list[float], local_steps: int) -> None:
    data = DataLoader(TensorDataset(torch.randn(21, 8), torch.randn(21, 1), torch.arange(21)), batch_size=1)
    module = SampleModel()
    trainer = L.Trainer(
        strategy=Simulated(speeds, local_steps=local_steps), accelerator="cpu", max_epochs=3, num_sanity_val_steps=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data, DataLoader(data.dataset, batch_size=7))
    assert len(module.samples) == 3 * 21
    assert len(module.validated) == 3
    final = float(trainer.validate(module, DataLoader(data.dataset, batch_size=7), verbose=False)[0]["val_loss"])
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(final)


def test_warning_names_pushes_left_in_the_buffer(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    L.seed_everything(5, verbose=False)
    begun = Model()
    with pytest.warns(UserWarning, match=r"6 of 6 pushes are not in the model.*no push has ever been applied"):
        module, _ = fit(Simulated([0.1] * 2, local_steps=10, outer_optimizer=Buffer(period=7)), logger=logger)
    assert torch.equal(module.net[0].weight, begun.net[0].weight)
    summary = json.loads(Path(logger.log_dir, "async_localsgd_summary.json").read_text())
    assert (summary["version"], summary["unapplied_pushes"]) == (6, 6)

    outer_optimizer = MomentumRestart(Buffer(period=4), every=1)
    with pytest.warns(UserWarning, match=r"2 of 6 pushes are not in the model[^;]*$"):
        fit(Simulated([0.1] * 2, local_steps=10, outer_optimizer=outer_optimizer))


def test_should_stop_ends_the_run_early() -> None:
    recorder = RunRecorder()
    _, trainer = fit(Simulated(SPEEDS, local_steps=6), max_steps=1000, callbacks=[recorder, StopAt()])
    assert 10 <= trainer.global_step < 20
    assert recorder.totals[0].steps > 0


class Taught(NoSchedule):
    """A student whose frozen teacher follows it. The teacher of each worker is recorded before and after a round."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = torch.nn.Linear(8, 16).requires_grad_(False)
        self.backbone = torch.nn.Linear(8, 16).requires_grad_(False)
        self.left: dict[int, torch.Tensor] = {}
        self.jumps: list[float] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        worker = self.trainer.strategy.runtime.worker
        if worker.round_steps > 0 and worker.number in self.left:
            # Within a round, no other worker's steps reach the teacher.
            self.jumps.append(float((self.teacher.weight.detach() - self.left[worker.number]).abs().max()))
        loss = super().training_step(batch, index)
        self.teacher.weight.data.lerp_(self.net[0].weight.data, 0.2)
        self.left[worker.number] = self.teacher.weight.detach().clone()
        return loss


def test_workers_have_teachers_of_their_own_which_they_average(tmp_path: Path) -> None:
    strategy = Simulated(SPEEDS, local_steps=6)
    module, trainer = fit(strategy, module=Taught, enable_checkpointing=True, default_root_dir=tmp_path)
    assert module.jumps
    assert max(module.jumps) == 0.0
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(saved["teacher.weight"], module.teacher.weight)
    # It has followed the student of the run closely, and is not that of the last round alone.
    assert not any(torch.equal(module.teacher.weight, left) for left in module.left.values())
    student = module.net[0].weight.detach()
    distance = float((module.teacher.weight - student).norm() / student.norm())
    assert distance < 0.5, "it began elsewhere"


class Remembering(NoSchedule):
    """Counts its steps in a buffer that grows from the second step on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(0))
        self.banks: dict[int, list[int]] = {}

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        worker = self.trainer.strategy.runtime.worker.number
        self.bank = torch.cat([self.bank, torch.tensor([float(worker)])])
        self.banks[worker] = self.bank.tolist()
        return super().training_step(batch, index)


def test_workers_have_memory_banks_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    module, _ = fit(Simulated(SPEEDS, local_steps=6), module=Remembering)
    assert module.banks.keys() == {0, 1, 2}
    assert all(set(bank) == {worker} for worker, bank in module.banks.items())
    assert sum(map(len, module.banks.values())) == 90
    assert module.bank.tolist() == module.banks[0], "at the end it is that of worker 0"
    assert caplog.text.count("buffer 'bank' float32 [0] is float32 [") == 1


class Shown(Regression):
    """A regression by a schedule-free optimizer. Records whether the global model is validated."""

    def __init__(self) -> None:
        super().__init__(network(), ScheduleFree, lr=0.3)
        self.samples: list[int] = []
        self.validated: list[bool] = []

    def on_train_epoch_start(self) -> None:
        self.optimizers().optimizer.train()

    def on_validation_epoch_start(self) -> None:
        self.optimizers().optimizer.eval()

    def on_validation_end(self) -> None:
        self.optimizers().optimizer.train()

    def validation_step(self, batch: Any, index: int) -> None:
        runtime = getattr(self.trainer.strategy, "runtime", None)
        if runtime is not None:
            theta = torch.empty(runtime.binding.layout.numel)
            runtime.server.copy_model(theta)
            self.validated.append(not runtime.binding.changed_from(theta))

    def on_train_end(self) -> None:
        self.optimizers().optimizer.eval()


def test_schedule_free_optimizer_trains_as_on_one_device_and_resumes(tmp_path: Path) -> None:
    everything = next(iter(DataLoader(loader(60, shuffle=False).dataset, batch_size=480)))

    def loss_of(strategy: Any, steps: int, ckpt_path: Any = None) -> float:
        options = {"max_steps": steps, "val_check_interval": 10, "check_val_every_n_epoch": None}
        module, trainer = fit(strategy, ckpt_path, module=Shown, **options)
        assert all(module.validated)
        assert trainer.strategy.strategy_name != "async_localsgd_simulated" or module.validated
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return float(module.loss(everything))

    simulation = partial(Simulated, [0.1, 0.2], local_steps=6)
    plain, simulated = loss_of("auto", 60), loss_of(simulation(), 60)
    assert simulated < 1.2 * plain
    resumed = loss_of(simulation(), 120, tmp_path / "60.ckpt")
    assert resumed < simulated
