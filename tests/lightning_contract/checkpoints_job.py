"""Saves and resumes with two ranks of unequal speed: ``python checkpoints_job.py OUT [CASE...]``.

Each rank writes what it noted to ``OUT/rank_<n>.json``, by case. ``OUT/single.ckpt`` must be a checkpoint of
:class:`Module`, written by a plain Trainer on a single device.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor, nn

from lightning_async_localsgd import AsyncLocalSGDCallback, AsyncLocalSGDStrategy, ExchangeOptions
from tests.lightning_models import (
    WEIGHTS_ONLY,
    EMAWeightAveraging,
    Pace,
    Regression,
    cosine,
    loader,
    network,
    quiet_trainer,
    same_tensors,
)

SECONDS = (0.001, 0.005)
"""How long each rank sleeps after a step."""

CASES: dict[str, Callable[[Path], dict[str, Any]]] = {}


def case(function: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    """Register a case under the name of its function."""
    CASES[function.__name__] = function
    return function


class Module(Regression):
    """A regression with BatchNorm, AdamW and a cosine schedule.

    Args:
        width: width of the hidden layer.
        horizon: the step at which the schedule ends.
        extra: whether there is an additional layer, which is not used.

    """

    def __init__(self, width: int = 16, horizon: int = 60, extra: bool = False) -> None:
        super().__init__(
            network(width, batch_norm=True), torch.optim.AdamW, 1e-2, lambda optimizer, _: cosine(optimizer, horizon)
        )
        self.save_hyperparameters()
        if extra:
            self.extra = nn.Linear(2, 2)
        self.rates: list[float] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return super().training_step(batch, index)


class Adapted(Module):
    """Trains and saves only a part, like a model with adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False
        self.net[0].requires_grad_(False)

    def state_dict(self, *arguments: Any, **named: Any) -> Any:
        state = super().state_dict(*arguments, **named)
        return {name: tensor for name, tensor in state.items() if name.startswith("net.3.")}


def copied(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the whole state, also of a module that saves only a part."""
    return {name: tensor.detach().clone() for name, tensor in nn.Module.state_dict(module).items()}


class Watch(Pace):
    """Gives ranks unequal speeds, and notes the state at the start of training.

    Args:
        save_to: path of a checkpoint that is saved after seven batches.

    """

    def __init__(self, save_to: Path | None = None) -> None:
        super().__init__(SECONDS)
        self.save_to = save_to
        self.server: dict[str, Any] = {}
        self.start: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        runtime = getattr(trainer.strategy, "runtime", None)
        if self.batches == 0:
            self.start = copied(module)
            if runtime is not None and runtime.server is not None:
                self.server = runtime.server.state_dict()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self.save_to is not None and self.batches == 6:
            trainer.save_checkpoint(self.save_to)
        super().on_train_batch_end(trainer, module)


def trainer_of(out: Path, *callbacks: L.Callback, strategy: Any = None, devices: int = 2, **options: Any) -> L.Trainer:
    """Return a trainer of 12 steps on two ranks, unless told otherwise."""
    limits = {"max_steps": 12, "limit_val_batches": 0, "num_sanity_val_steps": 0, "default_root_dir": out}
    return quiet_trainer(
        strategy or AsyncLocalSGDStrategy(local_steps=4, exchange=ExchangeOptions(start_timeout=60.0)),
        devices=devices,
        callbacks=[*callbacks, AsyncLocalSGDCallback(table=False)],
        **{**limits, **options},
    )


def counters(server: dict[str, Any]) -> dict[str, Any]:
    """Return the counters in a server's state."""
    return {
        "version": server["model"]["version"],
        "done": server["budget"]["done"],
        "steps": {worker: totals["steps"] for worker, totals in server["workers"].items()},
        "rounds": {worker: totals["rounds"] for worker, totals in server["workers"].items()},
        # Without the ratios, which are computed from the speeds when workers are dispatched.
        "speeds": server["pacing"]["speeds"],
    }


class Messages(logging.Handler):
    """Records log messages."""

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
            trainer.validate(module, valid, ckpt_path=path, verbose=False, **WEIGHTS_ONLY)[0]["val_loss"],
            trainer.test(module, valid, ckpt_path=path, verbose=False, **WEIGHTS_ONLY)[0]["test_loss"],
            float(torch.cat(trainer.predict(module, valid, ckpt_path=path, **WEIGHTS_ONLY)).sum()),
        ]
    after = torch.load(out / "after.ckpt", weights_only=True)
    loaded = Module.load_from_checkpoint(out / "after.ckpt")
    return {
        "rank": trainer.global_rank,
        "results": results,
        "paths": [best.best_model_path, best.last_model_path],
        "after_is_final": same_tensors(final, after["state_dict"]) and same_tensors(final, copied(loaded)),
        "steps": watch.batches,
    }


@case
def resumed(out: Path) -> dict[str, Any]:
    watch = Watch()
    trainer = trainer_of(out, watch, max_steps=48)
    module = Module()
    trainer.fit(module, loader(), ckpt_path=out / "after.ckpt", **WEIGHTS_ONLY)
    trainer.save_checkpoint(out / "resumed.ckpt")
    saved = torch.load(out / "after.ckpt", weights_only=True)
    return {
        "rank": trainer.global_rank,
        "same_start": same_tensors(watch.start, saved["state_dict"]),
        "start": counters(watch.server) if watch.server else None,
        "rates": module.rates,
        "steps": watch.batches,
    }


@case
def resumed_from_last(out: Path) -> dict[str, Any]:
    watch = Watch()
    keep = ModelCheckpoint(out / "saved", monitor="val_loss", save_last=True, every_n_train_steps=4)
    trainer = trainer_of(out, watch, keep, max_steps=48, limit_val_batches=1.0, val_check_interval=8)
    module = Module()
    last = counters(torch.load(out / "saved" / "last.ckpt", weights_only=True)["async_localsgd"])
    trainer.fit(module, loader(), loader(32, shuffle=False), ckpt_path="last", **WEIGHTS_ONLY)
    return {"rank": trainer.global_rank, "start": counters(watch.server) if watch.server else None, "last": last}


@case
def resumed_in_mid_run(out: Path) -> dict[str, Any]:
    watch = Watch()
    trainer = trainer_of(out, watch, max_steps=24)
    trainer.fit(Module(), loader(), ckpt_path=out / "mid.ckpt", **WEIGHTS_ONLY)
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
    trainer.fit(module, loader(), ckpt_path=out / "single.ckpt", **WEIGHTS_ONLY)
    return {
        "rank": trainer.global_rank,
        "same_start": same_tensors(watch.start, torch.load(out / "single.ckpt", weights_only=True)["state_dict"]),
        "start": counters(watch.server) if watch.server else None,
        "messages": [text for text in messages.texts if "async_localsgd" in text],
        "steps": watch.batches,
        "rates": module.rates,
    }


@case
def through_ddp(out: Path) -> dict[str, Any]:
    """DDP resumes our checkpoint, and this strategy resumes that of DDP."""
    trainer = trainer_of(out, first := Watch(), strategy="ddp", max_steps=30)
    trainer.fit(module := Module(), loader(), ckpt_path=out / "after.ckpt", **WEIGHTS_ONLY)
    same_for_ddp = same_tensors(first.start, torch.load(out / "after.ckpt", weights_only=True)["state_dict"])
    began_at = trainer.global_step - first.batches
    trainer.save_checkpoint(out / "ddp.ckpt")
    torch.distributed.destroy_process_group()

    trainer = trainer_of(out, second := Watch(), max_steps=40)
    trainer.fit(module := Module(), loader(), ckpt_path=out / "ddp.ckpt", **WEIGHTS_ONLY)
    return {
        "rank": trainer.global_rank,
        "began_at": began_at,
        "same_for_ddp": same_for_ddp,
        "same_for_us": same_tensors(second.start, torch.load(out / "ddp.ckpt", weights_only=True)["state_dict"]),
        "start": counters(second.server) if second.server else None,
        "steps": second.batches,
        "rates": module.rates,
    }


# --------------------------------------------------------------- plugins and callbacks


class DelayedCheckpointIO(TorchCheckpointIO):
    """Keeps each checkpoint until training is over. Its tensors must not have changed by then."""

    def __init__(self) -> None:
        self.kept: list[tuple[dict[str, Any], Any, list[float]]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.kept.append((checkpoint, path, sums(checkpoint)))

    def unchanged(self) -> bool:
        return bool(self.kept) and all(sums(checkpoint) == before for checkpoint, _, before in self.kept)


def sums(tree: Any) -> list[float]:
    """Return two sums for each tensor in a checkpoint."""
    if isinstance(tree, Tensor):
        return [float(tree.double().sum()), float(tree.double().square().sum())]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [number for part in parts for number in sums(part)]


@case
def states_beside(out: Path) -> dict[str, Any]:
    """Save workers' optimizer states beside the checkpoints that Lightning's callback saves and removes."""
    keep = ModelCheckpoint(
        out / "beside", save_last=True, save_top_k=2, monitor="step", mode="max", every_n_train_steps=6
    )
    strategy = AsyncLocalSGDStrategy(local_steps=4, exchange=ExchangeOptions(start_timeout=60.0), checkpoint_every=2)
    trainer = trainer_of(out / "beside", Watch(), keep, strategy=strategy, plugins=[AsyncCheckpointIO()], max_steps=60)
    trainer.fit(Module(), loader())
    return {"rank": trainer.global_rank}


@case
def written_later(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("own", "async"):
        late = DelayedCheckpointIO()
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
    trainer.fit(second, loader(), ckpt_path=out / "adapters.ckpt", **WEIGHTS_ONLY)
    final = copied(first)
    counted = "net.1.num_batches_tracked"  # Neither exchanged nor saved by this module.
    return {
        "rank": trainer.global_rank,
        "same_start": all(torch.equal(final[name], watch.start[name]) for name in final if name != counted),
        "start": counters(watch.server) if watch.server else None,
    }


def averaged(out: Path) -> dict[str, Any]:
    keep = ModelCheckpoint(out / "averaged", save_last=True, every_n_train_steps=4)
    trainer = trainer_of(out, EMAWeightAveraging(decay=0.9), keep, Watch())
    trainer.fit(Module(), loader())
    ema = EMAWeightAveraging(decay=0.9)
    trainer = trainer_of(out, ema, watch := Watch(), max_steps=24)
    trainer.fit(Module(), loader(), ckpt_path=out / "averaged" / "last.ckpt", **WEIGHTS_ONLY)
    saved = torch.load(out / "averaged" / "last.ckpt", weights_only=True)
    return {
        "rank": trainer.global_rank,
        "same_start": same_tensors(watch.start, saved["current_model_state"]),
        "start": counters(watch.server) if watch.server else None,
        "updates": int(ema._average_model.n_averaged),
    }


if EMAWeightAveraging is not None:
    case(averaged)


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
