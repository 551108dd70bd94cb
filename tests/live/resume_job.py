"""A run that is interrupted or resumed: ``python resume_job.py OUT JSON``, with ranks of unequal speed.

Each rank writes to ``OUT/<name>_<rank>.json`` its initial state, and the epoch, the round and the samples of each of
its batches. Rank 0 writes the server's state, as it was loaded, to ``OUT/<name>_server.pt``.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_async_localsgd import (
    AsyncLocalSGDCallback,
    AsyncLocalSGDStrategy,
    DelayedNesterov,
    ExchangeOptions,
)
from lightning_async_localsgd.lightning.data.sampling import EpochOrder
from lightning_async_localsgd.protocol.moments import SecondMoments
from lightning_async_localsgd.server.coordinator import Coordinator
from tests.lightning_models import Pace, Regression, digest, inverse_time, quiet_trainer, sine

SECONDS = (0.02, 0.03, 0.06, 0.03)
"""Minimum seconds of a local step, by rank."""

SAMPLES = 192
BATCH = 4
EPOCHS = 3


def watch_items() -> dict[tuple[int, ...], int]:
    """Return a dictionary that receives the epoch of each batch that is drawn, by the samples of the batch.

    The epoch need not be that of the rank, because batches that a lost worker left over from the last epoch come first.
    """
    epochs: dict[tuple[int, ...], int] = {}
    draw = EpochOrder.item

    def item(order: EpochOrder, epoch: int, number: int) -> Any:
        samples = draw(order, epoch, number)
        epochs[tuple(samples)] = epoch
        return samples

    EpochOrder.item = item  # type: ignore[method-assign]
    return epochs


def own_state(state: dict[str, Any]) -> dict[int, Any]:
    """Return an optimizer's state without the second moments, which are those of all workers together."""
    return {
        number: {key: value for key, value in values.items() if key != "exp_avg_sq"}
        for number, values in state["state"].items()
    }


def has_global_moments(runtime: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the second moments are those that came with the model. There are none before the first step."""
    moments, layout = SecondMoments([optimizer]), runtime.binding.layout
    sent = layout.views(runtime.worker.model, "moment")
    read = {f"{name}:second_moment": moments.read(each) for name, each in runtime.module.named_parameters()}
    assert sent.keys() == read.keys()
    return all(value is not None and torch.allclose(value, sent[name]) for name, value in read.items())


class Numbered(Dataset[Any]):
    """A dataset of numbered samples."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        return index, torch.randn(8, generator=generator)


class Model(Regression):
    """Learns the sine of its first input."""

    def __init__(self) -> None:
        super().__init__(optimizer=torch.optim.AdamW, lr=1e-2, schedule=inverse_time)

    def loss(self, batch: Any) -> Tensor:
        return super().loss((batch[1], sine(batch[1])))


class Notes(Pace):
    """Gives ranks unequal speeds, lets rank 0 fail if requested, and notes what a rank trains on.

    Args:
        out: folder of the notes.
        name: name of the run.
        options: options of the job.
        messages: log messages, which are noted, too.

    """

    def __init__(self, out: Path, name: str, options: dict[str, Any], messages: list[str]) -> None:
        super().__init__(SECONDS)
        self.out = out
        self.name = name
        self.options = options
        self.loaded: dict[str, Any] = {}
        self.seen: list[Any] = []
        self.start: dict[str, Any] = {}
        self.messages = messages
        self.epochs = watch_items()

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = dict(state)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        runtime = trainer.strategy.runtime
        if not self.start:
            optimizer = trainer.optimizers[0]
            self.start = {
                "global_step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "optimizer": digest(own_state(optimizer.state_dict())),
                "has_global_moments": has_global_moments(runtime, optimizer),
                "steps": sorted(int(state["step"]) for state in optimizer.state_dict()["state"].values()),
                "rate": optimizer.param_groups[0]["lr"],
                "schedule": trainer.lr_scheduler_configs[0].scheduler.last_epoch,
                "callback": self.loaded,
            }
        samples = batch[0].tolist()
        self.seen.append([self.epochs[tuple(samples)], runtime.worker.round, samples])

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        super().on_train_batch_end(trainer, module)
        fate = self.options.get("fate")
        batches_of_second_epoch = sum(epoch == 1 for epoch, _, _ in self.seen)
        if fate is None or trainer.global_rank > 0 or batches_of_second_epoch < 6:
            return
        if fate == "raise":
            raise RuntimeError("a fault of rank 0's own")
        if not (self.out / "signalled").exists():
            (self.out / "signalled").write_text(str(time.time()))
            os.kill(os.getpid(), getattr(signal, fate))

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        self.note(trainer)

    def on_fit_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.note(trainer, end=digest(trainer.lightning_module.state_dict()))

    def note(self, trainer: L.Trainer, **more: Any) -> None:
        noted = {"start": self.start, "seen": self.seen, "messages": self.messages, **more}
        path = self.out / f"{self.name}_{trainer.global_rank}.json"
        path.with_suffix(".new").write_text(json.dumps(noted))
        path.with_suffix(".new").rename(path)


class Messages(logging.Handler):
    """Records log messages."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def run(out: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    L.seed_everything(1, verbose=False)
    name = options["name"]
    messages = Messages()
    logger = logging.getLogger("lightning_async_localsgd")
    logger.setLevel(logging.INFO)
    logger.addHandler(messages)
    logger.addHandler(logging.StreamHandler())
    load = Coordinator.load_state_dict

    def loaded(coordinator: Coordinator, state: dict[str, Any]) -> None:
        load(coordinator, state)
        torch.save(coordinator.state_dict(), out / f"{name}_server.pt")

    Coordinator.load_state_dict = loaded  # type: ignore[method-assign]
    strategy = AsyncLocalSGDStrategy(
        local_steps=4,
        outer_optimizer=DelayedNesterov(),
        exchange=ExchangeOptions(start_timeout=60.0, silence_timeout=10.0),
        checkpoint_every=options.get("every", 4),
    )
    trainer = quiet_trainer(
        strategy,
        devices=options["ranks"],
        max_epochs=EPOCHS,
        default_root_dir=out,
        callbacks=[Notes(out, name, options, messages.texts), AsyncLocalSGDCallback(table=False)],
    )
    loader = DataLoader(Numbered(), batch_size=BATCH, shuffle=True)
    trainer.fit(Model(), loader, ckpt_path=options.get("ckpt_path"))
    trainer.save_checkpoint(out / f"{name}.ckpt")


if __name__ == "__main__":
    run(Path(sys.argv[1]), json.loads(sys.argv[2]))
