"""A run that is interrupted, or goes on: ``python resume_job.py OUT JSON``, ranks of unequal speed.

Every rank notes in ``OUT/<name>_<rank>.json`` what it began with and which samples, of which epoch's order, it has
trained on in which of its rounds; rank 0 puts the server's state, as it was loaded, into ``OUT/<name>_server.pt``.
"""

from __future__ import annotations

import hashlib
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
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_async_localsgd import AsyncLocalSGDCallback, AsyncLocalSGDStrategy
from lightning_async_localsgd.coordinator import Coordinator
from lightning_async_localsgd.sampling import EpochOrder

SECONDS = (0.02, 0.03, 0.06, 0.03)
"""Least seconds of a local step, by rank."""

SAMPLES = 192
BATCH = 4
EPOCHS = 3


def digest(tree: Any) -> str:
    """Of every bit of the tensors in nested dictionaries and lists, and of all other values."""
    state = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                state.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for one in value:
                add(one)
        else:
            state.update(repr(value).encode())

    add(tree)
    return state.hexdigest()


def watch_items() -> dict[tuple[int, ...], int]:
    """Will hold the epoch of every batch that is drawn, by its samples.

    That need not be the one which the rank is in: what is left of the epoch before, because the worker that had it is
    gone, is handed out first.
    """
    epochs: dict[tuple[int, ...], int] = {}
    draw = EpochOrder.item

    def item(order: EpochOrder, epoch: int, number: int) -> Any:
        samples = draw(order, epoch, number)
        epochs[tuple(samples)] = epoch
        return samples

    EpochOrder.item = item  # type: ignore[method-assign]
    return epochs


class Numbered(Dataset[Any]):
    """Samples that know their numbers."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        return index, torch.randn(8, generator=generator)


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[1]), batch[1][:, :1].sin())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n / 10))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Notes(L.Callback):
    """Notes what happens, and has a state of its own."""

    def __init__(self, out: Path, name: str, options: dict[str, Any], messages: list[str]) -> None:
        self.out = out
        self.name = name
        self.options = options
        self.batches = 0
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
        phase = trainer.strategy.phase
        if not self.start:
            optimizer = trainer.optimizers[0]
            self.start = {
                "global_step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "optimizer": digest(optimizer.state_dict()["state"]),
                "steps": sorted(int(state["step"]) for state in optimizer.state_dict()["state"].values()),
                "rate": optimizer.param_groups[0]["lr"],
                "schedule": trainer.lr_scheduler_configs[0].scheduler.last_epoch,
                "callback": self.loaded,
            }
        samples = batch[0].tolist()
        self.seen.append([self.epochs[tuple(samples)], phase.worker.round, samples])

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.batches += 1
        time.sleep(SECONDS[trainer.global_rank])
        fate = self.options.get("fate")
        in_second = sum(epoch == 1 for epoch, _, _ in self.seen)
        if fate is None or trainer.global_rank > 0 or in_second < 6:
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
    """What was logged."""

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
        local_steps=4, start_timeout=60.0, silence_timeout=10.0, checkpoint_every=options.get("every", 4)
    )
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", devices=options["ranks"], max_epochs=EPOCHS, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=out,
        callbacks=[Notes(out, name, options, messages.texts), AsyncLocalSGDCallback(table=False)],
    )  # fmt: skip
    loader = DataLoader(Numbered(), batch_size=BATCH, shuffle=True)
    trainer.fit(Module(), loader, ckpt_path=options.get("ckpt_path"))
    trainer.save_checkpoint(out / f"{name}.ckpt")


if __name__ == "__main__":
    run(Path(sys.argv[1]), json.loads(sys.argv[2]))
