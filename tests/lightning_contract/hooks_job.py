"""Counts calls of Lightning's hooks: ``python hooks_job.py OUT STRATEGY``.

Two ranks fit, validate, test and predict. Each rank writes to ``OUT/rank_<n>.json`` how often each hook of module,
callback and data module was called in each stage.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from tests.lightning_models import close_ddp_group, quiet_trainer

OF_MODULES = {
    *("training_step", "validation_step", "test_step", "predict_step", "backward", "optimizer_step"),
    *("optimizer_zero_grad", "configure_gradient_clipping", "configure_optimizers", "configure_callbacks"),
}
NOT_COUNTED = {"configure_sharded_model", "lr_scheduler_step"}
"""Overriding the first is deprecated. Calls of the second follow the progress of the run, not that of a rank."""


def public(*classes: type) -> set[str]:
    """Return the names of all public hooks of some classes."""
    return {name for cls in classes for name in vars(cls) if not name.startswith("_")} - NOT_COUNTED


def counted(own: type, names: set[str], calls: Counter[str]) -> type:
    """Return a subclass that counts the calls of some methods."""

    def counting(name: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[f"{own.__name__}.{name}"] += 1
            return getattr(super(found, self), name)(*args, **kwargs)

        return method

    found: type = type(own.__name__, (own,), {name: counting(name) for name in names if callable(getattr(own, name))})
    return found


def main(out: Path, strategy: str) -> None:
    calls: Counter[str] = Counter()
    module = counted(BoringModel, public(ModelHooks, DataHooks, CheckpointHooks) | OF_MODULES, calls)()
    callback = counted(Callback, public(Callback) - {"state_key"}, calls)()
    data = counted(BoringDataModule, public(DataHooks) | {"state_dict"}, calls)()
    noted = {}
    for stage in ("fit", "validate", "test", "predict"):
        calls.clear()
        trainer = quiet_trainer(
            strategy,
            devices=2,
            max_epochs=2,
            limit_train_batches=8,
            limit_val_batches=3,
            limit_test_batches=3,
            limit_predict_batches=3,
            default_root_dir=out,
            callbacks=[callback, ModelCheckpoint()],
        )
        getattr(trainer, stage)(module, datamodule=data)
        noted[stage] = dict(calls)
    rank = trainer.global_rank
    (out / f"rank_{rank}.json").write_text(json.dumps(noted))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
    close_ddp_group()
