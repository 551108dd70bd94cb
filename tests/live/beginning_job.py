"""A run with a synchronous beginning: ``python beginning_job.py OUT JSON``, with options of the run.

Each rank trains on its own samples, notes its weights and the state of Adam after each optimizer step of the beginning,
and writes its notes to ``OUT/rank_<n>.pt``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_async_localsgd import AsyncLocalSGDCallback, AsyncLocalSGDStrategy, ExchangeOptions, MergeOptions
from lightning_async_localsgd.faults import Fault, FaultInjection, FaultKind
from tests.lightning_models import Regression, cosine, network, quiet_trainer

RANKS = 2
BATCH = 8
SAMPLES = 640
CLIP = 0.05


def seeded_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return network(8)


def sample(rank: int, index: int) -> Tensor:
    return torch.randn(8, generator=torch.Generator().manual_seed(1000 * rank + index))


def loss_of(net: nn.Module, inputs: Tensor) -> Tensor:
    return (net(inputs) - inputs[:, :1] * inputs[:, 1:2]).square().mean()


class OwnSamples(Dataset[Tensor]):
    """The samples of one rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        return sample(self.rank, index)


class Product(Regression):
    """Learns the product of two of its inputs, with a schedule that falls at each step."""

    def loss(self, batch: Tensor) -> Tensor:
        return loss_of(self.net, batch)


class Notes(L.Callback):
    """Notes what each optimizer step has led to, and what rank 0 validates."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []
        self.rates: list[float] = []
        self.steps: list[int] = []
        self.taken = 0
        self.synchronous = False
        self.validated: list[Any] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.synchronous = trainer.strategy.runtime.worker.synchronous

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        optimizer = trainer.optimizers[0]
        step = int(max((state["step"] for state in optimizer.state.values()), default=0))
        if step > self.taken:
            self.taken = step
            weights = {name: value.clone() for name, value in pl_module.net.state_dict().items()}
            adam = [{key: value.clone() for key, value in state.items()} for state in optimizer.state.values()]
            self.states.append({"weights": weights, "adam": adam, "synchronous": self.synchronous})
            self.steps.append(trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validated.append({name: value.clone() for name, value in pl_module.net.state_dict().items()})


def main(out: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    exchange = {"start_timeout": 60.0, **options.get("exchange", {})}
    strategy = AsyncLocalSGDStrategy(
        local_steps=5,
        exchange=ExchangeOptions(**exchange),
        merge=MergeOptions(**options.get("merge", {})),
        **{"checkpoint_every": None, **options["strategy"]},
    )
    notes = Notes()
    callbacks: list[L.Callback] = [notes, AsyncLocalSGDCallback(events=out / "events.jsonl", max_event_megabytes=None)]
    if "faults" in options:
        callbacks.append(
            FaultInjection([Fault(**{**fault, "kind": FaultKind[fault["kind"]]}) for fault in options["faults"]])
        )
    if options.get("save"):
        callbacks.append(
            ModelCheckpoint(dirpath=out, filename="{step}", every_n_train_steps=options["save"], save_top_k=-1)
        )
    own = options.get("own", True)
    trainer = quiet_trainer(
        strategy,
        devices=options.get("ranks", RANKS),
        use_distributed_sampler=not own,
        gradient_clip_val=CLIP,
        callbacks=callbacks,
        default_root_dir=out,
        num_sanity_val_steps=0,
        **options["trainer"],
    )
    rank = trainer.global_rank
    module = Product(seeded_network(rank), torch.optim.AdamW, 1e-2, cosine)
    train = DataLoader(OwnSamples(rank if own else 0), batch_size=BATCH)
    valid = DataLoader(OwnSamples(7), batch_size=SAMPLES)
    trainer.fit(module, train, valid, ckpt_path=options.get("ckpt_path"))
    torch.save(
        {
            "states": notes.states,
            "rates": notes.rates,
            "steps": notes.steps,
            "validated": notes.validated,
            "final": module.net.state_dict(),
            "global_step": trainer.global_step,
        },
        out / f"rank_{rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
