"""Cases of the modules job in which modules and optimizers move tensors beside the trained parameters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from tests.lightning_contract.modules_base import STEPS, Module, SharedNames, case, fit
from tests.lightning_models import ScheduleFree, digest, loader


class Taught(Module):
    """A student with a frozen teacher that follows it, and a frozen backbone. Compares them in validations."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.backbone = nn.Linear(8, 8).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(4))
        self.validated: list[bool] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        for mine, followed in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            mine.data = 0.8 * mine.data + 0.2 * followed.data
        self.queue[self.trainer.global_step % 4] = float(self.global_rank + 1)
        return super().training_step(batch, index)

    def validation_step(self, batch: Any, index: int) -> None:
        runtime = getattr(self.trainer.strategy, "runtime", None)
        values = {} if runtime is None else runtime.server.shared_values()
        if values:
            frozen = runtime.worker.shared.frozen
            self.validated.append(not frozen.differing(values, torch.cat(list(values.values()))))


@case
def teacher(out: Path) -> dict[str, Any]:
    module = Taught()
    first = copy.deepcopy(module.state_dict())
    saved = ModelCheckpoint(dirpath=out / "teacher", every_n_train_steps=STEPS)
    watch = SharedNames()
    seen = fit(module, out, watch, saved, limit_val_batches=1, val_check_interval=3)
    last = module.state_dict()
    in_file = last if watch.runs_elsewhere else torch.load(saved.best_model_path, weights_only=True)["state_dict"]
    return {
        **seen, "shared": watch.names, "validated": module.validated,
        "teacher": digest(dict(module.teacher.named_parameters())),
        "moved": not torch.equal(first["teacher.0.weight"], last["teacher.0.weight"]),
        "saved": digest(in_file) == digest(last),
    }  # fmt: skip


class Remembering(Module):
    """Fills an empty memory bank with what it sees, from its third batch on, and fits a statistic at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.empty(0))
        self.register_buffer("ids", torch.empty(0, dtype=torch.int64))
        self.register_buffer("fitted", None)

    def training_step(self, batch: Any, index: int) -> Tensor:
        if index > 1:
            self.bank = torch.cat([self.bank.reshape(-1, 8), batch[0].detach()])
            self.ids = torch.arange(len(self.bank))
        return super().training_step(batch, index)

    def on_train_end(self) -> None:
        self.fitted = self.bank.mean(0) if len(self.bank) else torch.zeros(8)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in self._buffers.keys() & checkpoint["state_dict"].keys():
            setattr(self, name, torch.empty_like(checkpoint["state_dict"][name]))


@case
def memory_bank(out: Path) -> dict[str, Any]:
    module = Remembering()
    saved = ModelCheckpoint(dirpath=out / "bank", every_n_train_steps=6, save_top_k=-1)
    options = {"limit_val_batches": 1, "val_check_interval": 5, "strategy": {"checkpoint_every": 2}}
    seen = fit(module, out, saved, **options)
    bank = module.bank
    if seen["rank"] == 0:
        in_file = torch.load(sorted((out / "bank").glob("*.ckpt"))[-1], weights_only=True)["state_dict"]["bank"]
        seen["saved"] = torch.equal(in_file, bank[: len(in_file)]) and len(in_file) > 0
        seen["periodic"] = len(list(out.glob("**/rounds=*.ckpt")))
    return {**seen, "rows": len(bank), "fitted": digest({"fitted": module.fitted})}


class ScheduleFreeModule(Module):
    """Trains without a schedule, and switches its optimizer around validations as the optimizer asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.validated: list[bool] = []

    def on_train_epoch_start(self) -> None:
        self.optimizers().optimizer.train()

    def on_validation_epoch_start(self) -> None:
        self.optimizers().optimizer.eval()

    def on_validation_epoch_end(self) -> None:
        self.optimizers().optimizer.train()

    def on_train_end(self) -> None:
        self.optimizers().optimizer.eval()

    def validation_step(self, batch: Any, index: int) -> None:
        runtime = getattr(self.trainer.strategy, "runtime", None)
        if runtime is not None:
            theta = torch.empty(runtime.binding.layout.numel)
            # Another rank may have pushed since the model was loaded.
            if runtime.server.copy_model(theta) == runtime._shown_version:
                self.validated.append(not runtime.binding.changed_from(theta))

    def configure_optimizers(self) -> Any:
        return ScheduleFree(self.parameters(), lr=0.2)


@case
def schedule_free(out: Path) -> dict[str, Any]:
    module = ScheduleFreeModule()
    everything = next(iter(loader(1024, batch_size=1024, shuffle=False)))
    before = float(module.loss(everything))
    options = {"limit_val_batches": 1, "val_check_interval": 20, "max_steps": 100, "strategy": {"local_steps": 7}}
    seen = fit(module, out, data=loader(1024), **options)
    return {**seen, "before": before, "after": float(module.loss(everything)), "validated": module.validated}
