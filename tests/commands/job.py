"""Trains two or more emulated devices for the tests of the commands: ``python job.py OUT OPTIONS``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_async_localsgd import AsyncLocalSGDStrategy, EmulatedDevices, ExchangeOptions
from tests.lightning_models import Regression, loader, network, quiet_trainer


class StopFile(L.Callback):
    """Ends training when the file ``stop`` exists."""

    def __init__(self, out: Path) -> None:
        self.path = out / "stop"

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or self.path.exists()


def main(out: Path, options: dict[str, Any]) -> None:
    """Train.

    Args:
        out: folder of the logs.
        options: ``seconds_per_step``, ``port``, ``strategy`` and ``trainer``.

    """
    seconds = options["seconds_per_step"]
    exchange = ExchangeOptions(port=options.get("port", 0), **options.get("exchange", {}))
    strategy = AsyncLocalSGDStrategy(exchange=exchange, checkpoint_every=None, **options.get("strategy", {}))
    trainer = quiet_trainer(
        strategy,
        devices=len(seconds),
        logger=CSVLogger(out),
        log_every_n_steps=5,
        default_root_dir=out,
        callbacks=[EmulatedDevices(seconds), StopFile(out)],
        **options.get("trainer", {}),
    )
    trainer.fit(Regression(network(), torch.optim.SGD, 1e-3), loader(512))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
