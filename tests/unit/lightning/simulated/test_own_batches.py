"""Simulated workers with batch sizes of their own: each sample once an epoch, and as many samples as without them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from lightning_async_localsgd import AsyncLocalSGDCallback, MergeOptions, SimulatedAsyncLocalSGDStrategy
from lightning_async_localsgd.lightning.callback import format_table, run_summary
from lightning_async_localsgd.simulation.devices import Arrival, Death
from tests.lightning_models import Regression, cosine, digest, loader, network, regression_data
from tests.unit.lightning.simulated.support import fit

SAMPLES = 600
BATCH = 16
SIZES: dict[int, Any] = {0: 32, 2: (4, 2)}
SPEEDS = [0.1, 0.1, 0.4]


class Model(Regression):
    """Notes which worker trains on which samples in batches of which sizes, and after how many steps."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__(network(8), torch.optim.AdamW, 1e-2, cosine)
        self.automatic_optimization = not manual
        self.samples: list[int] = []
        self.sizes: dict[int, list[int]] = defaultdict(list)
        self.optimizer_steps: Counter[int] = Counter()
        self.losses: list[float] = []

    @property
    def worker(self) -> int:
        strategy: Any = self.trainer.strategy
        return int(strategy.runtime.worker.number)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.samples += batch[2].tolist()
        self.sizes[self.worker].append(len(batch[2]))
        loss = super().training_step(batch, index)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.lr_schedulers().step()  # type: ignore[union-attr,call-arg]
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.optimizer_steps[self.worker] += 1


def run(
    sizes: Any = SIZES, data: Any = None, strategy: dict[str, Any] | None = None, **options: Any
) -> tuple[Model, Any]:
    policies = {"local_steps": 5, "checkpoint_every": None, "batch_size": sizes, **(strategy or {})}
    data = loader(SAMPLES, BATCH) if data is None else data
    options = {"module": Model, "max_steps": -1, **options}
    return fit(SimulatedAsyncLocalSGDStrategy(policies.pop("speeds", SPEEDS), **policies), data=data, **options)


@pytest.mark.parametrize(
    "strategy",
    [
        {},
        {"overlap": True},
        {"quorum": "all"},
        {"sync_warmup_steps": 10},
        {"local_steps": "auto", "exchange_seconds": 0.01},
        {"schedule": [Death(1, 0.9, back_at=1.7), Arrival(0.5, 0.2), Death(2, 1.0)]},
        {"upload": "int8", "merge": MergeOptions(weights="tokens^2/steps")},
    ],
    ids=["rounds", "overlap", "quorum", "beginning", "auto", "deaths", "packed"],
)
def test_every_sample_is_used_once_an_epoch(strategy: dict[str, Any]) -> None:
    lost = any(isinstance(entry, Death) for entry in strategy.get("schedule", ()))
    module, trainer = run(strategy=strategy, max_epochs=2)
    counts = Counter(module.samples)
    assert counts.keys() == set(range(SAMPLES))
    # A dead worker's unfinished round is computed here, but does not count.
    assert set(counts.values()) == {2} or lost
    assert min(counts.values()) == 2
    assert max(module.sizes[0]) == 32
    assert max(module.sizes[1]) == BATCH
    assert max(module.sizes[2]) == 4
    assert trainer.global_step == 26, "as many steps as without own sizes: 13 of 16 samples on each of 3 workers"
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    assert trainer.accumulate_grad_batches == 1


@pytest.mark.parametrize("steps", [1, 7, 41])
@pytest.mark.parametrize("strategy", [{}, {"overlap": True}, {"quorum": "all", "dynamic_local_steps": False}])
def test_steps_mean_as_many_samples_as_without_own_sizes(strategy: dict[str, Any], steps: int) -> None:
    module, trainer = run(strategy=strategy, max_steps=steps)
    wanted = steps * len(SPEEDS) * BATCH
    # The smallest step has 8 samples. The worker that has it takes what is less than a step of the others.
    assert wanted <= len(module.samples) < wanted + 8
    assert trainer.global_step == steps


def test_accumulation_of_its_own() -> None:
    module, _ = run({1: (8, 3)}, max_epochs=1, accumulate_grad_batches=2, strategy={"speeds": [0.1, 0.1]})
    for worker, accumulated in ((0, 2), (1, 3)):
        whole = module.sizes[worker]
        assert abs(len(whole) / accumulated - module.optimizer_steps[worker]) < 1
    assert Counter(module.samples) == Counter(range(SAMPLES))


def test_gradients_of_accumulated_batches_are_those_of_one_batch() -> None:
    """Accumulating 4 x 4 samples gives the steps of 16 samples, if worker 1 has the same samples."""
    weights = []
    for sizes in ({1: 16}, {1: (4, 4)}):
        torch.manual_seed(0)
        module, _ = run(
            sizes,
            data=loader(320, 16, shuffle=False),
            strategy={"speeds": [0.1, 0.1], "quorum": "all", "dynamic_local_steps": False},
            max_epochs=1,
        )
        weights.append({name: value.clone() for name, value in module.state_dict().items()})
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5)


def test_equal_sizes_give_the_run_without_the_option() -> None:
    weights = []
    for sizes in (None, {0: BATCH}):
        module, _ = run(sizes, data=loader(2 * SAMPLES, BATCH, shuffle=False), max_steps=20)
        weights.append(digest(module.state_dict()))
    assert weights[0] == weights[1], "to the last bit, if leases are of whole batches"


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        ({"limit_train_batches": 5}, 5 * len(SPEEDS) * BATCH),
        ({"limit_train_batches": 0.5}, 6 * len(SPEEDS) * BATCH),
        ({"overfit_batches": 4}, 4 * len(SPEEDS) * BATCH),
    ],
)
def test_limits_of_batches_are_limits_of_their_samples(options: dict[str, Any], samples: int) -> None:
    module, _ = run(max_epochs=2, **options)
    assert len(module.samples) == 2 * samples
    assert max(Counter(module.samples).values()) == 2


def test_incomplete_batches_are_dropped_if_the_loader_drops_them() -> None:
    module, trainer = run(data=loader(SAMPLES + 7, BATCH, drop_last=True), max_epochs=2)
    assert {worker: set(sizes) for worker, sizes in module.sizes.items()} == {0: {32}, 1: {16}, 2: {4}}
    # At most one batch of each worker and epoch is incomplete, beside what the loader itself drops.
    assert 2 * (592 - 31 - 15 - 3) <= len(module.samples) <= 2 * 592
    assert max(Counter(module.samples).values()) == 2
    assert trainer.global_step in (25, 26), "what is dropped is no progress"


def test_incomplete_batches_are_at_most_one_for_each_worker_and_epoch() -> None:
    module, _ = run(max_epochs=3)
    for worker, size in ((0, 32), (1, 16), (2, 4)):
        assert sum(length < size for length in module.sizes[worker]) <= 3


def test_manual_optimization_counts_samples() -> None:
    class Manual(Model):
        def __init__(self) -> None:
            super().__init__(manual=True)

    module, trainer = run({0: 32}, module=Manual, max_epochs=2)
    assert set(Counter(module.samples).values()) == {2}
    assert trainer.global_step == 26
    with pytest.raises(ValueError, match=re.escape("accumulates 2 batches, but with automatic_optimization=False")):
        run({0: (32, 2)}, module=Manual, max_epochs=1)


@pytest.mark.parametrize("sizes", [SIZES, {1: 48}, None])
def test_run_resumes_in_the_middle_of_an_epoch_also_with_other_sizes(
    tmp_path: Path, sizes: Any, caplog: pytest.LogCaptureFixture
) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, filename="saved", every_n_train_steps=9)
    first, _ = run(max_epochs=1, callbacks=[saver, AsyncLocalSGDCallback(table=False)])
    assert len(first.samples) == SAMPLES
    resumed, trainer = run(sizes, max_epochs=2, ckpt_path=tmp_path / "saved.ckpt")
    if sizes is None:
        assert "its position in the epoch cannot be restored, so epoch 0 starts from its beginning" in caplog.text
        assert Counter(resumed.samples) == Counter(dict.fromkeys(range(SAMPLES), 2))
        return
    assert trainer.global_step == 26
    # What had not been merged at the checkpoint is trained on again, and nothing that had.
    done = torch.load(tmp_path / "saved.ckpt", weights_only=False)["async_localsgd"]["budget"]["done"]
    counts = Counter(resumed.samples)
    assert sum(counts.values()) == 2 * SAMPLES - done
    assert set(counts.values()) <= {1, 2}


@pytest.mark.parametrize("strategy", [{}, {"overlap": True}, {"sync_warmup_steps": 8}])
def test_replay_equals_the_run_bit_for_bit(tmp_path: Path, strategy: dict[str, Any]) -> None:
    events = tmp_path / "events.jsonl"
    recorder = AsyncLocalSGDCallback(table=False, recording=events)
    first, _ = run(strategy=strategy, max_epochs=2, callbacks=[recorder])
    options = {name: value for name, value in strategy.items() if name != "speeds"}
    again, _ = fit(
        SimulatedAsyncLocalSGDStrategy(
            replay=events, local_steps=5, checkpoint_every=None, batch_size=SIZES, **options
        ),
        data=loader(SAMPLES, BATCH),
        module=Model,
        max_steps=-1,
        max_epochs=2,
    )
    assert digest(first.state_dict()) == digest(again.state_dict())
    with pytest.raises(ValueError, match=r"own batch sizes refer to steps of 16 samples, but those .* refer to none"):
        fit(
            SimulatedAsyncLocalSGDStrategy(replay=events, local_steps=5, **options),
            data=loader(SAMPLES, BATCH),
            module=Model,
            max_steps=-1,
            max_epochs=2,
        )


class Summary(AsyncLocalSGDCallback):
    """Keeps the summary of a run."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        self.summary = run_summary(trainer.strategy.runtime)


@pytest.mark.parametrize("sizes", [SIZES, None])
def test_table_has_the_samples_of_a_step_if_workers_have_their_own(sizes: Any) -> None:
    callback = Summary(table=False)
    module, _ = run(sizes, max_epochs=1, callbacks=[callback])
    summary = callback.summary
    shares = {worker["worker"]: worker["share"] for worker in summary["workers"]}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert ("samples/step" in format_table(summary)) == (sizes is not None)
    if sizes is not None:
        assert shares[0] == pytest.approx(sum(module.sizes[0]) / SAMPLES), "of the samples"
        assert summary["workers"][2]["samples_per_step"] == 8.0


class Endless(IterableDataset[Any]):
    """Samples without numbers."""

    def __iter__(self) -> Any:
        return iter(regression_data(64))


DATA = regression_data(SAMPLES)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (DataLoader(Endless(), batch_size=4), "has an IterableDataset, whose samples have no numbers"),
        (DataLoader(DATA, batch_size=None), "has batch_size=None"),
        (
            DataLoader(DATA, batch_sampler=type("Own", (BatchSampler,), {})(SequentialSampler(DATA), 4, False)),
            "has batches made by a Own, whose sizes cannot be changed",
        ),
        ([loader(64, 8), loader(64, 8)], "the training data has 2 data loaders"),
        ({"one": loader(64, 8), "two": loader(64, 8)}, "the training data has 2 data loaders"),
    ],
)
def test_data_whose_batches_cannot_have_other_sizes_is_refused(data: Any, text: str) -> None:
    with pytest.raises(ValueError, match=rf"host .*{re.escape(text)}.*; use one DataLoader\(dataset, batch_size"):
        run(data=data, max_steps=5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sizes": "auto"}, "all simulated workers share one device; give sizes by worker"),
        ({"sizes": lambda memory: 8}, "all simulated workers share one device"),
        ({"sizes": {3: 8}}, "names worker 3, but this run has the 3 workers 0 to 2"),
        ({"sizes": {0: 601}}, "gives worker 0 batches of 601 samples, but an epoch has only 600"),
        ({"strategy": {"worker_data": lambda worker: loader(64)}}, "with worker_data each worker has a loader"),
        ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, "GradientAccumulationScheduler changes the size"),
        ({"use_distributed_sampler": False}, "is split among ranks by the script itself"),
        ({"sizes": 64}, "batch_size=64 must have sizes by worker"),
        ({"sizes": {0: 4, 1: 4, 2: 4}, "data": loader(20, 32)}, "an epoch of the training data has only 1 batches"),
    ],
)
def test_bad_input(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        run(max_epochs=1, **options)


def test_samplers_that_the_user_has_chosen_are_kept() -> None:
    data = DataLoader(DATA, batch_size=BATCH, sampler=RandomSampler(DATA, num_samples=300, replacement=False))
    module, _ = run(data=data, max_epochs=1)
    assert len(module.samples) == len(set(module.samples)) == 300


def test_trainer_without_an_end_stops_when_it_is_told() -> None:
    class Stops(Model):
        def on_train_batch_end(self, *_: Any) -> None:
            self.trainer.should_stop = self.trainer.global_step >= 12

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    _, trainer = run(module=Stops, max_epochs=-1)
    assert trainer.global_step >= 12
