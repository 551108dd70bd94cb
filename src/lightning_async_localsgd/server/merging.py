"""Turns pushes into outer steps: each push when it arrives, or a group once a quorum of workers has pushed.

Held pushes form a group. A group of n pushes is one outer step on their average, in the order of the workers' numbers,
and n new versions. If the outer optimizer averages pushes itself, the pushes are applied one after another. No push
waits for a worker that has left or has no steps left.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lightning_async_localsgd.outer.base import check_saved_tensors, chunks
from lightning_async_localsgd.protocol.messages import Push
from lightning_async_localsgd.protocol.rejections import stale
from lightning_async_localsgd.server.global_model import square_sum
from lightning_async_localsgd.server.merge_policy import MergePolicy

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_async_localsgd.protocol.rejections import Rejection
    from lightning_async_localsgd.server.global_model import GlobalModel, PushNorm
    from lightning_async_localsgd.staleness import Staleness

_ROUNDING = 1e-6
"""If the sum of n unit vectors is shorter than n times this, the vectors cancel out except for rounding errors."""

_MAX_DEPARTED_BASES = 8
"""Number of models that are kept only because departed workers may be computing on them."""


@dataclass
class HeldPush:
    """A push that is about to be applied, or waits for its group.

    Args:
        push: the header.
        gradient: the pseudo-gradient, corrected for staleness but not weighted. A copy if the push waits.
        norm: L2 norm of the parameters.
        factor: factor of the staleness stage.
        staleness: versions between the push's base and the group's.

    """

    push: Push
    gradient: Tensor
    norm: float
    factor: float
    staleness: int


class Merging:
    """Merges pushes into the global model, each at once or in groups. Callers pass the live workers and the time.

    Args:
        model: the global model.
        policy: quorum, staleness stage, weights and limits. The default merges each push when it arrives.
        sizes_differ: whether workers have batch sizes of their own. Each step then counts by its samples.

    Attributes:
        held: pushes that wait for their group, by worker.
        limited: whether a group may be merged before its quorum is complete.

    """

    def __init__(
        self,
        model: GlobalModel,
        policy: MergePolicy | None = None,
        sizes_differ: bool = False,
    ) -> None:
        self._policy = policy = policy if policy is not None else MergePolicy()
        self._sizes_differ = sizes_differ
        self._stage = policy.staleness
        self._options = options = policy.options
        self.held: dict[int, HeldPush] = {}
        self.limited = options.quorum_seconds is not None
        self._model = model
        self._opened_at: float | None = None
        # Number of consecutive pushes that were dropped only because of their direction.
        self._misdirected = 0
        # Weight of each live worker's latest push.
        self._weights: dict[int, float] = {}
        # Models that workers may be computing on, by version.
        self._bases: dict[int, Tensor] = {}
        # Buffers of earlier groups, for the next group.
        self._free_buffers: list[Tensor] = []
        self._weighs = options.weights != "equal" or sizes_differ
        changes = policy.staleness is not None or self._weighs or options.clip_norm is not None
        self._scratch = torch.empty_like(model.theta) if changes else None

    # ------------------------------------------------------------------- groups

    def quorum(self, live: int) -> int:
        """Return how many of ``live`` workers must push before a group is merged; with 1 there are no groups."""
        return self._policy.required_workers(live)

    def is_complete(self, live: Collection[int], awaited: int) -> bool:
        """Return whether the group has all the pushes that it needs.

        Args:
            live: live workers.
            awaited: number of workers that will still push to this group.

        """
        pushed = sum(worker in self.held for worker in live)
        return awaited == 0 or pushed >= self.quorum(len(live))

    @property
    def deadline(self) -> float | None:
        """When the group must be merged even if the quorum is not complete; None without a limit or a group."""
        limit = self._options.quorum_seconds
        return None if limit is None or self._opened_at is None else self._opened_at + limit

    def start_timer(self, now: float) -> None:
        """Start the time limit of the group, if there is a group whose limit has not started."""
        if self.held and self._opened_at is None:
            self._opened_at = now

    def merge(self) -> list[HeldPush]:
        """Merge the group into the global model.

        Returns:
            The pushes of the group, in the order of the workers' numbers.

        """
        group = [self.held[worker] for worker in sorted(self.held)]
        self.held.clear()
        self._opened_at = None
        factors = self._factors(group)
        if len(group) == 1 or self._model.outer_optimizer.averages_pushes:
            for one, factor in zip(group, factors, strict=True):
                if factor != 1.0:
                    self._parameters(one.gradient).mul_(factor)
                self._model.apply(one.gradient)
        else:
            self._average([one.gradient for one in group], factors)
            self._model.apply(group[0].gradient, pushes=len(group))
        self._free_buffers += [one.gradient for one in group]
        return group

    # ------------------------------------------------------------------- pushes

    def hold_or_apply(
        self,
        push: Push,
        gradient: Tensor,
        inspected: PushNorm,
        live: Collection[int],
        result: Tensor | None = None,
        scale: float = 1.0,
    ) -> Rejection | None:
        """Hold a push in :attr:`held`, or apply it to the model.

        Args:
            push: the header.
            gradient: the pseudo-gradient, flat and finite. It is only read.
            inspected: result of :meth:`.GlobalModel.inspect`.
            live: live workers.
            result: see :meth:`.GlobalModel.apply`.
            scale: factor of the parameters, see :class:`.Verdict`.

        Returns:
            Why the staleness stage drops the push; None if it does not.

        """
        staleness = self._model.version - push.base_version
        factor, norm, base = 1.0, inspected.norm * scale, None
        if self._stage is not None:
            factor = self._staleness_factor(self._stage, staleness, inspected.momentum_cosine, len(live))
            if factor == 0.0:
                return stale(f"too old or misdirected for {self._stage!r}: its staleness is {staleness}")
            # A push that is not stale needs no correction.
            if self._stage.needs_base and staleness > 0:
                base = self._bases.get(push.base_version)
                if base is None:
                    return stale(f"version {push.base_version}, which {self._stage!r} needs, is no longer kept")
        if scale != 1.0:  # Rare enough to allocate a copy.
            gradient, result = gradient.clone(), None
            self._parameters(gradient).mul_(scale)
        holds = bool(self.held) or self.quorum(len(live)) > 1
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
                    self._free_buffers.append(gradient)
                return stale(f"{self._stage!r} makes its norm infinite")
        if self._weighs:
            self._weights = {worker: weight for worker, weight in self._weights.items() if worker in live}
            self._weights[push.worker] = self._weight(push)
        self._misdirected = 0
        one = HeldPush(push, gradient, norm, factor, staleness)
        if holds:
            assert push.worker not in self.held
            self.held[push.worker] = one
        else:
            self._free_buffers.clear()  # Fewer workers are live than before: there may be no more groups.
            self._apply(one, None if base is not None else result)
        return None

    def keep_base(self, used: Iterable[int], used_by_departed: Iterable[int]) -> None:
        """Keep a copy of the model, which was just dispatched, if the staleness stage may need it.

        Args:
            used: versions that live workers may be computing on.
            used_by_departed: versions that departed workers may be computing on.

        """
        if self._stage is None or not self._stage.needs_base:
            return
        kept = {*used, *sorted(used_by_departed)[-_MAX_DEPARTED_BASES:]}
        self._bases = {version: base for version, base in self._bases.items() if version in kept}
        version = self._model.version
        if version in kept and version not in self._bases:
            self._bases[version] = self._model.theta.clone()

    # -------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Return what outlives the process: the held pushes, and the weights of the latest ones.

        The models that workers compute on are not part of the state, because their rounds are lost with the process.
        """
        held = []
        for one in self.held.values():
            views = self._model.layout.views(one.gradient)
            values = {name: view.clone() for name, view in views.items()}
            held.append({**vars(one), "push": dataclasses.asdict(one.push), "gradient": values})
        weights = {str(worker): weight for worker, weight in self._weights.items()}
        return {"held": held, "weights": weights, "misdirected": self._misdirected}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state``.

        Raises:
            ValueError: The held pushes belong to another model. The text names what does not fit.

        """
        self.held.clear()
        self._opened_at = None
        for saved in state.get("held", []):
            buffer = self._buffer()
            views = self._model.layout.views(buffer)
            check_saved_tensors("a saved push", saved["gradient"], views)
            for name, view in views.items():
                view.copy_(saved["gradient"][name])
            one = HeldPush(**{**saved, "push": Push(**saved["push"]), "gradient": buffer})
            self.held[one.push.worker] = one
        self._weights = {int(worker): float(weight) for worker, weight in state.get("weights", {}).items()}
        self._misdirected = int(state.get("misdirected", 0))

    # ----------------------------------------------------------------- internal

    def _staleness_factor(self, stage: Staleness, staleness: int, cosine: float | None, live: int) -> float:
        """Return the stage's factor for a push.

        Only merged pushes change the momentum. If as many consecutive pushes as there are workers point against the
        momentum, the momentum is wrong. It would stay wrong forever if the next push were dropped, too.
        """
        if not stage.needs_momentum:
            return float(stage.weigh(staleness, cosine))
        if self._misdirected >= live:
            cosine = None
        factor = float(stage.weigh(staleness, cosine))
        if factor == 0.0 and stage.weigh(staleness, None) > 0.0:
            self._misdirected += 1
        return factor

    def _apply(self, one: HeldPush, result: Tensor | None) -> None:
        """Apply a push that does not belong to a group."""
        factor = self._clipped(one, one.factor * self._relative_weight(self._weight(one.push), self._weights.values()))
        gradient = one.gradient
        if factor != 1.0:
            assert self._scratch is not None
            # Buffers are values, not differences, so they are not scaled.
            gradient, result = self._scratch if gradient is self._scratch else self._scratch.copy_(gradient), None
            self._parameters(gradient).mul_(factor)
        self._model.apply(gradient, result)

    def _factors(self, group: Sequence[HeldPush]) -> list[float]:
        """Return the factors of the pushes of a group."""
        weights = [self._weight(one.push) for one in group]
        return [
            self._clipped(one, one.factor * self._relative_weight(weight, weights))
            for one, weight in zip(group, weights, strict=True)
        ]

    def _weight(self, push: Push) -> float:
        """Return the weight of a push, not yet relative to other pushes."""
        if self._options.weights == "samples":
            return float(push.samples)
        if self._options.weights == "tokens^2/steps":
            return float(push.tokens) ** 2 / push.steps
        # A push is as long as its steps. Of two steps, the one on more samples has more to say.
        return push.samples / push.steps if self._sizes_differ else 1.0

    def _relative_weight(self, weight: float, weights: Collection[float]) -> float:
        if not self._weighs:
            return 1.0
        total = sum(weights)
        return weight * len(weights) / total if total > 0.0 else 1.0

    def _clipped(self, one: HeldPush, factor: float) -> float:
        limit = self._options.clip_norm
        return factor if limit is None or factor * one.norm <= limit else limit / one.norm

    def _average(self, gradients: Sequence[Tensor], factors: Sequence[float]) -> None:
        """Average ``gradients`` times ``factors`` into the first of them. For buffers, take the plain mean."""
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
            target = sum(factor * norm for factor, norm in zip(factors, norms, strict=True)) / count
            # If the directions cancel out, only rounding errors are left, whose direction means nothing.
            first.mul_(target / length if length > _ROUNDING * sum(factors) else 0.0)

    def _parameters(self, flat: Tensor) -> Tensor:
        return flat[: self._model.layout.parameter_numel]

    def _buffer(self) -> Tensor:
        return self._free_buffers.pop() if self._free_buffers else torch.empty_like(self._model.theta)


def _norm(tensor: Tensor) -> float:
    """Return the L2 norm. It is infinite or NaN if and only if an element is."""
    return math.sqrt(sum(square_sum(chunk) for (chunk,) in chunks(tensor.view(-1))))


def _mean(flats: Sequence[Tensor], factors: Sequence[float]) -> None:
    """Write the mean of ``flats`` times ``factors`` to the first of them: a sum in their order, then one division."""
    for first, *others in chunks(*flats):
        if factors[0] != 1.0:
            first.mul_(factors[0])
        for other, factor in zip(others, factors[1:], strict=True):
            first.add_(other, alpha=factor)
        first.div_(len(flats))
