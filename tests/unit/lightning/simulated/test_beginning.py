"""The synchronous beginning in a simulated cluster: its steps, its times, and its replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_async_localsgd import Arrival, AsyncLocalSGDCallback, Death, Link
from lightning_async_localsgd import SimulatedAsyncLocalSGDStrategy as Simulated
from lightning_async_localsgd.server.event_file import read_pushes
from lightning_async_localsgd.server.events import read_events
from tests.lightning_models import Regression, ScheduleFree, cosine, digest, loader, network, quiet_trainer

BATCH = 4
WORKERS = 3


def seeded_network(batch_norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return network(8, batch_norm)


def weights_of(module: nn.Module) -> str:
    """Return a hash of what workers exchange."""
    return digest({name: value for name, value in module.state_dict().items() if value.is_floating_point()})


def sample(worker: int, index: int) -> Tensor:
    return torch.randn(8, generator=torch.Generator().manual_seed(1000 * worker + index))


class OwnSamples(Dataset[Tensor]):
    """The samples of one worker."""

    def __init__(self, worker: int) -> None:
        self.worker = worker

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> Tensor:
        return sample(self.worker, index)


class Product(Regression):
    def loss(self, batch: Tensor) -> Tensor:
        return (self.net(batch) - batch[:, :1] * batch[:, 1:2]).square().mean()


class Steps(L.Callback):
    """Notes weights, optimizer state and virtual time after each optimizer step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []
        self.batches: list[int] = []
        self.workers: list[int] = []
        self.taken = 0
        self.synchronous = False

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        self.workers.append(trainer.strategy.runtime.worker.number)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.synchronous = trainer.strategy.runtime.worker.synchronous

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        optimizer = trainer.optimizers[0]
        step = int(max((state["step"] for state in optimizer.state.values()), default=0))
        if self.synchronous_now(step):
            self.states.append(
                {
                    "weights": {name: value.clone() for name, value in pl_module.net.state_dict().items()},
                    "adam": [
                        {key: value.clone() for key, value in state.items()} for state in optimizer.state.values()
                    ],
                    "lr": optimizer.param_groups[0]["lr"],
                    "batches": len(self.workers),
                    "seconds": trainer.strategy.virtual_seconds,
                }
            )

    def synchronous_now(self, step: int) -> bool:
        is_new, self.taken = step > self.taken, max(step, self.taken)
        is_synchronous, self.synchronous = self.synchronous, False
        return is_new and is_synchronous


def synchronous_steps(steps: int, total: int, accumulate: int = 1) -> list[dict[str, Any]]:
    """Compute synchronous training with the batches of all workers, without this package."""
    net = seeded_network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    schedule = cosine(optimizer, total)
    states = []
    for step in range(steps):
        optimizer.zero_grad()
        for worker in range(WORKERS):
            for part in range(accumulate):
                begin = (step * accumulate + part) * BATCH
                batch = torch.stack([sample(worker, begin + index) for index in range(BATCH)])
                loss = (net(batch) - batch[:, :1] * batch[:, 1:2]).square().mean()
                (loss / WORKERS / accumulate).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        optimizer.step()
        schedule.step()
        states.append(
            {
                "weights": {name: value.clone() for name, value in net.state_dict().items()},
                "adam": [{key: value.clone() for key, value in state.items()} for state in optimizer.state.values()],
                "lr": optimizer.param_groups[0]["lr"],
            }
        )
    return states


def own_data(worker: int) -> DataLoader[Tensor]:
    return DataLoader(OwnSamples(worker), batch_size=BATCH)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_first_steps_equal_synchronous_training(accumulate: int, tmp_path: Path) -> None:
    steps, notes = 4, Steps()
    strategy = Simulated(
        [1.0] * WORKERS, worker_data=own_data, sync_warmup_steps=steps, local_steps=3, checkpoint_every=None
    )
    trainer = quiet_trainer(
        strategy, max_steps=10, callbacks=[notes], gradient_clip_val=0.05, accumulate_grad_batches=accumulate,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Product(seeded_network(), torch.optim.AdamW, 1e-2, cosine))
    assert len(notes.states) == steps
    for number, wanted in enumerate(synchronous_steps(steps, 10, accumulate)):
        found = notes.states[number]
        torch.testing.assert_close(found["adam"], wanted["adam"], rtol=1e-4, atol=1e-7)
        if number < steps - 1:  # After the last one, the module belongs to a worker's first round.
            torch.testing.assert_close(found["weights"], wanted["weights"], rtol=1e-5, atol=1e-6)
            assert found["lr"] == pytest.approx(wanted["lr"])
            assert found["seconds"] == pytest.approx(number + 1.0)
        assert found["batches"] == (number + 1) * WORKERS * accumulate
    assert trainer.global_step == 10


def test_unequal_workers_contribute_in_proportion_and_do_not_wait(tmp_path: Path) -> None:
    notes, report = Steps(), AsyncLocalSGDCallback(table=False, recording=tmp_path / "events.jsonl")
    strategy = Simulated([1.0, 2.0, 4.0], exchange_seconds=Link(0.25), sync_warmup_steps=6, local_steps=3)
    trainer = quiet_trainer(strategy, max_steps=12, callbacks=[notes, report], default_root_dir=tmp_path)
    module = Regression(seeded_network(batch_norm=True), torch.optim.AdamW, 1e-2, cosine)
    trainer.fit(module, loader(400, batch_size=4), loader(16, shuffle=False))
    # One local step each until speeds are known, then four, two and one.
    counts = [sum(worker == number for worker in notes.workers[6:13]) for number in range(WORKERS)]
    assert counts == [4, 2, 1]
    times = [state["seconds"] for state in notes.states]
    assert times[0] == pytest.approx(4.5), "0.25 s for the model, a step of 4 s, and 0.25 s for the gradient"
    assert times[1] == pytest.approx(9.0)
    assert trainer.global_step == 12
    assert trainer.strategy.virtual_seconds < 12 * 7 / 3 * 4
    # The log replays bit for bit.
    replayed = Regression(seeded_network(batch_norm=True), torch.optim.AdamW, 1e-2, cosine)
    replay = Simulated(replay=tmp_path / "events.jsonl", sync_warmup_steps=6, local_steps=3)
    trainer = quiet_trainer(replay, max_steps=12, callbacks=[Steps()], default_root_dir=tmp_path)
    trainer.fit(replayed, loader(400, batch_size=4), loader(16, shuffle=False))
    assert weights_of(replayed) == weights_of(module)


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 2, "max_steps": -1, "val_check_interval": 0.5},
        {"max_epochs": 3, "max_steps": -1, "accumulate_grad_batches": 3},
        {"max_steps": 25, "val_check_interval": 4},
    ],
)
@pytest.mark.parametrize(
    "schedule", [[], [Death(1, 1.1), Death(2, 2.0, back_at=2.5)], [Death(0, 1.4, back_at=2.0), Arrival(0.9, 0.1)]]
)
def test_every_sample_is_used_whatever_happens_in_the_beginning(
    options: dict[str, Any], schedule: list[Any], tmp_path: Path
) -> None:
    for steps in (5, 1000):
        events = tmp_path / f"{steps}.jsonl"
        strategy = Simulated([0.1, 0.17, 0.3], sync_warmup_steps=steps, local_steps=3, schedule=schedule)
        recording = tmp_path / f"{steps}.recording"
        report = AsyncLocalSGDCallback(table=False, events=events, recording=recording)
        trainer = quiet_trainer(strategy, callbacks=[report], default_root_dir=tmp_path, **options)
        module = Regression(seeded_network(batch_norm=True), torch.optim.AdamW, 1e-2, cosine)
        trainer.fit(module, loader(296, batch_size=4), loader(16, shuffle=False))
        if "max_epochs" not in options:
            assert trainer.global_step == options["max_steps"]
        else:
            lines = read_pushes(events)
            merged = {(line["session"], line["sequence"]) for line in lines if line["refused"] is None}
            pushes = [event.content["push"] for event in read_events(recording) if event.kind == "push"]
            samples = sum(push.samples for push in pushes if (push.session, push.sequence) in merged)
            assert samples == options["max_epochs"] * 296
        assert all(torch.isfinite(value).all() for value in module.state_dict().values())
        replayed = Regression(seeded_network(batch_norm=True), torch.optim.AdamW, 1e-2, cosine)
        replay = Simulated(replay=recording, sync_warmup_steps=steps, local_steps=3)
        trainer = quiet_trainer(replay, default_root_dir=tmp_path, **options)
        trainer.fit(replayed, loader(296, batch_size=4), loader(16, shuffle=False))
        assert weights_of(replayed) == weights_of(module), options


def test_run_resumes_within_its_beginning(tmp_path: Path) -> None:
    def fit(path: str | None, steps: int, workers: int = WORKERS) -> tuple[Regression, Steps]:
        notes = Steps()
        saves = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        strategy = Simulated([1.0] * workers, sync_warmup_steps="auto", local_steps=2, dynamic_local_steps=False)
        trainer = quiet_trainer(strategy, callbacks=[notes, saves], max_steps=steps, default_root_dir=tmp_path)
        module = Regression(seeded_network(), torch.optim.AdamW, 1e-2)
        trainer.fit(module, loader(400, batch_size=4, shuffle=False), ckpt_path=path)
        return module, notes

    _, notes = fit(None, 60)
    assert len(notes.states) == 6, "a tenth of the run"
    _, later = fit(str(tmp_path / "step=3.ckpt"), 60)
    assert len(later.states) == 3
    for wanted, found in zip(notes.states[3:], later.states, strict=True):
        torch.testing.assert_close(found["adam"], wanted["adam"])
    _, fewer = fit(str(tmp_path / "step=3.ckpt"), 60, workers=2)
    assert [int(state["adam"][0]["step"]) for state in fewer.states] == [4, 5, 6]
    past, after = fit(str(tmp_path / "step=6.ckpt"), 60)
    assert not after.states, "the beginning is over"
    assert all(torch.isfinite(value).all() for value in past.state_dict().values())


def test_optimizer_that_remembers_weights(tmp_path: Path) -> None:
    strategy = Simulated([1.0, 1.0], sync_warmup_steps=6, local_steps=2)
    trainer = quiet_trainer(strategy, max_steps=12, default_root_dir=tmp_path, val_check_interval=2)
    module = Regression(seeded_network(), ScheduleFree, 0.05)
    module.on_train_start = lambda: module.trainer.optimizers[0].train()  # type: ignore[method-assign]
    trainer.fit(module, loader(400, batch_size=4), loader(16, shuffle=False))
    assert trainer.global_step == 12
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
