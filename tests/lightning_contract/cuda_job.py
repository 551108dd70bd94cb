"""Two ranks of unequal speed on CUDA devices: ``python cuda_job.py OUT JSON``.

Each rank writes what it noted to ``OUT/rank_<n>.json``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_async_localsgd import AsyncLocalSGDStrategy
from tests.lightning_models import digest, quiet_trainer


class Module(BoringModel):
    """Gives ranks unequal speeds, and notes steps, devices and the final model."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self.out = out
        self.seen: dict[str, Any] = {"steps": 0}

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen["steps"] += 1
        self.seen["device"] = str(self.layer.weight.device)
        time.sleep((0.01, 0.04)[self.global_rank])

    def on_fit_end(self) -> None:
        self.seen["digest"] = digest(self.state_dict())
        self.write()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["backend"] = torch.distributed.get_backend()
        self.log("rank", torch.tensor(float(self.global_rank), device=self.device), sync_dist=True)

    def on_test_end(self) -> None:
        # With "spawn", this is another process than that of fit, whose notes are in the file.
        before = json.loads((self.out / f"rank_{self.global_rank}.json").read_text())
        self.seen = {**before, **self.seen, "steps": before["steps"]}
        self.seen["metric"] = float(self.trainer.callback_metrics["rank"])
        self.write()

    def write(self) -> None:
        (self.out / f"rank_{self.global_rank}.json").write_text(json.dumps(self.seen))


def main(out: Path, options: dict[str, Any]) -> None:
    strategy = AsyncLocalSGDStrategy(
        local_steps=10,
        parallel_devices=[torch.device("cuda", 0)] * 2 if options.get("share") else None,
        process_group_backend=options.get("backend"),
        start_method=options.get("start_method", "popen"),
    )
    devices = 1 if options.get("share") else 2
    trainer = quiet_trainer(
        strategy, accelerator="gpu", devices=devices, max_steps=50, max_epochs=-1, default_root_dir=out
    )
    module = Module(out)
    trainer.fit(module)
    trainer.test(module, verbose=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
