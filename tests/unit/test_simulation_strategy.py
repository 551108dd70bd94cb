"""The simulated cluster as a strategy: what it computes, what it counts, how long it takes in virtual time."""

from __future__ import annotations

import gc
import hashlib
import json
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import Precision
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_async_localsgd import (
    Arrival,
    AsyncLocalSGDCallback,
    Death,
    Link,
    Slowdown,
    StepSeconds,
    TorchOptimizer,
)
from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy as Simulated
from lightning_async_localsgd.events import read_events
from lightning_async_localsgd.outer import SGD, Buffer, MomentumRestart

SPEEDS = [0.1, 0.13, 0.3]


class Model(L.LightningModule):
    """A regression with BatchNorm; it notes whose batches it saw, at which rate, and what validation saw."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
        )
        self.seen: list[int] = []
        self.rates: dict[int, list[float]] = {}
        self.validated: list[tuple[int, float]] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.seen += batch[2].tolist()
        phase = getattr(self.trainer.strategy, "phase", None)
        if phase is not None:
            self.rates.setdefault(phase.worker.number, []).append(self.trainer.optimizers[0].param_groups[0]["lr"])
        loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        phase = self.trainer.strategy.phase
        if index == 0 and phase is not None:
            theta, own = (torch.empty(phase.binding.layout.numel) for _ in range(2))
            phase.server.copy_model(theta)
            phase.binding.read(own)
            assert torch.equal(theta, own)
            self.validated.append((self.trainer.global_step, phase.virtual_seconds))
        self.log("val_loss", torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        total = int(self.trainer.estimated_stepping_batches)
        # It raises when it is stepped once too often.
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=total + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Fixed(Model):
    """Without a schedule."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Stop(L.Callback):
    """Somebody has seen enough."""

    def __init__(self, at: int = 10) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.at


def loader(batches: int = 60, seed: int = 0, shuffle: bool = True) -> DataLoader[Any]:
    inputs = torch.randn(8 * batches, 8, generator=torch.Generator().manual_seed(seed))
    items = torch.arange(len(inputs))
    return DataLoader(TensorDataset(inputs, inputs[:, :1].sin(), items), batch_size=8, shuffle=shuffle)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of trainers without a folder are no part of the repository."""
    monkeypatch.chdir(tmp_path)


def fit(strategy: Any, ckpt_path: Any = None, data: Any = None, **options: Any) -> tuple[Any, L.Trainer]:
    L.seed_everything(5, verbose=False)
    module = options.pop("module", Model)()
    settings = {"max_steps": 30, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings |= {"enable_checkpointing": False, "accelerator": "cpu", "devices": 1}
    options.setdefault("callbacks", [AsyncLocalSGDCallback(table=False)])
    trainer = L.Trainer(strategy=strategy, **{**settings, **options})
    validation = loader(4, 9) if "val_check_interval" in options else None
    trainer.fit(module, loader() if data is None else data, validation, ckpt_path=ckpt_path)
    return module, trainer


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


def assert_in_order(path: Path) -> None:
    """Nothing in a log of events happens before what stands above it."""
    seconds = [event.seconds for event in read_events(path) if event.seconds is not None]
    assert seconds == sorted(seconds)


class Skipping(Precision):
    """Skips optimizer steps, as a gradient scaler does."""

    def __init__(self, skips: Callable[[Any], bool]) -> None:
        self.skips = skips

    def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **options: Any) -> Any:
        if self.skips(model.trainer.strategy.phase):
            return closure()
        return super().optimizer_step(optimizer, model, closure, **options)


class Watch(AsyncLocalSGDCallback):
    """Keeps what a run came to."""

    def __init__(self, **options: Any) -> None:
        super().__init__(table=False, **options)
        self.totals: dict[int, Any] = {}
        self.seconds = 0.0
        self.version = 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        phase = trainer.strategy.phase
        self.totals, self.seconds, self.version = phase.totals(), phase.seconds, phase.server.view.version


# ----------------------------------------------------------------------------------------------- what it computes


def test_the_same_seed_gives_the_same_bits() -> None:
    def run(**options: Any) -> Any:
        speeds = [StepSeconds(one, jitter=0.2) for one in SPEEDS]
        return fit(Simulated(speeds, exchange_seconds=Link(0.02, 1e5), local_steps=6, **options))[0]

    first = run()
    assert equal(first, run())
    assert equal(first, run(inner_states_on_cpu=True))
    assert not equal(first, run(seed=1))


def test_a_seed_gives_the_same_order_of_events_on_every_machine(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    speeds = [StepSeconds(one, jitter=0.4) for one in SPEEDS]
    schedule = [Slowdown(0, 2.0, 3.0, 2.5), Death(1, 1.7, back_at=2.9), Arrival(2.2, StepSeconds(0.15, 0.2), 0.0)]
    strategy = Simulated(speeds, Link(0.01, 1e6), schedule, seed=11, local_steps=6, max_update_norm=None)
    fit(strategy, module=Fixed, callbacks=[AsyncLocalSGDCallback(table=False, ledger=path)])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    # Sums and quotients of rounded times, which every machine makes alike.
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


def test_real_time_has_no_part_in_it(tmp_path: Path) -> None:
    class Slow(Model):
        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            if index % 7 == 0:
                time.sleep(0.02)
            return super().training_step(batch, index)

    fast, slow = (fit(Simulated(SPEEDS, local_steps=6), module=module)[0] for module in (Model, Slow))
    assert equal(fast, slow)
    assert equal(fast, fit(Simulated(SPEEDS, local_steps=6), val_check_interval=3)[0]), "validations take no time"
    # Nor has saving, however often.
    options = {"checkpoint_every": 1, "local_steps": 6}
    assert equal(fast, fit(Simulated(SPEEDS, **options), default_root_dir=tmp_path)[0])


def test_a_worker_that_has_gone_wrong_is_refused_and_the_others_go_on() -> None:
    class Broken(Model):
        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss = super().training_step(batch, index)
            return loss * float("nan") if self.trainer.strategy.phase.worker.number == 1 else loss

    watch = Watch()
    module, _ = fit(Simulated([0.1, 0.1, 0.2], local_steps=2), module=Broken, callbacks=[watch])
    assert watch.totals[1].refused == 5
    assert watch.totals[1].steps == 0 < watch.totals[2].steps
    assert all(torch.isfinite(tensor).all() for tensor in module.state_dict().values())


def test_a_budget_is_that_of_all_workers_and_fast_ones_do_more_of_it() -> None:
    watch = Watch()
    module, trainer = fit(Simulated(SPEEDS, local_steps=6), callbacks=[watch], val_check_interval=10)
    steps = [watch.totals[n].steps for n in range(3)]
    assert sum(steps) == 90 == len(module.seen) // 8
    assert trainer.global_step == 30
    assert steps[0] > steps[1] > steps[2] > 0
    # The whole rate of the cluster, within the last round of the slowest.
    assert watch.seconds == pytest.approx(90 / sum(1 / one for one in SPEEDS), abs=2.0)
    # Global steps at which validations were due, in virtual time that goes on.
    assert [step for step, _ in module.validated] == [10, 20, 30]
    assert sorted(seconds for _, seconds in module.validated) == [seconds for _, seconds in module.validated]
    # Every worker has followed the schedule to its end, whatever its speed.
    assert all(rates[-1] < 1e-3 < 0.009 < max(rates) for rates in module.rates.values())


def test_synchronous_diloco_is_that_which_is_written_by_hand() -> None:
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
        for one, parts in zip(theta, zip(*gradients, strict=True), strict=True):
            one.grad = (parts[0] + parts[1] + parts[2]) / 3
        outer.step()
    for own, given in zip(module.net.parameters(), theta, strict=True):
        assert torch.equal(own, given)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}])
def test_one_worker_whose_model_is_taken_over_trains_as_a_single_device_does(options: dict[str, Any]) -> None:
    outer = TorchOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    data = loader(60, shuffle=False)
    played, _ = fit(Simulated([0.1], local_steps=4, outer_optimizer=outer), module=Fixed, data=data, **options)
    plain, _ = fit("auto", module=Fixed, data=data, callbacks=[], **options)
    assert played.seen == plain.seen
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(played.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 7}])
def test_an_epoch_is_every_sample_once_whoever_takes_it(options: dict[str, Any]) -> None:
    watch = Watch()
    module, trainer = fit(Simulated(SPEEDS, local_steps=4), max_epochs=2, max_steps=-1, callbacks=[watch], **options)
    assert sorted(module.seen) == sorted(2 * list(range(480)))
    assert trainer.current_epoch == 2
    windows = 2 * -(-60 // options.get("accumulate_grad_batches", 1))
    assert sum(totals.steps for totals in watch.totals.values()) == windows


def test_manual_optimization_with_two_optimizers_and_windows_of_its_own() -> None:
    class Manual(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            first, second = self.optimizers()
            self.manual_backward(super().training_step(batch, index))
            if len(self.seen) % 16 == 0:
                for optimizer in (first, second):
                    optimizer.step()
                    optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            return [torch.optim.AdamW(self.net[:2].parameters()), torch.optim.SGD(self.net[3:].parameters(), lr=0.1)]

    watch = Watch()
    module, _ = fit(Simulated([0.5, 0.5], local_steps=4), module=Manual, max_steps=32, callbacks=[watch])
    # Lightning counts the steps of both optimizers; a local step takes two batches, and so twice the time.
    assert sum(totals.steps for totals in watch.totals.values()) == 32
    assert len(module.seen) == 2 * 8 * 32
    assert watch.seconds == pytest.approx(16.0)


# ---------------------------------------------------------------------------------------------- what happens when


def test_virtual_time_is_that_of_steps_and_links() -> None:
    watch = Watch()
    strategy = Simulated([1.0], exchange_seconds=0.5, local_steps=2, dynamic_local_steps=False)
    fit(strategy, max_steps=4, callbacks=[watch])
    # Two rounds: half a second there, two steps, half a second back.
    assert watch.seconds == 6.0
    watch = Watch()
    size = 4 * sum(tensor.numel() for tensor in Model().state_dict().values() if tensor.is_floating_point())
    fit(Simulated([1.0], Link(0.5, size), local_steps=2), max_steps=4, callbacks=[watch])
    assert watch.seconds == pytest.approx(2 * (1.5 + 2 + 1.5))


def test_a_stop_in_mid_round_ends_virtual_time_with_the_step_that_was_played(tmp_path: Path) -> None:
    for link, seconds in ((0.0, 7.0), (0.25, 8.0)):
        watch, events = Watch(events=tmp_path / f"{link}.jsonl"), tmp_path / f"{link}.jsonl"
        fit(Simulated([1.0, 1.0], link, local_steps=5), max_steps=1000, callbacks=[watch, Stop(6)])
        assert [watch.totals[n].steps for n in range(2)] == [7, 5]
        # Five steps each, and two of worker 0's next five, and a link is used twice in a round.
        assert watch.seconds == seconds
        assert_in_order(events)


def test_data_that_ends_in_mid_round_ends_virtual_time_with_the_step_that_was_played(tmp_path: Path) -> None:
    speeds, events = [1.0, 1.3, 3.0], tmp_path / "events.jsonl"
    watch = Watch(events=events)
    module, _ = fit(
        Simulated(speeds, local_steps=20, grace=0.0), max_epochs=2, max_steps=-1, data=loader(100), callbacks=[watch]
    )
    assert sorted(module.seen) == sorted(2 * list(range(800)))
    assert watch.totals[2].wait_seconds == 0.0
    # The last batch is one of the slowest, which computes all the time and had been given a step more than there was.
    assert watch.seconds == watch.totals[2].steps * speeds[2] == 102.0
    assert_in_order(events)
    again, _ = fit(Simulated(replay=events, local_steps=20, grace=0.0), max_epochs=2, max_steps=-1, data=loader(100))
    assert equal(module, again)


def test_a_round_that_took_longer_and_ends_early_does_not_overtake_what_comes_before_it(tmp_path: Path) -> None:
    # Worker 0 skips steps until its round is longer than it was planned, and then somebody stops the run.
    class Late(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            phase = trainer.strategy.phase
            if phase is not None and phase.worker.number == 0 and phase.virtual_seconds >= 4.0:
                trainer.should_stop = phase.worker.clock.now > 12.0

    watch, events = Watch(events=tmp_path / "events.jsonl"), tmp_path / "events.jsonl"
    plugin = Skipping(lambda phase: phase.worker.number == 0 and 4.0 <= phase.worker.clock.now < 12.0)
    fit(Simulated([1.0, 1.0], local_steps=4, grace=0.0), max_steps=1000, callbacks=[watch, Late()], plugins=[plugin])
    assert_in_order(events)
    assert watch.totals[0].steps == 4 + 1
    assert watch.seconds == 13.0


def test_a_push_that_is_lost_on_its_way_is_not_counted() -> None:
    # Worker 0 takes its first round twice as long as planned, and dies before what comes of it has arrived.
    class Progress(L.Callback):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.steps.append(trainer.global_step)

    watch, progress = Watch(), Progress()
    plugin = Skipping(lambda phase: phase.worker.number == 0 and phase.worker.clock.now < 6.0)
    strategy = Simulated([1.0, 2.0], schedule=[Death(0, 11.0, back_at=12.0)], local_steps=6, dynamic_local_steps=False)
    module, trainer = fit(strategy, max_steps=20, callbacks=[watch, progress], plugins=[plugin], module=Fixed)
    assert watch.totals[0].departures == 1
    assert sum(totals.steps for totals in watch.totals.values()) == 40
    # Two steps of all workers are one global step, and what was lost is trained on again: the last two are the last.
    assert len(module.seen) // 8 == 40 + 6 + 6
    assert trainer.global_step == 20 == progress.steps[-1]
    assert progress.steps.count(20) <= 2


def test_who_is_not_known_to_be_slow_is_called_in_at_its_next_step(tmp_path: Path) -> None:
    for latency, steps, seconds in ((0.0, 3, 1.05), (0.3, 3, 1.65), (0.4, 3, 1.85)):
        path = tmp_path / f"{latency}.jsonl"
        watch = Watch(ledger=path)
        fit(Simulated([0.1, 0.35], exchange_seconds=[0.0, latency], local_steps=10, grace=0.0), callbacks=[watch])
        pushes = [json.loads(line) for line in path.read_text().splitlines()]
        first = next(push for push in pushes if push["worker"] == 1)
        # The fast one arrives after 1 s. The slow one learns that a latency later, having begun a latency later, too.
        assert (first["steps"], pytest.approx(first["seconds"])) == (steps, seconds)


def test_the_clusters_seconds_are_there_after_the_fit(caplog: pytest.LogCaptureFixture) -> None:
    strategy = Simulated(SPEEDS)
    assert strategy.virtual_seconds is None
    during: list[float | None] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            during.append(strategy.virtual_seconds)

    with caplog.at_level("INFO"):
        fit(strategy, callbacks=[AsyncLocalSGDCallback(), Look()])
    assert None not in during
    assert strategy.virtual_seconds is not None
    assert strategy.virtual_seconds >= during[-1] > 0.0
    assert f"local steps of all workers in {strategy.virtual_seconds:.1f} virtual s" in caplog.text


def test_a_slowdown_takes_time() -> None:
    watch = Watch()
    fit(Simulated([1.0], schedule=[Slowdown(0, 2.0, 4.0, 5.0)], local_steps=4), max_steps=4, callbacks=[watch])
    # Steps that begin at 0, 1, 2 (five times as long) and 7.
    assert watch.seconds == 8.0


def test_unequal_workers_wait_for_the_quorum_and_not_without_one() -> None:
    waits = {}
    for name, options in {"all": {"quorum": "all"}, "none": {"grace": 0.0}}.items():
        watch = Watch()
        fit(Simulated([0.1, 0.4], local_steps=5, dynamic_local_steps=False, **options), callbacks=[watch])
        waits[name] = watch.totals[0].wait_seconds / watch.seconds
    assert waits["all"] > 0.6
    assert waits["none"] < 0.1


def test_a_validations_time_is_that_of_the_model_which_it_sees() -> None:
    strategy = Simulated([0.1, 0.4], local_steps=5, dynamic_local_steps=False, quorum="all")
    module, _ = fit(strategy, max_steps=20, val_check_interval=5)
    # Synchronous rounds take as long as the slow one's five steps.
    assert module.validated == [(5 * n, pytest.approx(2.0 * n)) for n in range(1, 5)]


def test_the_dead_lose_a_round_and_those_who_come_take_part() -> None:
    schedule = [Death(0, 1.0, back_at=3.0), Death(2, 2.0), Arrival(2.5, 0.05), Slowdown(1, 1.0, 4.0, 3.0)]
    watch = Watch()
    module, _ = fit(
        Simulated([0.1, 0.2, 0.3], schedule=schedule, local_steps=5), max_epochs=3, max_steps=-1, callbacks=[watch]
    )
    totals = watch.totals
    assert [totals[n].sessions for n in range(4)] == [2, 1, 1, 1]
    assert [totals[n].departures for n in range(4)] == [1, 0, 1, 0]
    assert totals[3].steps > totals[2].steps > 0
    # What the dead had been leased went to others.
    assert sorted(module.seen) == sorted(3 * list(range(480)))


class Memory(L.Callback):
    """How many flat models there were, and inner states, each time with how many workers."""

    def __init__(self) -> None:
        self.flat: list[tuple[int, int]] = []
        self.inner: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        phase, training = trainer.strategy.phase, trainer.strategy._training
        if phase.stopped:
            return
        gc.collect()
        tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
        live = len(phase.turns.live)
        self.flat.append((live, list(storages.values()).count(4 * phase.binding.layout.numel)))
        self.inner.append((live, len(training._inner._states)))


def test_of_the_dead_nothing_is_kept() -> None:
    # Worker 1 may come back, and does; worker 3 dies without it, while its round is being computed.
    schedule = [Death(1, 1.0, back_at=2.0), Death(2, 1.4), Death(3, 1.5), Arrival(1.2, 0.2), Death(4, 2.5)]
    memory = Memory()
    strategy = Simulated(
        [0.1, 0.1, 0.15, 0.15], schedule=schedule, local_steps=4, checkpoint_every=None,
        outer_optimizer=SGD(lr=0.25),
    )  # fmt: skip
    gc.collect()
    gc.freeze()  # What is there already need not be looked through every time.
    try:
        fit(strategy, callbacks=[AsyncLocalSGDCallback(table=False), memory], max_steps=40)
    finally:
        gc.unfreeze()
    assert {live for live, _ in memory.flat} == {2, 3, 4}
    # A model for each worker, and one for all pseudo-gradients; of the server, the global model.
    assert all(flat <= live + 2 for live, flat in memory.flat)
    assert all(inner <= live + 1 for live, inner in memory.inner), "of worker 1, while it is away"
    assert memory.inner[-1] == (2, 2)


def test_when_everybody_is_dead_the_run_says_so() -> None:
    with pytest.raises(RuntimeError, match="at 2 virtual seconds no worker is left"):
        fit(Simulated([0.1, 0.2], schedule=[Death(0, 1.0), Death(1, 2.0)], local_steps=5), max_steps=1000)


def test_workers_with_data_of_their_own() -> None:
    shards = [loader(6, seed=n) for n in range(2)]
    seen: dict[int, set[int]] = {0: set(), 1: set()}

    class Note(Model):
        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            seen[self.trainer.strategy.phase.worker.number].add(round(float(batch[0].sum()), 3))
            return super().training_step(batch, index)

    L.seed_everything(1, verbose=False)
    asked: list[int] = []

    def data_of(worker: int) -> DataLoader[Any]:
        asked.append(worker)
        return DataLoader(shards[worker].dataset, batch_size=8)

    strategy = Simulated([0.1, 0.2], worker_data=data_of, local_steps=4)
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", max_steps=20, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Note())  # No training data besides.
    assert len(seen[0]) == len(seen[1]) == 6
    assert not seen[0] & seen[1]
    assert asked == [0, 1]


def test_data_that_a_worker_has_not_is_found_out_before_training() -> None:
    shards = [loader(6, seed=n) for n in range(3)]
    asked: list[int] = []

    def data_of(worker: int) -> Any:
        asked.append(worker)
        return shards[worker]

    schedule = [Arrival(1.0, 0.1), Arrival(2.0, 0.1)]
    module = Model()
    options = {"schedule": schedule, "worker_data": data_of, "local_steps": 4}
    with pytest.raises(ValueError, match=r"worker_data\(3\) failed with IndexError: .* workers 0, 1, 2, 3") as caught:
        fit(Simulated([0.1, 0.2], **options), module=lambda: module)
    assert isinstance(caught.value.__cause__, IndexError)
    assert not module.seen
    shards.append(loader(6, seed=3))
    asked.clear()
    with pytest.warns(UserWarning, match=r"own training data the length of an epoch alone is used"):
        fit(Simulated([0.1, 0.2], **options), module=lambda: module, max_steps=40)
    assert asked == [0, 1, 2, 3]
    assert sorted(module.rates) == [0, 1, 2, 3]


def test_what_a_schedule_had_in_store_for_later_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    later = [Slowdown(1, 50.0, 60.0, 2.0), Arrival(70.0, 0.2), Death(0, 1e9)]
    happened = [Slowdown(0, 0.5, 99.0, 1.5), Death(1, 1.0, back_at=80.0), Arrival(1.0, 0.2)]

    def said() -> list[str]:
        return [one.getMessage() for one in caplog.records if one.name == "lightning_async_localsgd.simulation.cluster"]

    fit(Simulated([0.1, 0.2, 0.2], schedule=[*later, *happened], local_steps=5))
    (text,) = said()
    assert "ended at" in text
    assert all(str(entry) in text for entry in later)
    assert not any(str(entry) in text for entry in happened)
    caplog.clear()
    fit(Simulated([0.1, 0.2, 0.2], schedule=happened, local_steps=5))
    fit(Simulated([0.1, 0.2], schedule=[Death(0, 1e9)], local_steps=5), callbacks=[Stop()])
    assert [text.count("Death") for text in said()] == [1]


def test_a_learning_rate_that_follows_a_metric_is_that_of_all() -> None:
    class Plateau(Model):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss", "interval": "step", "frequency": 1,
                                 "strict": False},
            }  # fmt: skip

    module, trainer = fit(Simulated([0.1, 0.2], local_steps=3), module=Plateau, max_steps=20, val_check_interval=5)
    last = trainer.optimizers[0].param_groups[0]["lr"]
    assert last < 1e-2
    assert all(rates == sorted(rates, reverse=True) for rates in module.rates.values())
    assert {len({*rates}) > 1 for rates in module.rates.values()} == {True}


# ------------------------------------------------------------------------------------- Lightning's other promises


def test_metrics_summary_and_evaluation_afterwards(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    module, trainer = fit(
        Simulated(SPEEDS, local_steps=5), logger=logger, log_every_n_steps=5, default_root_dir=tmp_path
    )
    text = Path(logger.log_dir, "metrics.csv").read_text()
    assert all(name in text for name in ("async/virtual_seconds", "async/staleness/worker_2", "train_loss"))
    summary = json.loads(Path(logger.log_dir, "async_localsgd_summary.json").read_text())
    assert summary["virtual"] is True
    assert summary["steps"] == 90
    assert summary["bytes_sent"] > 0 < summary["bytes_received"]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert trainer.test(module, loader(4, 9), verbose=False)[0]["val_loss"] > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_every_epoch_is_validated_within_also_where_ranks_share_it_unequally() -> None:
    """Ten batches for three workers are 3.33 for each: the run's epochs begin at no multiple of four."""
    module, _ = fit(Simulated([0.1] * 3, local_steps=4), data=loader(10), max_steps=60, val_check_interval=2)
    steps = [step for step, _ in module.validated]
    assert len(steps) == 2 * 18
    assert max(after - before for before, after in pairwise([0, *steps, 60])) <= 3


def test_pushes_that_a_buffer_has_kept_to_the_end_are_told(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    L.seed_everything(5, verbose=False)
    begun = Model()
    with pytest.warns(UserWarning, match=r"6 of 6 pushes are not in the model.*no push has ever been applied"):
        module, _ = fit(Simulated([0.1] * 2, local_steps=10, outer_optimizer=Buffer(period=7)), logger=logger)
    assert torch.equal(module.net[0].weight, begun.net[0].weight)
    summary = json.loads(Path(logger.log_dir, "async_localsgd_summary.json").read_text())
    assert (summary["version"], summary["held_back"]) == (6, 6)

    rule = MomentumRestart(Buffer(period=4), every=1)
    with pytest.warns(UserWarning, match=r"2 of 6 pushes are not in the model[^;]*$"):
        fit(Simulated([0.1] * 2, local_steps=10, outer_optimizer=rule))


def test_a_run_goes_on_from_its_checkpoint_with_every_workers_own_state(tmp_path: Path) -> None:
    def strategy() -> Simulated:
        speeds = [StepSeconds(one, 0.1) for one in SPEEDS]
        return Simulated(speeds, schedule=[Death(1, 1.0), Arrival(1.5, 0.2)], local_steps=5, checkpoint_every=None)

    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=15, save_top_k=-1)
    fit(strategy(), callbacks=[saving, AsyncLocalSGDCallback(table=False)], enable_checkpointing=True)
    path = tmp_path / "step=15.ckpt"
    saved = torch.load(path, weights_only=True)["async_localsgd"]["simulation"]
    assert saved["seconds"] > 1.5
    assert sorted(saved["inner"]) == ["0", "2", "3"], "worker 1 has died for good"
    steps = {worker: int(state["optimizers"][0]["state"][0]["step"]) for worker, state in saved["inner"].items()}
    assert steps["0"] > steps["2"] > 0

    watches = [Watch(), Watch()]
    runs = [fit(strategy(), ckpt_path=path, callbacks=[watch])[0] for watch in watches]
    assert equal(*runs)
    assert watches[0].seconds == watches[1].seconds > saved["seconds"]
    assert sum(totals.steps for totals in watches[0].totals.values()) == 90
    # It did not begin with the schedule of learning rates again.
    assert all(rates[0] > 5e-3 for rates in runs[0].rates.values())


def test_each_fit_has_a_folder_of_its_own_and_the_last_one_is_gone_on_from(tmp_path: Path) -> None:
    def again(steps: int, ckpt_path: str | None = None) -> Watch:
        watch = Watch()
        strategy = Simulated(SPEEDS, local_steps=5, checkpoint_every=1)
        options = {"callbacks": [watch], "default_root_dir": tmp_path, "module": Fixed, "max_steps": steps}
        fit(strategy, ckpt_path, **options)
        return watch

    again(10)
    again(20)
    folders = sorted((tmp_path / "async_localsgd").iterdir())
    assert len(folders) == 2
    assert all(list(folder.glob("rounds=*.ckpt")) for folder in folders)
    watch = again(40, "last")
    assert sum(totals.steps for totals in watch.totals.values()) == 120
    assert len(list((tmp_path / "async_localsgd").iterdir())) == 3


def test_a_checkpoint_of_a_live_run_is_gone_on_from(tmp_path: Path) -> None:
    _, trainer = fit("async_localsgd", module=Fixed, max_steps=10)
    trainer.save_checkpoint(tmp_path / "live.ckpt")
    watch = Watch()
    strategy = Simulated([0.1, 0.1], local_steps=5)
    fit(strategy, module=Fixed, ckpt_path=tmp_path / "live.ckpt", max_steps=20, callbacks=[watch])
    # Half of the run was done, whatever the number of workers.
    assert watch.seconds == pytest.approx(1.0)
    assert watch.version > 2


def test_stopping_early_leaves_the_global_model() -> None:
    watch = Watch()
    _, trainer = fit(Simulated(SPEEDS, local_steps=6), max_steps=1000, callbacks=[watch, Stop()])
    assert 10 <= trainer.global_step < 20
    assert watch.totals[0].steps > 0


# ----------------------------------------------------------------------------------------------------- the replay


def test_a_simulated_run_is_replayed_from_its_log(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    schedule = [Death(0, 1.0, back_at=2.0), Arrival(1.5, 0.2)]
    first, _ = fit(Simulated(SPEEDS, schedule=schedule, local_steps=5), callbacks=[Watch(events=events)])
    watch = Watch()
    again, _ = fit(Simulated(replay=events, local_steps=5), callbacks=[watch])
    assert equal(first, again)
    assert sorted(watch.totals) == [0, 1, 2, 3]
    for options, words in (
        ({"local_steps": 6}, r"parted from its log .* at line .*local_steps=5, not 6"),
        ({"local_steps": 5, "dynamic_local_steps": False}, r"parted from its log"),
    ):
        with pytest.raises(RuntimeError, match=words):
            fit(Simulated(replay=events, **options))
    with pytest.raises(ValueError, match=r"is of a run of 90 local steps .* come to 60"):
        fit(Simulated(replay=events, local_steps=5), max_steps=20)
    with pytest.raises(RuntimeError, match=r"the trainer has stopped before the logged run ended"):
        fit(Simulated(replay=events, local_steps=5), callbacks=[Stop()])
    lines = events.read_text().splitlines(keepends=True)
    (tmp_path / "broken.jsonl").write_text("".join(lines[: len(lines) // 2]))
    with pytest.raises(RuntimeError, match=r"ends at .* before training does"):
        fit(Simulated(replay=tmp_path / "broken.jsonl", local_steps=5))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "does not begin with the beginning"),
        ("no log\n", "line 1 cannot be read"),
        ('{"kind":"begin","seconds":0,"content":{"format":99}}\n', "of format 99"),
        ('{"kind":"pause","seconds":0,"content":{"worker":0}}\n', "does not begin with the beginning"),
        ('{"kind":"begin","seconds":0,"content":{"format":1}}\n' * 2, "more than one run"),
    ],
)
def test_a_file_that_is_no_log_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        Simulated(replay=path)


# ------------------------------------------------------------------------------------------------ what is refused


def test_a_log_of_events_needs_a_file_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="events must be the path of a file"):
        AsyncLocalSGDCallback(events=tmp_path)
    with pytest.raises(ValueError, match="ledger and events are both"):
        AsyncLocalSGDCallback(ledger=tmp_path / "a", events=tmp_path / "a")


def test_times_are_not_given_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seconds_per_step, schedule"):
        Simulated([1.0], schedule=[Death(0, 1.0)], replay=tmp_path / "events.jsonl")


def test_what_cannot_work_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"given 2 devices; set devices=1"):
        L.Trainer(strategy=Simulated([0.1, 0.2]), accelerator="cpu", devices=2, logger=False)
    with pytest.raises(ValueError, match=r"worker_data=3 must be a function"):
        Simulated([0.1], worker_data=3)  # type: ignore[arg-type]
    for flag in ("yes", 1, None):
        with pytest.raises(ValueError, match=rf"inner_states_on_cpu={flag!r} must be True"):
            Simulated([0.1], inner_states_on_cpu=flag)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"grace=2.0 .*quorum=2 of 2 workers"):
        L.Trainer(strategy=Simulated([0.1, 0.2], quorum=2, grace=2.0), accelerator="cpu", devices=1, logger=False)
    with pytest.raises(ValueError, match=r"seconds_per_step is empty"):
        Simulated([])
    with pytest.raises(ValueError, match="quorum"):
        L.Trainer(strategy=Simulated([0.1, 0.2], quorum=3), accelerator="cpu", devices=1, logger=False)
    with pytest.raises(ValueError, match=r"60 workers, but an epoch .* only 50 batches"):
        fit(Simulated([0.1] * 60), data=loader(50))
    with pytest.raises(ValueError, match=r"loader of worker 1, worker_data\(1\), has no batches"):
        fit(Simulated([0.1, 0.2], worker_data=lambda n: loader(5) if n == 0 else []))
    with pytest.raises(ValueError, match=r"worker_data\(0\) returned None"):
        fit(Simulated([0.1, 0.2], worker_data=lambda n: None))
    with pytest.raises(TypeError, match=r"worker_data\(1\) returned 7 where a loader must be"):
        fit(Simulated([0.1, 0.2], worker_data=lambda n: {"a": loader(5), "b": loader(5) if n == 0 else 7}))
    for seed in ("a", -1, 1.5, True):
        with pytest.raises(ValueError, match=rf"seed={seed!r} must be an integer"):
            Simulated([0.1, 0.2], seed=seed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"use_distributed_sampler=False.*worker_data=function"):
        fit(Simulated([0.1, 0.2]), use_distributed_sampler=False)
    with pytest.raises(ValueError, match="reload_dataloaders_every_n_epochs"):
        fit(Simulated([0.1, 0.2]), reload_dataloaders_every_n_epochs=1)


def test_a_stream_of_data_needs_a_share_for_each_worker() -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from loader(4).dataset

    with pytest.raises(ValueError, match=r"a DataLoader whose items cannot be handed out.*worker_data=function"):
        fit(Simulated([0.1, 0.2]), data=DataLoader(Stream(), batch_size=8))
    fit(Simulated([0.1, 0.2], worker_data=lambda n: DataLoader(Stream(), batch_size=8)), data=loader(4), max_steps=9)


def test_a_step_that_fetches_by_itself_is_refused() -> None:
    class Fetching(Model):
        def training_step(self, dataloader_iter: Any) -> Any:
            raise AssertionError

    with pytest.raises(TypeError, match=r"training_step\(self, batch, batch_idx\)"):
        fit(Simulated([0.1, 0.2]), module=Fetching)


def test_the_command_line(tmp_path: Path) -> None:
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

    config = tmp_path / "config.yaml"
    config.write_text(
        """
trainer:
  accelerator: cpu
  devices: 1
  logger: false
  strategy:
    class_path: lightning_async_localsgd.SimulatedAsyncLocalSGDStrategy
    init_args:
      seconds_per_step: [0.5, {seconds: 1.0, jitter: 0.1}]
      exchange_seconds: {latency: 0.1, bytes_per_second: 1000000.0}
      schedule:
        - class_path: lightning_async_localsgd.Slowdown
          init_args: {worker: 0, start: 5.0, end: 6.0, factor: 2.0}
        - class_path: lightning_async_localsgd.Death
          init_args: {worker: 1, at: 9.0}
      quorum: all
"""
    )
    strategy = LightningCLI(
        BoringModel, BoringDataModule, run=False, args=[f"--config={config}"], save_config_callback=None
    ).trainer.strategy
    assert isinstance(strategy, Simulated)
    assert strategy.script.devices == [StepSeconds(0.5), StepSeconds(1.0, 0.1)]
    assert strategy.script.links == [Link(0.1, 1e6)] * 2
    assert strategy.script.deaths == [Death(1, 9.0)]
    assert strategy.script.factor(0, 5.5) == 2.0
    assert strategy.quorum == "all"


# ------------------------------------------------------------------ the end of epochs and schedules


class Epochs(Model):
    """With a schedule of epochs, one of a metric and nothing else."""

    def __init__(self, plateau: bool) -> None:
        super().__init__()
        self.plateau = plateau

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("stands_still", 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
        if self.plateau:
            schedule: Any = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        else:
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "stands_still"}}


@pytest.mark.parametrize("plateau", [True, False])
def test_a_run_of_epochs_ends_with_the_last_ones_end(plateau: bool) -> None:
    _, trainer = fit(
        Simulated([0.1, 0.2, 0.3], local_steps=3), module=lambda: Epochs(plateau), max_steps=-1, max_epochs=4,
        val_check_interval=1.0, data=loader(20),
    )  # fmt: skip
    assert trainer.current_epoch == 4
    assert not trainer.should_stop
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert scheduler.last_epoch == 4
    # The first validation is the best, and each of the other three halves the rate.
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5 ** (3 if plateau else 4))


def test_a_schedule_of_steps_ends_where_the_run_does() -> None:
    class Steps(Model):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 40)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    _, trainer = fit(Simulated(SPEEDS, local_steps=6), module=Steps, max_steps=40)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 40
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0


class Items(IterableDataset[Any]):
    """Batches that know their worker and number; without a length."""

    def __init__(self, worker: int, batches: int) -> None:
        self.worker = worker
        self.batches = batches

    def __iter__(self) -> Any:
        for number in range(self.batches):
            for sign in (-1.0, 1.0):  # Two of each, for a batch has statistics.
                inputs = torch.full((8,), 0.1 * sign * number)
                yield inputs, inputs[:1], torch.tensor([self.worker, number])


class Seen(L.Callback):
    """Which batches each worker has had, and how often the model was validated."""

    def __init__(self) -> None:
        self.batches: dict[int, list[int]] = {}
        self.validations = 0

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
        worker, number = batch[2][0].tolist()
        self.batches.setdefault(worker, []).append(number)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.validations += not trainer.sanity_checking


def test_own_data_without_a_length_is_read_to_its_end_and_has_epochs() -> None:
    seen = Seen()
    strategy = Simulated([0.1, 0.1], local_steps=3, worker_data=lambda n: DataLoader(Items(n, 6 if n == 0 else 10), 2))
    L.seed_everything(5, verbose=False)
    trainer = L.Trainer(
        strategy=strategy, max_steps=18, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, accelerator="cpu", devices=1, callbacks=[seen],
    )  # fmt: skip
    trainer.fit(Fixed(), val_dataloaders=loader(2, 9))
    assert seen.batches[0] == list(range(6)) * 3
    assert seen.batches[1] == [*range(10), *range(8)]
    assert seen.validations == 3


def test_own_data_may_be_longer_than_the_first_workers() -> None:
    seen = Seen()

    def own(worker: int) -> Any:
        batches = list(Items(worker, 2 if worker == 0 else 10))
        return DataLoader(batches, 2)

    fit(Simulated([0.1, 0.1], local_steps=3, worker_data=own), module=Fixed, max_steps=12, data=None, callbacks=[seen])
    assert seen.batches[0] == [0, 1] * 6
    assert seen.batches[1] == [*range(10), 0, 1]


def test_a_buffer_that_is_replaced_stays_with_its_worker() -> None:
    class Counting(Fixed):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros((), dtype=torch.long))

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            self.count = self.count + 1
            return super().training_step(batch, index)

    watch = Watch()
    module, _ = fit(Simulated(SPEEDS, local_steps=5), module=Counting, callbacks=[watch])
    assert int(module.count) == watch.totals[0].steps < sum(totals.steps for totals in watch.totals.values())


def test_a_schedule_is_a_list_and_deaths_do_not_touch() -> None:
    with pytest.raises(ValueError, match=r"schedule=Death.* must be a list"):
        Simulated([0.1], schedule=Death(0, 1.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="schedule=None must be a list"):
        Simulated([0.1], schedule=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no worker 0 then"):
        Simulated([0.1, 0.1], schedule=[Death(0, 10.0, 20.0), Death(0, 20.0, 30.0)])


def test_fewer_local_steps_in_an_epoch_than_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="24 batches for all of them, of which a local step takes 10"):
        fit(Simulated([0.1] * 4), data=loader(24), accumulate_grad_batches=10)


class Single(Model):
    """Trains on single samples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(8, 1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("speeds", [[1.0, 1.0, 2.0], [1.0, 1.0, 1.0], [3.3, 1.3, 3.3, 1.0]])
@pytest.mark.parametrize("local_steps", [5, 50])
def test_the_last_validation_is_of_the_final_model(speeds: list[float], local_steps: int) -> None:
    data = DataLoader(TensorDataset(torch.randn(21, 8), torch.randn(21, 1), torch.arange(21)), batch_size=1)
    module = Single()
    trainer = L.Trainer(
        strategy=Simulated(speeds, local_steps=local_steps), accelerator="cpu", max_epochs=3, num_sanity_val_steps=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data, DataLoader(data.dataset, batch_size=7))
    assert len(module.seen) == 3 * 21
    assert len(module.validated) == 3
    final = float(trainer.validate(module, DataLoader(data.dataset, batch_size=7), verbose=False)[0]["val_loss"])
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(final)


class ByEpochs(Model):
    """Steps its scheduler by hand when an epoch is over, and changes something of its own when one begins."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.momenta: dict[int, list[float]] = {}

    def training_step(self, batch: Any, index: int) -> None:
        loss = super().training_step(batch, index)
        group = self.trainer.optimizers[0].param_groups[0]
        self.momenta.setdefault(self.trainer.current_epoch, []).append((group["lr"], group["momentum"]))
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def on_train_epoch_start(self) -> None:
        self.trainer.optimizers[0].param_groups[0]["momentum"] = 0.1 * self.trainer.current_epoch

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def test_what_a_hook_changes_between_epochs_changes_for_all_workers() -> None:
    module, _ = fit(Simulated(SPEEDS, local_steps=3), module=ByEpochs, max_steps=-1, max_epochs=4)
    assert sorted(module.momenta) == [0, 1, 2, 3]
    for epoch, seen in module.momenta.items():
        assert set(seen) == {(0.1 * 0.5**epoch, 0.1 * epoch)}


def test_a_schedule_that_a_callback_puts_in_another_ones_place_is_refused() -> None:
    with pytest.raises(ValueError, match=r"StochasticWeightAveraging.*WeightAveraging"):
        fit(Simulated(SPEEDS), callbacks=[StochasticWeightAveraging(0.1)])


def test_a_run_of_epochs_goes_on_with_other_workers(tmp_path: Path) -> None:
    def run(workers: int, epochs: int, **options: Any) -> tuple[Model, L.Trainer]:
        data = DataLoader(TensorDataset(torch.randn(64, 8), torch.randn(64, 1), torch.arange(64)), batch_size=1)
        module = Single()
        trainer = L.Trainer(
            strategy=Simulated([0.1] * workers, local_steps=4), accelerator="cpu", max_epochs=epochs,
            logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[ModelCheckpoint(tmp_path / f"{workers}-{epochs}", save_last=True)],
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=options.get("ckpt_path"))
        return module, trainer

    _, first = run(2, 2)
    assert first.global_step == 64
    for workers, left in ((2, 64), (4, 32), (1, 128)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            module, trainer = run(workers, 4, ckpt_path=tmp_path / "2-2" / "last.ckpt")
        assert len(module.seen) == 2 * 64
        assert trainer.global_step == 64 + left, "what is left of the run, as it is now"
        said = [str(one.message) for one in told if "in the epochs that are done" in str(one.message)]
        assert len(said) == (0 if workers == 2 else 1)
