"""How pushes become outer steps, as the strategy's options say it: quorum, synchronous beginning, staleness, limits."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import torch

from lightning_async_localsgd.policies.guard import check_max_update_norm
from lightning_async_localsgd.staleness import Staleness

if TYPE_CHECKING:
    from lightning_async_localsgd.outer import OuterOptimizer
    from lightning_async_localsgd.policies.grace import GraceWindow

Weights = Literal["equal", "samples", "tokens^2/steps"]
Average = Literal["mean", "rda"]

_NESTEROV = "lightning_async_localsgd.outer.Nesterov(lr=0.7, momentum=0.9)"


@dataclass(frozen=True)
class MergeOptions:
    """Weights, average and limits of the pushes that are merged.

    Args:
        weights: weight of a push: ``"equal"``, its number of ``"samples"``, or ``"tokens^2/steps"``. Weights are
            relative to the mean over the group, or, without groups, over the latest pushes of the live workers. If
            workers have batch sizes of their own, ``"equal"`` is the samples of a step.
        average: average of a group: the ``"mean"``, or ``"rda"``, which takes for each tensor the direction of the
            mean of the unit vectors and the mean of the norms as its length.
        clip_norm: largest L2 norm of a weighted push. Longer pushes are scaled down to it. ``None`` scales nothing.
        quorum_seconds: seconds after the first push of a group at which the group is merged, even if the quorum is
            not complete. ``None`` waits for the quorum.
        max_update_norm: largest L2 norm of a pseudo-gradient that is merged; larger ones are refused. ``"auto"`` is
            10,000 times the norm that the earlier pushes of the run suggest, and scales pushes above 100 times that
            norm down to it. ``None`` is no limit. NaN and infinite values are always refused.
        second_moments: whether workers average the second moments of their inner optimizers (Adam, AdamW, NAdam,
            RAdam, RMSprop), which doubles what is exchanged. ``"auto"`` does so if pushes are merged when they arrive
            and no frozen parameters are exchanged.

    Raises:
        ValueError: A value is outside its range.

    Example::

        >>> from lightning_async_localsgd import MergeOptions
        >>> MergeOptions(weights="samples", quorum_seconds=30.0).average
        'mean'

    """

    weights: Weights = "equal"
    average: Average = "mean"
    clip_norm: float | None = None
    quorum_seconds: float | None = None
    max_update_norm: float | Literal["auto"] | None = "auto"
    second_moments: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name, known in (("weights", Weights), ("average", Average)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"merge.{name}={getattr(self, name)!r} is unknown; use one of {get_args(known)}")
        for name, unit, off in (("clip_norm", "norm", "clips nothing"), ("quorum_seconds", "time", "sets no limit")):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0.0 < value < math.inf):
                raise ValueError(f"merge.{name}={value!r} must be a {unit} > 0; None {off}")
        check_max_update_norm(self.max_update_norm)
        if not isinstance(self.second_moments, bool) and self.second_moments != "auto":
            raise ValueError(
                f"merge.second_moments={self.second_moments!r} is unknown; use True (average them), False (do not), or "
                "'auto'"
            )


@dataclass(frozen=True)
class MergePolicy:
    """How pushes are merged. Immutable; :class:`.Merging` applies it.

    Args:
        quorum: number of different workers whose pushes are merged as one outer step, or ``"all"`` live workers. With
            1, each push is merged when it arrives.
        sync_warmup_steps: steps per worker during which gradients are averaged, see :class:`.SynchronousBeginning`, or
            ``"auto"``.
        staleness: what happens to pushes from old models. ``None`` merges them like others.
        options: weights, average and limits.

    Raises:
        ValueError: A value is outside its range, has no effect, or contradicts another value.
        TypeError: ``staleness`` or ``options`` is of another type.

    """

    quorum: int | Literal["all"] = 1
    sync_warmup_steps: int | Literal["auto"] = 0
    staleness: Staleness | None = None
    options: MergeOptions = field(default_factory=MergeOptions)

    def __post_init__(self) -> None:
        quorum, warmup, options = self.quorum, self.sync_warmup_steps, self.options
        if quorum != "all" and (type(quorum) is not int or quorum < 1):
            raise ValueError(
                f"quorum={quorum!r} must be a number of workers >= 1, or 'all'; 1 merges each push when it arrives, "
                "'all' is synchronous"
            )
        if warmup != "auto" and (type(warmup) is not int or warmup < 0):
            raise ValueError(
                f"sync_warmup_steps={warmup!r} must be a number of steps per worker, 0 or more, or 'auto'; 0 is "
                "asynchronous from the start"
            )
        given: object = self.staleness
        if given is not None and not isinstance(given, Staleness):
            raise TypeError(
                f"staleness={given!r} is not a staleness stage; use one of lightning_async_localsgd.staleness, such as "
                "Polynomial(power=0.5), or None"
            )
        given = options
        if not isinstance(given, MergeOptions):
            raise TypeError(f"merge={given!r} must be a MergeOptions, such as MergeOptions(weights='samples'), or None")
        if options.quorum_seconds is not None and not self.uses_groups:
            raise ValueError(
                f"merge.quorum_seconds={options.quorum_seconds:g} limits how long pushes wait for a quorum, but with "
                "quorum=1 no push waits; use quorum >= 2 or quorum='all', or leave it out"
            )

    @property
    def uses_groups(self) -> bool:
        """Whether pushes ever wait for the pushes of other workers."""
        return self.quorum != 1

    @property
    def averages_moments(self) -> bool:
        """Whether several workers average the second moments of their inner optimizers."""
        chosen = self.options.second_moments
        return self.quorum == 1 if chosen == "auto" else chosen

    def required_workers(self, live: int) -> int:
        """Return how many of ``live`` workers must push before a group is merged; with 1 there are no groups."""
        return live if self.quorum == "all" else min(self.quorum, live)

    def check_with(self, outer_optimizer: OuterOptimizer, grace: GraceWindow, sizes_differ: bool) -> None:
        """Check the policy against the other options, as far as possible without the number of workers.

        Args:
            outer_optimizer: the outer optimizer.
            grace: the grace window.
            sizes_differ: whether workers have batch sizes of their own, so that their pushes have weights.

        Raises:
            ValueError: Two options contradict each other, or one of them has no effect.

        """
        clip, limit = self.options.clip_norm, self.options.max_update_norm
        # Weights and stages can lengthen a push, so only an unchanged push is known to be refused before it is clipped.
        unchanged = self.options.weights == "equal" and not sizes_differ and self.staleness is None
        if clip is not None and isinstance(limit, float | int) and unchanged and clip >= limit:
            raise ValueError(
                f"merge.clip_norm={clip:g} has no effect: merge.max_update_norm={limit:g} refuses all longer pushes; "
                "use a smaller clip_norm, or a larger max_update_norm"
            )
        averages = outer_optimizer.averages_pushes
        if self.quorum != 1 and averages:
            raise ValueError(
                f"quorum={self.quorum!r} averages the pushes of a group, but outer_optimizer={outer_optimizer!r} "
                "averages pushes itself; use quorum=1 (sync_warmup_steps gives it a synchronous beginning), or an "
                f"outer optimizer such as {_NESTEROV}"
            )
        if self.options.average != "mean" and (averages or not self.uses_groups):
            reason = f"outer_optimizer={outer_optimizer!r} averages pushes itself" if averages else "quorum=1 has none"
            raise ValueError(
                f"merge.average={self.options.average!r} averages the pushes of a group, but {reason}; use quorum >= 2 "
                f"and an outer optimizer such as {_NESTEROV}, or leave it out"
            )
        if self.quorum == "all":
            _check_no_grace(grace, "quorum='all'")
            if self.options.quorum_seconds is None:
                self._check_no_staleness("with quorum='all' and no merge.quorum_seconds")

    def check_workers(
        self, workers: int, others_may_join: bool, outer_optimizer: OuterOptimizer, grace: GraceWindow
    ) -> None:
        """Check the policy and the outer optimizer against the number of workers.

        Args:
            workers: number of workers that the run is started with.
            others_may_join: whether workers may join while training runs.
            outer_optimizer: the outer optimizer; a copy of it is tried on a model of one parameter.
            grace: the grace window.

        Raises:
            ValueError: They do not fit the number of workers.

        """
        quorum, warmup = self.quorum, self.sync_warmup_steps
        trial = copy.deepcopy(outer_optimizer)
        trial.setup(torch.zeros(1), {"": torch.zeros(1)}, workers)
        if self.staleness is not None and self.staleness.needs_momentum and not _has_momentum(trial):
            raise ValueError(
                f"staleness={self.staleness!r} compares pushes with the outer momentum, but "
                f"outer_optimizer={outer_optimizer!r} has none; use an outer optimizer with momentum > 0, such as "
                "DelayedNesterov(momentum=0.9), or another stage"
            )
        if quorum != "all" and quorum > workers:
            raise ValueError(
                f"quorum={quorum} is larger than the {workers} worker(s) of this run; use at most {workers}, or 'all'"
            )
        single = workers == 1 and not others_may_join
        if workers == 1 and warmup not in (0, "auto"):
            raise ValueError(
                f"sync_warmup_steps={warmup} averages the gradients of workers, but the run begins with a single one; "
                "use more workers, or sync_warmup_steps=0"
            )
        if single:
            self._check_no_staleness("with a single worker")
            if self.options.second_moments is True:
                raise ValueError(
                    "merge.second_moments=True averages the second moments of workers, but there is a single worker; "
                    "leave it out, or use more workers"
                )
            if self.options.weights != "equal":
                raise ValueError(
                    f"merge.weights={self.options.weights!r} weighs the pushes of workers against each other, but "
                    "there is a single worker; leave it out, or use more workers"
                )
        if quorum == workers > 1 and not others_may_join:
            _check_no_grace(grace, f"quorum={quorum} of {workers} workers")
        if quorum == workers and self.options.quorum_seconds is None and not others_may_join:
            self._check_no_staleness(f"with quorum={quorum} of {workers} worker(s) and no merge.quorum_seconds")

    def check_frozen(self, exchange_frozen: bool) -> None:
        """Check the policy against the exchange of frozen parameters.

        Raises:
            ValueError: Second moments are averaged, and frozen parameters are exchanged.

        """
        if exchange_frozen and self.options.second_moments is True:
            raise ValueError(
                "merge.second_moments=True needs the same parameters in the optimizers of all workers, but frozen "
                "parameters are exchanged, and may be added to the optimizers in mid-run; set exchange.frozen=False, "
                "or leave second_moments out"
            )

    def _check_no_staleness(self, reason: str) -> None:
        if self.staleness is not None:
            raise ValueError(
                f"staleness={self.staleness!r} has no effect: {reason} no push is older than the model; leave it out"
            )


def _has_momentum(outer_optimizer: OuterOptimizer) -> bool:
    """Return whether an outer optimizer uses a momentum. It must be set up, and cannot be used afterwards."""
    try:
        outer_optimizer.restart_momentum()
    except ValueError:
        return False
    return outer_optimizer.momentum_buffer is not None


def _check_no_grace(grace: GraceWindow, quorum: str) -> None:
    if isinstance(grace.grace, float | int) and grace.grace > 0:
        raise ValueError(
            f"grace={grace.grace!r} waits for more workers than the quorum, but {quorum} waits for all of them; use a "
            "smaller quorum, or leave grace out"
        )
