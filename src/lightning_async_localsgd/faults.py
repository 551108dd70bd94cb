"""Rehearsals: faults at chosen moments of a run, to see what they cost in one's own set-up.

docs/faults.md says who may die, and what happens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_async_localsgd.injection import MOMENTS, Fault, FaultKind, Injector, Moment
from lightning_async_localsgd.joining import rejoining
from lightning_async_localsgd.run_folder import goes_on

if TYPE_CHECKING:
    from lightning_async_localsgd.training import AsyncTraining

__all__ = ["MOMENTS", "Fault", "FaultInjection", "FaultKind", "Moment"]


class FaultInjection(pl.Callback):
    """Injects faults into a run with ``strategy="async_localsgd"``.

    Every rank is given the same list, and looks for its own faults in it. Each fault comes once, and is logged as a
    warning when it does; those that have found no occasion by the end of training are named in a warning.

    Args:
        faults: what is to fail, and when.

    Raises:
        ValueError: there are none; or, when the fit begins: the strategy is another one, or a fault can never come.

    Example::

        import lightning as L
        from lightning_async_localsgd.faults import Fault, FaultInjection, FaultKind

        rehearsal = FaultInjection(
            [
                Fault(FaultKind.KILL, worker=1, round=3, moment="mid-push"),
                Fault(FaultKind.STOP, worker=2, round=2, seconds=20.0),
            ]
        )
        trainer = L.Trainer(strategy="async_localsgd", devices=4, max_steps=1000, callbacks=[rehearsal])

    """

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__()
        given: object = faults
        if not isinstance(given, (list, tuple)) or not all(isinstance(fault, Fault) for fault in given):
            raise ValueError(f"faults={faults!r} must be a list of Fault objects")
        if not faults:
            raise ValueError("faults=[] is empty: name at least one Fault, or leave FaultInjection out")
        self.faults = list(faults)
        self._training: AsyncTraining | None = None
        self._injector: Injector | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not hasattr(trainer.strategy, "training"):
            raise ValueError(
                f"FaultInjection knows the moments of strategy='async_localsgd' only, this is a "
                f"{type(trainer.strategy).__name__}; leave the callback out"
            )
        for fault in self.faults:
            if fault.worker > 0 and trainer.world_size == 1:
                raise ValueError(f"{fault} can never come: there is one rank, worker 0; use devices=2 or more")
            if fault.moment == "saving" and trainer.strategy.checkpoint_every is None:  # type: ignore[attr-defined]
                raise ValueError(
                    f"{fault} can never come: with checkpoint_every=None nothing is saved by the strategy; set it to "
                    "a number of rounds"
                )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # The asynchronous phase begins after `on_train_start`.
        training: AsyncTraining | None = trainer.strategy.training  # type: ignore[attr-defined]
        if training is not self._training:
            self._release()
            self._training = training
            if training is not None:
                worker = training.phase.worker
                mine = [fault for fault in self.faults if (fault.worker, fault.life) == (worker.number, life_number())]
                self._injector = Injector(mine, worker) if mine else None
        if self._injector is not None:
            self._injector.before_batch()

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        injector = self._injector
        if injector is not None and injector.in_mid_round:
            injector.at("computing")
            if injector.take(FaultKind.NAN, "computing"):
                _spoil(pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._injector is not None:
            for fault in self._injector.open:
                rank_zero_warn(f"never injected, because its moment did not come: {fault}")
        self._release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self._injector is not None:
            self._injector.release()
        self._injector = self._training = None


def life_number() -> int:
    """How often this process's worker has been started again, by the launcher or with the whole job."""
    return int(rejoining().get("life", 0)) or int(goes_on())


def _spoil(module: torch.nn.Module) -> None:
    """A weight becomes NaN."""
    weight = next(weight for weight in module.parameters() if weight.requires_grad and weight.is_floating_point())
    with torch.no_grad():
        weight.view(-1)[0] = torch.nan
