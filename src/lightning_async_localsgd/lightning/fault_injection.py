"""The callback that injects :mod:`.faults` into a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_async_localsgd.faults import Fault, FaultInjector, FaultKind
from lightning_async_localsgd.launch.joining import restart_count
from lightning_async_localsgd.launch.run_name import is_restarted
from lightning_async_localsgd.lightning.trainer_access.strategy import strategy_of

if TYPE_CHECKING:
    from lightning_async_localsgd.lightning.loop.controller import FitController


class FaultInjection(pl.Callback):
    """Inject faults into a run with ``strategy="async_localsgd"``.

    Every rank gets the same list and injects the faults of its own worker. Each fault is injected once, and logged as a
    warning. Faults whose moment did not come are named in a warning at the end of training.

    Args:
        faults: the faults, with their moments.

    Raises:
        ValueError: The list is empty. When the fit begins: the strategy is another one, or a fault's moment can never
            come.

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
        self._controller: FitController | None = None
        self._injector: FaultInjector | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not hasattr(trainer.strategy, "controller"):
            raise ValueError(
                f"FaultInjection works with strategy='async_localsgd' only, not with "
                f"{type(trainer.strategy).__name__}; leave the callback out"
            )
        for fault in self.faults:
            if fault.worker > 0 and trainer.world_size == 1:
                raise ValueError(f"{fault} can never come: there is one rank, worker 0; use devices=2 or more")
            if fault.moment == "saving" and strategy_of(trainer).checkpoint_every is None:
                raise ValueError(
                    f"{fault} can never come: with checkpoint_every=None the strategy saves nothing; set "
                    "checkpoint_every to a number of rounds"
                )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Asynchronous training begins after `on_train_start`.
        controller: FitController | None = trainer.strategy.controller  # type: ignore[attr-defined]
        if controller is not self._controller:
            self._release()
            self._controller = controller
            if controller is not None:
                worker = controller.runtime.worker
                mine = [fault for fault in self.faults if (fault.worker, fault.life) == (worker.number, life_number())]
                self._injector = FaultInjector(mine, worker) if mine else None
        if self._injector is not None:
            self._injector.before_batch()

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        injector = self._injector
        if injector is not None and injector.is_mid_round:
            injector.inject("computing")
            if injector.pop(FaultKind.NAN, "computing"):
                _set_weight_to_nan(pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._injector is not None:
            for fault in self._injector.pending:
                rank_zero_warn(f"not injected, because its moment did not come: {fault}")
        self._release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self._injector is not None:
            self._injector.uninstall()
        self._injector = self._controller = None


def life_number() -> int:
    """Return how often this process's worker was restarted, by the launcher or with the whole job."""
    return restart_count() or int(is_restarted())


def _set_weight_to_nan(module: torch.nn.Module) -> None:
    weight = next(weight for weight in module.parameters() if weight.requires_grad and weight.is_floating_point())
    with torch.no_grad():
        weight.view(-1)[0] = torch.nan
