"""Saves and resumes in real processes: ``python checkpoints_job.py OUT``, two ranks of unequal speed.

Every rank notes what it saw in ``OUT/rank_<n>.json``, by case. ``OUT/single.ckpt`` has to be there: a checkpoint that a
plain Trainer on a single device has written of :func:`Module`.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_async_localsgd import AsyncLocalSGDCallback, AsyncLocalSGDStrategy

SECONDS = (0.001, 0.005)
"""What a step takes longer, by rank."""

CASES: dict[str, Callable[[Path], dict[str, Any]]] = {}


def case(function: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    """Adds a case under the function's name."""
    CASES[function.__name__] = function
    return function


class Module(L.LightningModule):
    """A regression with BatchNorm, AdamW and a cosine schedule."""

    def __init__(self, width: int = 16, horizon: int = 60, extra: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 1))
        if extra:
            self.extra = nn.Linear(2, 2)
        self.rates: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.net(inputs), targets)

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return self.loss(batch)

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: Any, index: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, index: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)
        horizon = self.hparams.horizon
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda n: 0.5 + 0.5 * math.cos(math.pi * min(n, horizon) / horizon)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Adapted(Module):
    """Trains a small part and saves nothing else, as models with adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False
        self.net[0].requires_grad_(False)

    def state_dict(self, *arguments: Any, **named: Any) -> Any:
        state = super().state_dict(*arguments, **named)
        return {name: tensor for name, tensor in state.items() if name.startswith("net.3.")}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two states are the same to the last bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in nn.Module.state_dict(module).items()}


def loader(samples: int = 256, shuffle: bool = True) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, 8, generator=generator)
    targets = (inputs[:, :1] * inputs[:, 1:2]).tanh() + 0.5 * inputs[:, 2:3]
    return DataLoader(TensorDataset(inputs, targets), batch_size=8, shuffle=shuffle)


class Watch(L.Callback):
    """Slows this rank down, notes what training starts from, and saves in mid-round where it is told to."""

    def __init__(self, save_to: Path | None = None) -> None:
        self.save_to = save_to
        self.steps = 0
        self.server: dict[str, Any] = {}
        self.start: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        phase = getattr(trainer.strategy, "phase", None)
        if self.steps == 0:
            self.start = copied(module)
            if phase is not None and phase.server is not None:
                self.server = phase.server.state_dict()
        self.steps += 1

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self.save_to is not None and self.steps == 7:
            trainer.save_checkpoint(self.save_to)
        time.sleep(SECONDS[trainer.global_rank])


def trainer_of(out: Path, *callbacks: L.Callback, strategy: Any = None, devices: int = 2, **options: Any) -> L.Trainer:
    """A quiet trainer."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        quiet["enable_checkpointing"] = False
    limits = {"max_steps": 12, "limit_val_batches": 0, "num_sanity_val_steps": 0, "default_root_dir": out}
    return L.Trainer(
        strategy=strategy or AsyncLocalSGDStrategy(local_steps=4, start_timeout=60.0),
        accelerator="cpu",
        devices=devices,
        callbacks=[*callbacks, AsyncLocalSGDCallback(table=False)],
        **{**quiet, **limits, **options},
    )


def counters(server: dict[str, Any]) -> dict[str, Any]:
    """Of a server's state: what a resumed run goes on from."""
    return {
        "version": server["model"]["version"],
        "done": server["budget"]["done"],
        "steps": {worker: totals["steps"] for worker, totals in server["workers"].items()},
        "rounds": {worker: totals["rounds"] for worker, totals in server["workers"].items()},
        # Without the ratios, which follow from them when workers are dispatched.
        "speeds": server["pacing"]["speeds"],
    }


class Messages(logging.Handler):
    """What was logged while it was attached."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


# --------------------------------------------------------------------------- saving


@case
def saved(out: Path) -> dict[str, Any]:
    watch = Watch(out / "mid.ckpt")
    best = ModelCheckpoint(out / "saved", monitor="val_loss", save_last=True, every_n_train_steps=4)
    trainer = trainer_of(out, watch, best, limit_val_batches=1.0, val_check_interval=4, max_steps=24)
    module = Module()
    trainer.fit(module, loader(), loader(32, shuffle=False))
    trainer.save_checkpoint(out / "after.ckpt")
    trainer.save_checkpoint(out / "weights.ckpt", weights_only=True)
    final = copied(module)
    valid = loader(32, shuffle=False)
    results: dict[str, Any] = {}
    for name, path in {"best": "best", "last": "last", "path": str(out / "mid.ckpt")}.items():
        results[name] = [
            trainer.validate(module, valid, ckpt_path=path, verbose=False, weights_only=True)[0]["val_loss"],
            trainer.test(module, valid, ckpt_path=path, verbose=False, weights_only=True)[0]["test_loss"],
            float(torch.cat(trainer.predict(module, valid, ckpt_path=path, weights_only=True)).sum()),
        ]
    after = torch.load(out / "after.ckpt", weights_only=True)
    loaded = Module.load_from_checkpoint(out / "after.ckpt")
    return {
        "rank": trainer.global_rank,
        "results": results,
        "paths": [best.best_model_path, best.last_model_path],
        "after_is_final": same(final, after["state_dict"]) and same(final, copied(loaded)),
        "steps": watch.steps,
    }


@case
def resumed(out: Path) -> dict[str, Any]:
    watch = Watch()
    trainer = trainer_of(out, watch, max_steps=48)
    module = Module()
    trainer.fit(module, loader(), ckpt_path=out / "after.ckpt", weights_only=True)
    trainer.save_checkpoint(out / "resumed.ckpt")
    saved = torch.load(out / "after.ckpt", weights_only=True)
    return {
        "rank": trainer.global_rank,
        "same_start": same(watch.start, saved["state_dict"]),
        "start": counters(watch.server) if watch.server else None,
        "rates": module.rates,
        "steps": watch.steps,
    }


@case
def resumed_from_last(out: Path) -> dict[str, Any]:
    watch = Watch()
    keep = ModelCheckpoint(out / "saved", monitor="val_loss", save_last=True, every_n_train_steps=4)
    trainer = trainer_of(out, watch, keep, max_steps=48, limit_val_batches=1.0, val_check_interval=8)
    module = Module()
    last = counters(torch.load(out / "saved" / "last.ckpt", weights_only=True)["async_localsgd"])
    trainer.fit(module, loader(), loader(32, shuffle=False), ckpt_path="last", weights_only=True)
    return {"rank": trainer.global_rank, "start": counters(watch.server) if watch.server else None, "last": last}


@case
def resumed_in_mid_run(out: Path) -> dict[str, Any]:
    watch = Watch()
    trainer = trainer_of(out, watch, max_steps=24)
    trainer.fit(Module(), loader(), ckpt_path=out / "mid.ckpt", weights_only=True)
    trainer.save_checkpoint(out / "completed.ckpt")
    return {"rank": trainer.global_rank, "start": counters(watch.server) if watch.server else None}


# ------------------------------------------------------------------ other strategies


@case
def from_a_single_device(out: Path) -> dict[str, Any]:
    messages = Messages()
    logging.getLogger("lightning.pytorch").addHandler(messages)
    watch = Watch()
    trainer = trainer_of(out, watch, max_steps=24)
    module = Module()
    trainer.fit(module, loader(), ckpt_path=out / "single.ckpt", weights_only=True)
    return {
        "rank": trainer.global_rank,
        "same_start": same(watch.start, torch.load(out / "single.ckpt", weights_only=True)["state_dict"]),
        "start": counters(watch.server) if watch.server else None,
        "messages": [text for text in messages.texts if "async_localsgd" in text],
        "steps": watch.steps,
        "rates": module.rates,
    }


@case
def through_ddp(out: Path) -> dict[str, Any]:
    """A checkpoint of ours is gone on from by DDP, and DDP's by us."""
    trainer = trainer_of(out, first := Watch(), strategy="ddp", max_steps=30)
    trainer.fit(module := Module(), loader(), ckpt_path=out / "after.ckpt", weights_only=True)
    same_for_ddp = same(first.start, torch.load(out / "after.ckpt", weights_only=True)["state_dict"])
    began_at = trainer.global_step - first.steps
    trainer.save_checkpoint(out / "ddp.ckpt")
    torch.distributed.destroy_process_group()

    trainer = trainer_of(out, second := Watch(), max_steps=40)
    trainer.fit(module := Module(), loader(), ckpt_path=out / "ddp.ckpt", weights_only=True)
    return {
        "rank": trainer.global_rank,
        "began_at": began_at,
        "same_for_ddp": same_for_ddp,
        "same_for_us": same(second.start, torch.load(out / "ddp.ckpt", weights_only=True)["state_dict"]),
        "start": counters(second.server) if second.server else None,
        "steps": second.steps,
        "rates": module.rates,
    }


# --------------------------------------------------------------- plugins and callbacks


class Late(TorchCheckpointIO):
    """Keeps what it is handed, and writes it when training is over: it must not have changed by then."""

    def __init__(self) -> None:
        self.kept: list[tuple[dict[str, Any], Any, list[float]]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.kept.append((checkpoint, path, sums(checkpoint)))

    def unchanged(self) -> bool:
        return bool(self.kept) and all(sums(checkpoint) == before for checkpoint, _, before in self.kept)


def sums(tree: Any) -> list[float]:
    """A number for every tensor in a checkpoint."""
    if isinstance(tree, Tensor):
        return [float(tree.double().sum()), float(tree.double().square().sum())]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [number for part in parts for number in sums(part)]


@case
def states_beside(out: Path) -> dict[str, Any]:
    """Workers' inner states are kept beside the checkpoints that Lightning's callback saves and removes."""
    keep = ModelCheckpoint(
        out / "beside", save_last=True, save_top_k=2, monitor="step", mode="max", every_n_train_steps=6
    )
    strategy = AsyncLocalSGDStrategy(local_steps=4, start_timeout=60.0, checkpoint_every=2)
    trainer = trainer_of(out / "beside", Watch(), keep, strategy=strategy, plugins=[AsyncCheckpointIO()], max_steps=60)
    trainer.fit(Module(), loader())
    return {"rank": trainer.global_rank}


@case
def written_later(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("own", "async"):
        late = Late()
        plugin = late if name == "own" else AsyncCheckpointIO(late)
        watch = Watch(out / "late.ckpt")
        trainer = trainer_of(out, watch, plugins=[plugin])
        trainer.fit(Module(), loader())
        found[name] = [len(late.kept), late.unchanged()]
    return {"rank": trainer.global_rank, **found}


@case
def adapters_alone(out: Path) -> dict[str, Any]:
    keep = ModelCheckpoint(out / "adapters", save_last=True, every_n_train_steps=4)
    first = Adapted()
    base = copied(first)
    trainer = trainer_of(out, keep)
    trainer.fit(first, loader())
    trainer.save_checkpoint(out / "adapters.ckpt")
    second = Adapted()
    second.load_state_dict({n: t for n, t in base.items() if n.startswith("net.0.")}, strict=False)
    watch = Watch()
    trainer = trainer_of(out, watch, max_steps=24)
    trainer.fit(second, loader(), ckpt_path=out / "adapters.ckpt", weights_only=True)
    final = copied(first)
    counted = "net.1.num_batches_tracked"  # Neither exchanged nor in this module's checkpoint.
    return {
        "rank": trainer.global_rank,
        "same_start": all(torch.equal(final[name], watch.start[name]) for name in final if name != counted),
        "start": counters(watch.server) if watch.server else None,
    }


@case
def averaged(out: Path) -> dict[str, Any]:
    keep = ModelCheckpoint(out / "averaged", save_last=True, every_n_train_steps=4)
    trainer = trainer_of(out, EMAWeightAveraging(decay=0.9), keep, Watch())
    trainer.fit(Module(), loader())
    ema = EMAWeightAveraging(decay=0.9)
    trainer = trainer_of(out, ema, watch := Watch(), max_steps=24)
    trainer.fit(Module(), loader(), ckpt_path=out / "averaged" / "last.ckpt", weights_only=True)
    saved = torch.load(out / "averaged" / "last.ckpt", weights_only=True)
    return {
        "rank": trainer.global_rank,
        "same_start": same(watch.start, saved["current_model_state"]),
        "start": counters(watch.server) if watch.server else None,
        "updates": int(ema._average_model.n_averaged),
    }


def main(out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    noted: dict[str, Any] = {}
    for name in names or CASES:
        L.seed_everything(3, verbose=False)
        began = time.monotonic()
        noted[name] = CASES[name](out)
        noted[name]["seconds"] = time.monotonic() - began
        (out / f"rank_{noted[name]['rank']}.json").write_text(json.dumps(noted))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
