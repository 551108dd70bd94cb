"""A run that is logged and replayed: ``python replay_job.py live|replay OUT JSON``.

``live`` runs three ranks of unequal speed and writes ``OUT/events.jsonl``. ``replay`` replays this file in one process.
Both write the digest of the final model to ``OUT/live`` or ``OUT/replay``. The JSON has options of the trainer and of
the strategy. If an option of the strategy is an object, the JSON has the object's arguments.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_async_localsgd import (
    AsyncLocalSGDCallback,
    AsyncLocalSGDStrategy,
    EmulatedDevices,
    ExchangeOptions,
    MergeOptions,
    SimulatedAsyncLocalSGDStrategy,
)
from lightning_async_localsgd.staleness import Polynomial
from tests.lightning_models import Regression, cosine, digest, loader, network, quiet_trainer

RANKS = 3

OBJECTS = {"staleness": Polynomial, "merge": MergeOptions}


def main(kind: str, out: Path, options: dict[str, Any]) -> None:
    L.seed_everything(3, verbose=False)
    torch.set_num_threads(1)
    given = options.get("strategy", {})
    policies = {name: OBJECTS[name](**value) if name in OBJECTS else value for name, value in given.items()}
    policies = {"local_steps": 6, **policies}
    events = out / "events.jsonl"
    if kind == "live":
        given = {name: policies.pop(name) for name in ("overlap", "upload", "download") if name in policies}
        strategy = AsyncLocalSGDStrategy(exchange=ExchangeOptions(**given), **policies)
        callbacks = [EmulatedDevices([0.01, 0.015, 0.04]), AsyncLocalSGDCallback(table=False, recording=events)]
    else:
        strategy = SimulatedAsyncLocalSGDStrategy(replay=events, **policies)
        callbacks = [AsyncLocalSGDCallback(table=False)]
    trainer = quiet_trainer(
        strategy,
        devices=RANKS if kind == "live" else 1,
        callbacks=callbacks,
        default_root_dir=out,
        gradient_clip_val=1.0,
        **{"max_steps": 40, **options.get("trainer", {})},
    )
    module = Regression(network(32, batch_norm=True), torch.optim.AdamW, 1e-2, cosine)
    trainer.fit(module, loader(480), loader(64, shuffle=False))
    if trainer.is_global_zero:
        state = {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
        (out / kind).write_text(digest(state))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
