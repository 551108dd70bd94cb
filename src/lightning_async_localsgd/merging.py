"""How pushes become outer steps: one by one as they come, or held until a quorum of workers has handed in.

Pushes that are held form a group. A group of n is one outer step on their average, in the order of the workers'
numbers, and n new versions; with an outer optimizer that collects pushes by itself they are applied in turn. When a
group is due is decided by who has handed in, by who still computes and by the time; nobody ever waits for a worker that
is gone, or has no steps left to take.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from lightning_async_localsgd.global_model import square_sum
from lightning_async_localsgd.messages import Push
from lightning_async_localsgd.objections import stale
from lightning_async_localsgd.outer.base import check_named, chunks

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_async_localsgd.global_model import GlobalModel, PushNorm
    from lightning_async_localsgd.objections import Objection
    from lightning_async_localsgd.staleness import Staleness

Weights = Literal["equal", "samples", "tokens^2/steps"]
Average = Literal["mean", "rda"]

_ROUNDING = 1e-6
"""Unit vectors whose sum is shorter, for each of them, cancel out but for rounding."""

_BASES_OF_THE_GONE = 8
"""Of models that only workers which are gone may be computing on, so many are kept, the latest."""


@dataclass(frozen=True)
class MergeOptions:
    """How pushes are weighed, limited and averaged.

    Args:
        weights: what a push counts by: ``"equal"``, its ``"samples"``, or ``"tokens^2/steps"``; relative to the mean
            over its group, or over the latest pushes of the live workers where there are no groups.
        average: of a group: the ``"mean"``, or ``"rda"``: for each tensor the direction of the mean of the unit
            vectors, with the mean of the norms as its length.
        clip_norm: a push with a larger L2 norm, weight included, is shortened to this one; ``None`` shortens none.
        quorum_seconds: a group is merged so long after its first push, whoever has not handed in by then; ``None``
            waits for the quorum.

    Raises:
        ValueError: a value is outside its range.

    Example::

        >>> from lightning_async_localsgd import MergeOptions
        >>> MergeOptions(weights="samples", quorum_seconds=30.0).average
        'mean'

    """

    weights: Weights = "equal"
    average: Average = "mean"
    clip_norm: float | None = None
    quorum_seconds: float | None = None

    def __post_init__(self) -> None:
        for name, known in (("weights", Weights), ("average", Average)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"merge.{name}={getattr(self, name)!r} is unknown; use one of {get_args(known)}")
        for name, unit, off in (("clip_norm", "norm", "clips nothing"), ("quorum_seconds", "time", "sets no limit")):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0.0 < value < math.inf):
                raise ValueError(f"merge.{name}={value!r} must be a {unit} > 0; None {off}")


@dataclass
class Held:
    """A push that waits for its group.

    Args:
        push: its header.
        gradient: a copy, corrected for its age, not weighed yet.
        norm: of its parameters.
        factor: what the staleness stage has given it.
        staleness: versions between its base and its group.

    """

    push: Push
    gradient: Tensor
    norm: float
    factor: float
    staleness: int


class Merging:
    """Takes pushes that are in order, and merges them into the global model at once or in groups.

    It knows neither who is live nor the time: whoever calls says so.

    Args:
        model: the global model.
        workers: that the run was started with.
        quorum: so many different workers have to hand in before a group is merged, or ``"all"`` that are live; 1
            applies each push as it comes.
        warmup_steps: steps per worker in which the quorum comes down from all workers to ``quorum``.
        staleness: what becomes of old pushes; None applies them like others.
        options: weights, average and limits; None is the default ones.

    Attributes:
        held: the pushes that wait for their group, by worker.
        limited: a group may be merged before its quorum is there.

    """

    def __init__(
        self,
        model: GlobalModel,
        workers: int = 1,
        quorum: int | Literal["all"] = 1,
        warmup_steps: int = 0,
        staleness: Staleness | None = None,
        options: MergeOptions | None = None,
    ) -> None:
        self.held: dict[int, Held] = {}
        self.limited = options is not None and options.quorum_seconds is not None
        self._model = model
        self._quorum = quorum
        self._warmup = workers * warmup_steps
        self._stage = staleness
        self._options = options = options if options is not None else MergeOptions()
        self._opened_at: float | None = None
        # Pushes in a row that were dropped for their direction alone.
        self._misdirected = 0
        # What each live worker's latest push counts by.
        self._shares: dict[int, float] = {}
        # Models that workers compute on, by version.
        self._bases: dict[int, Tensor] = {}
        # Buffers of earlier groups, for the next one.
        self._spare: list[Tensor] = []
        changes = staleness is not None or options.weights != "equal" or options.clip_norm is not None
        self._scratch = torch.empty_like(model.theta) if changes else None

    # ------------------------------------------------------------------- groups

    def quorum(self, live: int, done: int) -> int:
        """How many different workers have to hand in before a group is merged; with 1 there are no groups.

        Args:
            live: live workers.
            done: local steps of all workers together.

        """
        wanted = live if self._quorum == "all" else min(self._quorum, live)
        if done < self._warmup:
            # Rounded up, in whole numbers: a quorum must not depend on the last bit of a quotient.
            wanted = max(wanted, -(-live * (self._warmup - done) // self._warmup))
        return wanted

    def complete(self, live: Collection[int], computing: int, done: int) -> bool:
        """Whether a group has the pushes that it needs.

        Args:
            live: the live workers.
            computing: how many of them are still about to hand in a push to this group.
            done: local steps of all workers together.

        """
        handed_in = sum(worker in self.held for worker in live)
        return computing == 0 or handed_in >= self.quorum(len(live), done)

    @property
    def deadline(self) -> float | None:
        """When the present group is due, whoever has handed in; None where there is no limit or no group."""
        limit = self._options.quorum_seconds
        return None if limit is None or self._opened_at is None else self._opened_at + limit

    def open(self, now: float) -> None:
        """The time of the present group begins, unless it has begun; a group that was restored has no time yet."""
        if self.held and self._opened_at is None:
            self._opened_at = now

    def merge(self) -> list[Held]:
        """Merges the present group into the global model.

        Returns:
            Its pushes, in the order of their workers' numbers.

        """
        group = [self.held[worker] for worker in sorted(self.held)]
        self.held.clear()
        self._opened_at = None
        factors = self._factors(group)
        if len(group) == 1 or self._model.rule.collects:
            for one, factor in zip(group, factors, strict=True):
                if factor != 1.0:
                    self._parameters(one.gradient).mul_(factor)
                self._model.apply(one.gradient)
        else:
            self._average([one.gradient for one in group], factors)
            self._model.apply(group[0].gradient, pushes=len(group))
        self._spare += [one.gradient for one in group]
        return group

    # ------------------------------------------------------------------- pushes

    def take(
        self,
        push: Push,
        gradient: Tensor,
        looked: PushNorm,
        live: Collection[int],
        done: int,
        result: Tensor | None = None,
    ) -> Objection | None:
        """Holds a push, or applies it; afterwards it is in :attr:`held`, or in the model.

        Args:
            push: its header.
            gradient: flat and finite; only read.
            looked: what was found when it was looked at.
            live: the live workers.
            done: local steps of all workers together, before this push.
            result: see :meth:`.GlobalModel.apply`.

        Returns:
            Why it is dropped, if the staleness stage says so.

        """
        staleness = self._model.version - push.base_version
        factor, norm, base = 1.0, looked.norm, None
        if self._stage is not None:
            factor = self._weigh(self._stage, staleness, looked.momentum_cosine, len(live))
            if factor == 0.0:
                return stale(f"too old or misdirected for {self._stage!r}: its staleness is {staleness}")
            # A push on the present model is what it should be.
            if self._stage.needs_base and staleness > 0:
                base = self._bases.get(push.base_version)
                if base is None:
                    return stale(f"version {push.base_version}, which {self._stage!r} needs, is not kept any more")
        holds = bool(self.held) or self.quorum(len(live), done) > 1
        if holds:
            gradient = self._buffer().copy_(gradient)
        if base is not None:
            assert self._stage is not None
            assert self._scratch is not None
            gradient = gradient if holds else self._scratch.copy_(gradient)
            parts = (self._parameters(gradient), self._parameters(self._model.theta), self._parameters(base))
            self._stage.correct(*parts)
            norm = _norm(parts[0])
            if not math.isfinite(norm):
                if holds:
                    self._spare.append(gradient)
                return stale(f"{self._stage!r} makes it infinite")
        if self._options.weights != "equal":
            self._shares = {worker: share for worker, share in self._shares.items() if worker in live}
            self._shares[push.worker] = self._share(push)
        self._misdirected = 0
        one = Held(push, gradient, norm, factor, staleness)
        if holds:
            assert push.worker not in self.held
            self.held[push.worker] = one
        else:
            self._spare.clear()  # When a warm-up is over there may be no group any more.
            self._apply(one, None if base is not None else result)
        return None

    def keep_base(self, used: Iterable[int], used_by_the_gone: Iterable[int]) -> None:
        """The present model has been dispatched: it is kept if the staleness stage will ask for it.

        Args:
            used: versions that live workers may be computing on.
            used_by_the_gone: the same of workers that are gone and may come back.

        """
        if self._stage is None or not self._stage.needs_base:
            return
        kept = {*used, *sorted(used_by_the_gone)[-_BASES_OF_THE_GONE:]}
        self._bases = {version: base for version, base in self._bases.items() if version in kept}
        version = self._model.version
        if version in kept and version not in self._bases:
            self._bases[version] = self._model.theta.clone()

    # -------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """What outlives the process: the pushes that are held, and what the latest ones count by.

        The models that workers compute on don't: their rounds are lost with the process.
        """
        held = []
        for one in self.held.values():
            views = self._model.layout.views(one.gradient)
            values = {name: view.clone() for name, view in views.items()}
            held.append({**vars(one), "push": dataclasses.asdict(one.push), "gradient": values})
        shares = {str(worker): share for worker, share in self._shares.items()}
        return {"held": held, "shares": shares, "misdirected": self._misdirected}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the pushes in ``state``.

        Raises:
            ValueError: they are of another model; the text names what does not fit.

        """
        self.held.clear()
        self._opened_at = None
        for saved in state.get("held", []):
            buffer = self._buffer()
            views = self._model.layout.views(buffer)
            check_named("a saved push", saved["gradient"], views)
            for name, view in views.items():
                view.copy_(saved["gradient"][name])
            one = Held(**{**saved, "push": Push(**saved["push"]), "gradient": buffer})
            self.held[one.push.worker] = one
        self._shares = {int(worker): float(share) for worker, share in state.get("shares", {}).items()}
        self._misdirected = int(state.get("misdirected", 0))

    # ----------------------------------------------------------------- internal

    def _weigh(self, stage: Staleness, staleness: int, cosine: float | None, live: int) -> float:
        """The stage's factor for a push.

        The momentum changes with pushes that are taken and with nothing else. When as many in a row as there are
        workers point against it, it is the momentum that is off, and without an exception would stay so for ever.
        """
        if not stage.needs_momentum:
            return float(stage.weigh(staleness, cosine))
        if self._misdirected >= live:
            cosine = None
        factor = float(stage.weigh(staleness, cosine))
        if factor == 0.0 and stage.weigh(staleness, None) > 0.0:
            self._misdirected += 1
        return factor

    def _apply(self, one: Held, result: Tensor | None) -> None:
        """Applies a push that is held by nobody."""
        factor = self._clipped(one, one.factor * self._relative(self._share(one.push), self._shares.values()))
        gradient = one.gradient
        if factor != 1.0:
            assert self._scratch is not None
            # Buffers are no differences: they are not scaled.
            gradient, result = self._scratch if gradient is self._scratch else self._scratch.copy_(gradient), None
            self._parameters(gradient).mul_(factor)
        self._model.apply(gradient, result)

    def _factors(self, group: Sequence[Held]) -> list[float]:
        """By how much each push of a group is multiplied."""
        shares = [self._share(one.push) for one in group]
        return [
            self._clipped(one, one.factor * self._relative(share, shares))
            for one, share in zip(group, shares, strict=True)
        ]

    def _share(self, push: Push) -> float:
        """What a push counts by."""
        if self._options.weights == "samples":
            return float(push.samples)
        if self._options.weights == "tokens^2/steps":
            return float(push.tokens) ** 2 / push.steps
        return 1.0

    def _relative(self, share: float, shares: Collection[float]) -> float:
        if self._options.weights == "equal":
            return 1.0
        total = sum(shares)
        return share * len(shares) / total if total > 0.0 else 1.0

    def _clipped(self, one: Held, factor: float) -> float:
        limit = self._options.clip_norm
        return factor if limit is None or factor * one.norm <= limit else limit / one.norm

    def _average(self, gradients: Sequence[Tensor], factors: Sequence[float]) -> None:
        """Averages ``gradients``, times ``factors``, into the first of them; of buffers, the plain mean."""
        first, *others = gradients
        split, count = self._model.layout.parameter_numel, len(gradients)
        if self._options.average == "rda":
            self._average_directions(gradients, factors)
        else:
            _mean([gradient[:split] for gradient in gradients], factors)
        _mean([first[split:], *(other[split:] for other in others)], [1.0] * count)

    def _average_directions(self, gradients: Sequence[Tensor], factors: Sequence[float]) -> None:
        count = len(gradients)
        views = [self._model.layout.views(self._parameters(gradient), "parameter") for gradient in gradients]
        for name, first in views[0].items():
            parts = [each[name] for each in views]
            norms = [_norm(part) for part in parts]
            for index, (part, norm, factor) in enumerate(zip(parts, norms, factors, strict=True)):
                alpha = factor / norm if norm > 0.0 else 0.0
                if index == 0:
                    first.mul_(alpha)
                else:
                    first.add_(part, alpha=alpha)
            length = _norm(first)
            wanted = sum(factor * norm for factor, norm in zip(factors, norms, strict=True)) / count
            # Of directions that cancel out rounding errors are left, and they point nowhere.
            first.mul_(wanted / length if length > _ROUNDING * sum(factors) else 0.0)

    def _parameters(self, flat: Tensor) -> Tensor:
        return flat[: self._model.layout.parameter_numel]

    def _buffer(self) -> Tensor:
        return self._spare.pop() if self._spare else torch.empty_like(self._model.theta)


def _norm(tensor: Tensor) -> float:
    """The L2 norm; infinite or not a number if and only if an element is."""
    return math.sqrt(sum(square_sum(chunk) for (chunk,) in chunks(tensor.view(-1))))


def _mean(flats: Sequence[Tensor], factors: Sequence[float]) -> None:
    """The mean of ``flats``, times ``factors``, in the place of the first: a sum in their order, then one division."""
    for first, *others in chunks(*flats):
        if factors[0] != 1.0:
            first.mul_(factors[0])
        for other, factor in zip(others, factors[1:], strict=True):
            first.add_(other, alpha=factor)
        first.div_(len(flats))
