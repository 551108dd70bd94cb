"""Small fits of many kinds of modules, one after the other: ``python modules_job.py OUT``.

Two ranks of unequal speed run every case below; each notes what it saw in ``OUT/rank_<n>.json``, by case. They are in
one script because a start of processes costs more than all the fits.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BaseFinetuning, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_async_localsgd import AsyncLocalSGDCallback, AsyncLocalSGDStrategy

SECONDS = (0.001, 0.006)
"""What a step takes longer, by rank."""

STEPS = 12
"""``max_steps`` of a case: local steps of each of the two ranks, on average."""

CASES: dict[str, Callable[[Path], dict[str, Any]]] = {}


def case(function: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    """Adds a case under the function's name."""
    CASES[function.__name__] = function
    return function


def digest(tensors: dict[str, Tensor]) -> str:
    """Of every bit of some tensors."""
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + data.numpy().tobytes())
    return state.hexdigest()


class Module(L.LightningModule):
    """A regression with a small network of any kind in ``net``."""

    def __init__(self, net: nn.Module | None = None, lr: float = 0.05) -> None:
        super().__init__()
        self.lr = lr
        self.net = net if net is not None else nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.net(inputs.to(self.dtype)), targets.to(self.dtype))

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)


class Watch(L.Callback):
    """Slows this rank down, and notes what it does and where it ends."""

    def __init__(self) -> None:
        self.steps = 0
        self.seen: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        torch_optimizer = trainer.optimizers[0]
        torch_optimizer.register_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.steps += 1

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.strategy.phase is not None and "exchanged" not in self.seen:
            self.seen["exchanged"] = [entry.name for entry in trainer.strategy.phase.binding.layout.entries]
        time.sleep(SECONDS[trainer.global_rank])

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        state = module.state_dict()
        self.seen |= {
            "steps": self.steps,
            "digest": digest(state),
            "finite": all(bool(torch.isfinite(t).all()) for t in state.values() if t.is_floating_point()),
        }


def loader(samples: int = 256, batch_size: int = 8, shuffle: bool = True) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, 8, generator=generator)
    targets = (inputs[:, :1] * inputs[:, 1:2]).tanh() + 0.5 * inputs[:, 2:3]
    return DataLoader(TensorDataset(inputs, targets), batch_size=batch_size, shuffle=shuffle)


def trainer_of(
    out: Path, callbacks: list[L.Callback], strategy: dict[str, Any] | None = None, **options: Any
) -> L.Trainer:
    """A quiet trainer of two ranks."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        quiet["enable_checkpointing"] = False
    limits = {"max_steps": STEPS, "limit_val_batches": 0, "default_root_dir": out}
    return L.Trainer(
        strategy=AsyncLocalSGDStrategy(**{"local_steps": 4, "start_timeout": 60.0, **(strategy or {})}),
        accelerator="cpu",
        devices=2,
        callbacks=[*callbacks, AsyncLocalSGDCallback(table=False)],
        **{**quiet, **limits, **options},
    )


def fit(module: Any, out: Path, *callbacks: L.Callback, data: Any = None, **options: Any) -> dict[str, Any]:
    """Trains ``module`` and returns what was noted."""
    watch = Watch()
    trainer = trainer_of(out, [watch, *callbacks], **options)
    trainer.fit(module, data if data is not None else loader(), loader(32, shuffle=False))
    return {"rank": trainer.global_rank, **watch.seen}


def rank() -> int:
    """This rank, before a trainer knows it."""
    import os

    return int(os.environ.get("LOCAL_RANK", "0"))


# ----------------------------------------------------------------------- what is exchanged


class Adapted(nn.Module):
    """A frozen layer with a small trainable one beside it, and tensors of every kind that isn't trained."""

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
    torch.manual_seed(100 + rank())  # So that the frozen parts differ between ranks.
    net = Adapted()
    first = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    scratch = net.scratch.clone()
    seen = fit(Module(net), out)
    frozen = ("base.weight", "base.bias", "coarse", "codes", "table")
    last = net.state_dict()
    return {
        **seen,
        "frozen_before": digest({name: first[name] for name in frozen}),
        "frozen_after": digest({name: last[name] for name in frozen}),
        "adapter_moved": not torch.equal(first["up.weight"], last["up.weight"]),
        "scratch_kept": torch.equal(scratch, net.scratch),
    }


class Tied(nn.Module):
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


class Late(Module):
    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            torch.manual_seed(100 + rank())
            self.net = nn.Linear(8, 1)


@case
def configure_model(out: Path) -> dict[str, Any]:
    return fit(Late(), out)


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
    """Every fourth loss overflows, so that the scaler skips its step."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(batch) * (float("inf") if index % 4 == 2 else 1.0)


class Batches(L.Callback):
    def __init__(self) -> None:
        self.taken = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.taken += 1


@case
def scaled(out: Path) -> dict[str, Any]:
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    batches = Batches()
    seen = fit(Overflowing(), out, batches, plugins=[plugin])
    return {**seen, "batches": batches.taken}


# ---------------------------------------------------------------------------- optimization


class Adversarial(L.LightningModule):
    """Two players, each with its own optimizer and frozen while the other one moves."""

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
    def __init__(self, history: int = 5) -> None:
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
    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []
        self.values: list[float] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        return 100 * self.loss(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        optimizer.register_step_post_hook(self._look)  # The closure has run by then.
        return optimizer

    def _look(self, *_: Any) -> None:
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


HOOKS = [name for name in dir(L.LightningModule) if name.startswith("on_")] + [
    "optimizer_step", "optimizer_zero_grad", "backward", "configure_gradient_clipping", "lr_scheduler_step",
    "transfer_batch_to_device", "training_step", "configure_optimizers", "configure_callbacks", "setup", "teardown",
]  # fmt: skip


def recording(calls: list[str]) -> tuple[L.LightningModule, L.Callback]:
    """A module and a callback that note in which order their hooks are called."""

    def noting(base: type, prefix: str, names: list[str]) -> type:
        def hook(name: str) -> Callable[..., Any]:
            def call(self: Any, *arguments: Any, **named: Any) -> Any:
                calls.append(f"{prefix}.{name}")
                return getattr(super(made, self), name)(*arguments, **named)

            return call

        made = type(f"Noting{base.__name__}", (base,), {name: hook(name) for name in names})
        return made

    class Scheduled(Module):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    names = [name for name in dir(L.Callback) if name.startswith("on_")] + ["setup", "teardown"]
    return noting(Scheduled, "module", HOOKS)(), noting(L.Callback, "callback", names)()


def hooks_of_a_step(calls: list[str]) -> list[str]:
    """Of the third batch of training, from its first hook to its last."""
    starts = [index for index, name in enumerate(calls) if name == "callback.on_train_batch_start"]
    return calls[starts[2] : starts[3]]


def hooks_around(calls: list[str]) -> list[str]:
    """All but those of steps, each once."""
    steps = set(hooks_of_a_step(calls))
    return [name for name in dict.fromkeys(calls) if name not in steps]


@case
def hooks(out: Path) -> dict[str, Any]:
    calls: list[str] = []
    module, callback = recording(calls)
    seen = fit(module, out, callback)
    return {**seen, "step": hooks_of_a_step(calls), "around": hooks_around(calls)}


class Ema(EMAWeightAveraging):
    """Notes the average in the midst of a round in which nobody has handed in anything."""

    def __init__(self) -> None:
        super().__init__(decay=0.5)
        self.early: str | None = None
        self.average: str | None = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *arguments)
        if trainer.strategy.phase.server.view.version == 0:
            self.early = digest(dict(self._average_model.module.named_parameters()))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.average = digest(self._average_model.module.state_dict())
        super().on_train_end(trainer, pl_module)


@case
def averaged(out: Path) -> dict[str, Any]:
    module = Module(nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 1)))
    start = digest(dict(module.named_parameters()))
    ema = Ema()
    saved = ModelCheckpoint(dirpath=out / "averaged", save_last=True, every_n_train_steps=4)
    seen = fit(module, out, ema, saved, strategy={"local_steps": 6}, limit_val_batches=2, val_check_interval=6)
    return {
        **seen, "start": start, "early": ema.early, "average": ema.average,
        "updates": int(ema._average_model.n_averaged), "at_end": digest(module.state_dict()),
    }  # fmt: skip


class Rates(L.Callback):
    """The learning rate in every epoch of this rank."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@case
def averaged_by_epochs(out: Path) -> dict[str, Any]:
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=2, annealing_strategy="linear")
    rates = Rates()
    module = Module(nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1)))
    seen = fit(module, out, swa, rates, max_steps=-1, max_epochs=4, data=loader(128))
    average = digest(dict(swa._average_model.named_parameters()))
    return {
        **seen, "rates": rates.seen, "averages": int(swa.n_averaged), "average": average,
        "at_end": digest(dict(module.named_parameters())), "statistics": digest(dict(module.named_buffers())),
        "averaged_statistics": digest(dict(swa._average_model.named_buffers())),
    }  # fmt: skip


class Shown(L.Callback):
    """What rank 0's module holds before, in and after a validation."""

    def __init__(self) -> None:
        self.states: list[tuple[str, str]] = []

    def _note(self, what: str, module: L.LightningModule) -> None:
        self.states.append((what, digest(module.state_dict())))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.strategy.phase is not None:
            self._note("before", pl_module)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.strategy.phase is not None:
            self._note("shown", pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._note("after", pl_module)


@case
def validated_in_mid_round(out: Path) -> dict[str, Any]:
    shown = Shown()
    options = {"limit_val_batches": 2, "val_check_interval": 2, "num_sanity_val_steps": 0}
    seen = fit(Module(), out, shown, strategy={"local_steps": 5, "grace": 0.0}, **options)
    return {**seen, "states": shown.states}


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
