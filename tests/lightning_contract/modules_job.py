"""Short fits of many kinds of modules: ``python modules_job.py OUT [CASE...]``.

Two ranks of unequal speed run all cases one after the other, because starting processes takes longer than all fits.
Each rank writes what it noted to ``OUT/rank_<n>.json``, by case.
"""

from __future__ import annotations

import copy
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from tests.lightning_contract.hook_order import hooks_around, hooks_of_a_step, recording
from tests.lightning_contract.modules_base import CASES, STEPS, Module, SharedNames, case, fit, rank
from tests.lightning_contract.modules_moving import Remembering
from tests.lightning_models import EMAWeightAveraging, Pace, digest, loader, network

# ----------------------------------------------------------------------- what is exchanged


class Adapted(nn.Module):
    """A frozen layer with a trainable adapter, and untrained tensors of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 16).requires_grad_(False)
        self.coarse = nn.Parameter(torch.randn(16).bfloat16(), requires_grad=False)
        self.codes = nn.Parameter(torch.randint(-9, 9, (16,), dtype=torch.int8), requires_grad=False)
        self.down = nn.Linear(8, 2, bias=False)
        self.up = nn.Linear(2, 16, bias=False)
        self.head = nn.Linear(16, 1)
        self.register_buffer("table", torch.randint(0, 9, (5,)))
        self.register_buffer("scratch", torch.randn(3), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.base(inputs) + self.coarse.float() + self.codes.float() / 99 + self.up(self.down(inputs))
        return self.head(hidden.tanh())


@case
def adapters(out: Path) -> dict[str, Any]:
    torch.manual_seed(100 + rank())  # The frozen parts differ between ranks.
    net = Adapted()
    first = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    scratch = net.scratch.clone()
    shared = SharedNames()
    seen = fit(Module(net), out, shared)
    frozen = ("base.weight", "base.bias", "coarse", "codes", "table")
    last = net.state_dict()
    return {
        **seen,
        "shared": shared.names,
        "frozen_before": digest({name: first[name] for name in frozen}),
        "frozen_after": digest({name: last[name] for name in frozen}),
        "adapter_moved": not torch.equal(first["up.weight"], last["up.weight"]),
        "scratch_kept": torch.equal(scratch, net.scratch),
    }


class Tied(nn.Module):
    """A network with a tied and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 1)
        self.unused = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.second(self.first(inputs).tanh()).tanh())


@case
def tied_and_unused(out: Path) -> dict[str, Any]:
    torch.manual_seed(100 + rank())
    net = Tied()
    unused = net.unused.weight.detach().clone()
    seen = fit(Module(net), out)
    return {
        **seen,
        "still_tied": net.second.weight is net.first.weight,
        "unused_before": digest({"": unused}),
        "unused_after": digest({"": net.unused.weight}),
    }


class Unfreeze(BaseFinetuning):
    """Trains the first layer from the second epoch on."""

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.05)


@case
def finetuning(out: Path) -> dict[str, Any]:
    module = Module()
    before = digest(module.net[0].state_dict())
    seen = fit(module, out, Unfreeze(), max_steps=-1, max_epochs=3, data=loader(128))
    return {**seen, "backbone_moved": digest(module.net[0].state_dict()) != before}


class Mixed(nn.Module):
    """A network with parameters of several dtypes, and with statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.scale = nn.Parameter(torch.ones(16, dtype=torch.bfloat16))
        self.order = nn.Parameter(torch.randperm(16), requires_grad=False)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.norm(self.first(inputs)[:, self.order] * self.scale.float()).tanh())


@case
def dtypes_and_buffers(out: Path) -> dict[str, Any]:
    torch.manual_seed(100 + rank())
    net = Mixed()
    order = net.order.clone()
    seen = fit(Module(net), out)
    return {
        **seen,
        "order_before": order.tolist(),
        "order_after": net.order.tolist(),
        "batches": int(net.norm.num_batches_tracked),
        "variance": float(net.norm.running_var.min()),
        "scale": str(net.scale.dtype),
    }


@case
def channels_last(out: Path) -> dict[str, Any]:
    net = nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 4, 2), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4, 1)
    ).to(memory_format=torch.channels_last)
    strides = net[1].weight.stride()
    return {**fit(Module(net), out), "kept": net[1].weight.stride() == strides != (8, 4, 2, 1)}


class ConfiguredLate(Module):
    """Makes its network in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            torch.manual_seed(100 + rank())
            self.net = nn.Linear(8, 1)


@case
def configure_model(out: Path) -> dict[str, Any]:
    return fit(ConfiguredLate(), out)


# ------------------------------------------------------------------------------- precision


def precision(name: str) -> Callable[[Path], dict[str, Any]]:
    def run(out: Path) -> dict[str, Any]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            seen = fit(module := Module(), out, precision=name)
        texts = [str(warning.message) for warning in caught]
        return {**seen, "dtype": str(module.dtype), "warned": [text for text in texts if "fp64" in text]}

    return run


for name in ("32-true", "bf16-mixed", "bf16-true", "16-true", "64-true"):
    CASES[name] = precision(name)


class Overflowing(Module):
    """A module whose loss overflows in every fourth batch, so that the scaler skips the step."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(batch) * (float("inf") if index % 4 == 2 else 1.0)


@case
def scaled(out: Path) -> dict[str, Any]:
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    pace = Pace([0.0])
    seen = fit(Overflowing(), out, pace, plugins=[plugin])
    return {**seen, "batches": pace.batches}


# ---------------------------------------------------------------------------- optimization


class Adversarial(L.LightningModule):
    """A generator and a discriminator, each with its own optimizer and frozen during the other's steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Linear(4, 8)
        self.discriminator = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: Any, index: int) -> None:
        real = batch[0]
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        fake = self.generator(torch.randn(len(real), 4))
        self.manual_backward(nn.functional.softplus(-self.discriminator(fake)).mean())
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        fake = self.generator(torch.randn(len(real), 4)).detach()
        loss = nn.functional.softplus(-self.discriminator(real)) + nn.functional.softplus(self.discriminator(fake))
        self.manual_backward(loss.mean())
        second.step()
        second.zero_grad()
        self.untoggle_optimizer(second)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.generator.parameters(), 0.01), torch.optim.Adam(self.discriminator.parameters())]


@case
def adversarial(out: Path) -> dict[str, Any]:
    module = Adversarial()
    # Lightning counts the steps of both optimizers.
    seen = fit(module, out, max_steps=2 * STEPS)
    return {**seen, "trainable": all(parameter.requires_grad for parameter in module.parameters())}


class Closures(Module):
    """A linear regression trained by L-BFGS, which evaluates the loss several times in a step."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 1))
        self.calls = 0

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.calls += 1
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")


@case
def lbfgs(out: Path) -> dict[str, Any]:
    module = Closures()
    everything = next(iter(loader(256, batch_size=256, shuffle=False)))
    before = float(module.loss(everything))
    seen = fit(module, out)
    return {**seen, "calls": module.calls, "before": before, "after": float(module.loss(everything))}


class Clipped(Module):
    """Records the norm and the largest value of each clipped gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []
        self.values: list[float] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        return 100 * self.loss(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        optimizer.register_step_post_hook(self._record)  # By then, the closure has run and the gradient is clipped.
        return optimizer

    def _record(self, *_: Any) -> None:
        gradient = torch.cat([parameter.grad.reshape(-1) for parameter in self.parameters()])
        self.norms.append(float(gradient.norm()))
        self.values.append(float(gradient.abs().max()))


@case
def clipped_by_norm(out: Path) -> dict[str, Any]:
    module = Clipped()
    seen = fit(module, out, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
    return {**seen, "norm": max(module.norms)}


@case
def clipped_by_value(out: Path) -> dict[str, Any]:
    module = Clipped()
    seen = fit(module, out, gradient_clip_val=0.25, gradient_clip_algorithm="value")
    return {**seen, "value": max(module.values)}


@case
def compiled(out: Path) -> dict[str, Any]:
    module = Module()
    seen = fit(torch.compile(module, backend="eager"), out)
    return {**seen, "keys": sorted(module.state_dict())}


@case
def compiled_part(out: Path) -> dict[str, Any]:
    module = Module()
    module.net = torch.compile(module.net, backend="aot_eager")
    return fit(module, out)


# ------------------------------------------------------------------- hooks and averages


@case
def hooks(out: Path) -> dict[str, Any]:
    calls: list[str] = []
    module, callback = recording(calls)
    seen = fit(module, out, callback)
    return {**seen, "step": hooks_of_a_step(calls), "around": hooks_around(calls)}


class Ema(EMAWeightAveraging or L.Callback):  # type: ignore[misc] # chosen by Lightning's release
    """Records the average before the first push of the run is merged, and at the end."""

    def __init__(self) -> None:
        super().__init__(decay=0.5)
        self.early: str | None = None
        self.average: str | None = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *arguments)
        if trainer.strategy.runtime.server.snapshot.version == 0:
            self.early = digest(dict(self._average_model.module.named_parameters()))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.average = digest(self._average_model.module.state_dict())
        super().on_train_end(trainer, pl_module)


def averaged(out: Path) -> dict[str, Any]:
    module = Module(nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 1)))
    start = digest(dict(module.named_parameters()))
    ema = Ema()
    saved = ModelCheckpoint(dirpath=out / "averaged", save_last=True, every_n_train_steps=4)
    options = {"limit_val_batches": 2, "val_check_interval": 6, "sync_batchnorm": True}
    seen = fit(module, out, ema, saved, strategy={"local_steps": 6}, **options)
    return {
        **seen, "start": start, "early": ema.early, "average": ema.average,
        "updates": int(ema._average_model.n_averaged), "at_end": digest(module.state_dict()),
    }  # fmt: skip


if EMAWeightAveraging is not None:
    case(averaged)


class Rates(L.Callback):
    """Records the learning rate at the end of each epoch of this rank."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@case
def averaged_by_epochs(out: Path) -> dict[str, Any]:
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=2, annealing_strategy="linear")
    rates = Rates()
    module = Module(network(batch_norm=True))
    seen = fit(module, out, swa, rates, max_steps=-1, max_epochs=4, data=loader(128))
    average = digest(dict(swa._average_model.named_parameters()))
    return {
        **seen, "rates": rates.seen, "averages": int(swa.n_averaged), "average": average,
        "at_end": digest(dict(module.named_parameters())), "statistics": digest(dict(module.named_buffers())),
        "averaged_statistics": digest(dict(swa._average_model.named_buffers())),
    }  # fmt: skip


class ValidatedStates(L.Callback):
    """Records the module's state before, in and after a validation, and the number of the rank's round."""

    def __init__(self) -> None:
        self.states: list[tuple[str, str, int]] = []

    def _record(self, moment: str, module: L.LightningModule) -> None:
        self.states.append((moment, digest(module.state_dict()), module.trainer.strategy.runtime.worker.round))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.strategy.runtime is not None:
            self._record("before", pl_module)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.strategy.runtime is not None:
            self._record("validated", pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._record("after", pl_module)


@case
def validated_within_a_round(out: Path) -> dict[str, Any]:
    recorder = ValidatedStates()
    # Each rank pushes several rounds between two validations, so that they do not end its round.
    options = {"max_steps": 80, "limit_val_batches": 2, "num_sanity_val_steps": 0}
    options |= {"val_check_interval": 20, "check_val_every_n_epoch": None}
    seen = fit(Module(), out, recorder, strategy={"local_steps": 6, "grace": 0.0}, **options)
    return {**seen, "states": recorder.states}


__all__ = ["CASES", "STEPS", "Closures", "Module", "Remembering"]


def main(out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    noted: dict[str, Any] = {}
    for name in names or CASES:
        L.seed_everything(3, verbose=False)
        began = time.monotonic()
        noted[name] = copy.deepcopy(CASES[name](out))
        noted[name]["seconds"] = time.monotonic() - began
        (out / f"rank_{noted[name]['rank']}.json").write_text(json.dumps(noted))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
