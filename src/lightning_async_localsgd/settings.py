"""What the asynchronous phase of a fit is told when it begins."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lightning_async_localsgd.merging import MergeOptions

if TYPE_CHECKING:
    from lightning_async_localsgd.grace import GraceWindow
    from lightning_async_localsgd.options import ExchangeOptions
    from lightning_async_localsgd.outer import OuterOptimizer
    from lightning_async_localsgd.plan import RunBudget
    from lightning_async_localsgd.staleness import Staleness


@dataclass(frozen=True)
class PhaseSettings:
    """What the strategy's options and the trainer say about the phase.

    Args:
        local_steps: H, local steps of the fastest worker's round.
        rule: the outer optimizer; belongs to the phase from now on.
        dynamic_local_steps: whether slower workers take fewer steps.
        grace: the grace window.
        exchange: transport, port, encryption.
        start_timeout: seconds to wait for all workers at the start.
        silence_timeout: seconds of silence after which a peer is given up.
        budget: what the trainer's limits come to.
        done: steps that count as taken before (a checkpoint without a server's state).
        ahead: global steps that the trainer has counted beyond what the run calls done, see :func:`.steps_ahead`.
        frozen: whether frozen parameters are exchanged like the others.
        max_update_norm: see :class:`.UpdateGuard`.
        quorum: see :class:`.Merging`.
        warmup_steps: likewise.
        staleness: likewise.
        merge: likewise.
        token: the user's secret, with which others may join while training runs; None if there is none.
        fit: number of the fit in the script.
        seed: of the training data's order.
        folder: name of the run's folder.

    """

    local_steps: int
    rule: OuterOptimizer
    dynamic_local_steps: bool
    grace: GraceWindow
    exchange: ExchangeOptions
    start_timeout: float
    silence_timeout: float
    budget: RunBudget
    done: int = 0
    ahead: int = 0
    frozen: bool = False
    max_update_norm: float | Literal["auto"] | None = "auto"
    quorum: int | Literal["all"] = 1
    warmup_steps: int = 0
    staleness: Staleness | None = None
    merge: MergeOptions = field(default_factory=MergeOptions)
    token: str | None = field(default=None, repr=False)
    fit: int = 1
    seed: int = 0
    folder: str = ""
