"""The global model: one flat fp32 vector, its version, and the outer optimizer that moves it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_async_localsgd.outer.base import OuterOptimizer, check_named, chunks

if TYPE_CHECKING:
    from lightning_async_localsgd.layout import Binding, Layout


@dataclass(frozen=True)
class PushNorm:
    """What one read-only pass over a push found.

    Args:
        norm: of the pseudo-gradient (parameters only); not a number if it is not finite.
        momentum_cosine: between the pseudo-gradient and the outer momentum; None if either is zero or not there.
        diverged: the first parameter or buffer that holds what is infinite or not a number, though it must not; None if
            there is none.

    """

    norm: float
    momentum_cosine: float | None
    diverged: str | None = None


class GlobalModel:
    """The model that belongs to all workers. It knows neither threads nor peers: one thread owns it.

    Args:
        layout: of the model.
        rule: the outer optimizer; this object takes it over.
        workers: live workers, >= 1.

    Attributes:
        theta: the model, flat fp32, all zeros until :meth:`load`.
        version: pushes applied so far.

    Raises:
        ValueError: the rule's hyper-parameters don't fit ``workers``.

    Example::

        >>> from lightning_async_localsgd.layout import Layout
        >>> from lightning_async_localsgd.outer import DelayedNesterov
        >>> model = GlobalModel(Layout.of(torch.nn.Linear(1, 1)), DelayedNesterov(lr=1.0, momentum=0.0), workers=2)
        >>> model.load(torch.tensor([1.0, 2.0]))
        >>> model.apply(torch.tensor([1.0, 0.0]))
        >>> model.theta, model.version
        (tensor([0.5000, 2.0000]), 1)

    """

    def __init__(self, layout: Layout, rule: OuterOptimizer, workers: int) -> None:
        self.layout = layout
        self.rule = rule
        self.theta = torch.zeros(layout.numel, dtype=torch.float32)
        self.version = 0
        self._workers = workers
        self._parameters = self.theta[: layout.parameter_numel]
        self._buffers = self.theta[layout.parameter_numel :]
        # Elements of buffers that held no finite number from the start: a mask, or a range that is yet to be measured.
        self._unset: Tensor | None = None
        rule.setup(self._parameters, layout.views(self.theta, "parameter"), workers)

    @property
    def workers(self) -> int:
        """Live workers that the rule counts on."""
        return self._workers

    def set_workers(self, workers: int) -> None:
        """Membership has changed to ``workers`` live workers. May change the model, but is not a new version."""
        if workers < 1:
            raise ValueError(f"workers must be >= 1, got {workers}")
        self.rule.set_workers(workers)
        self._workers = workers

    def load(self, flat: Tensor) -> None:
        """Copies ``flat`` into the model. Version and the rule's state stay as they are.

        Where its buffers hold no finite number, those of pushes need not either.
        """
        self.theta.copy_(self._checked(flat))
        self._note_unset()

    def read(self, binding: Binding) -> None:
        """Begins with what a module holds, as :meth:`load` does with a vector."""
        binding.read(self.theta)
        self._note_unset()

    def copy_to(self, out: Tensor) -> None:
        """Copies the model into ``out``."""
        self._checked(out).copy_(self.theta)

    def inspect(self, gradient: Tensor) -> PushNorm:
        """Looks at a push without changing anything, in one pass and with no temporary larger than a chunk."""
        squares = momentum_squares = product = 0.0
        parameters, buffers = self._split(gradient)
        momentum = self.rule.momentum_buffer
        if not self._may_be(buffers):
            return PushNorm(math.nan, None, self._first_odd(gradient))
        # Without a momentum the gradient stands in for it; the cosine is dropped below.
        for chunk, part in chunks(parameters, parameters if momentum is None else momentum):
            square = square_sum(chunk)
            if not math.isfinite(square):
                return PushNorm(math.nan, None, self._first_odd(gradient))
            squares += square
            if momentum is not None:
                product += float(torch.dot(chunk, part))
                momentum_squares += square_sum(part)
        norm = math.sqrt(squares)
        scale = norm * math.sqrt(momentum_squares) if math.isfinite(momentum_squares) else 0.0
        # A cosine is for monitoring: where fp32 could not hold the products there is none.
        cosine = max(-1.0, min(1.0, product / scale)) if scale > 0.0 and math.isfinite(product) else None
        return PushNorm(norm, cosine)

    def apply(self, gradient: Tensor, result: Tensor | None = None, pushes: int = 1) -> None:
        """Applies one push, or the average of several as one step; ``gradient`` is only read.

        Parameters follow the outer optimizer. Buffers (running statistics) move by 1/workers of the way towards the
        worker's own values, which the buffer part of a push holds: never outside the range of what workers have
        measured, however stale the push, so that a variance stays positive; buffers equal everywhere stay bit for bit.
        An average of n moves them n times as far, at most all of the way. Elements that were infinite, or not a number,
        in the model that was loaded stay so until a push has a number there, which they take.

        Args:
            gradient: flat vector as :meth:`.layout.Binding.subtract_from` forms it, in which :meth:`inspect` found
                nothing that must not be there.
            result: the worker's whole local model, where it is the only one and :attr:`.OuterOptimizer.replaces_model`
                holds. The outcome is then that very model, without the rounding of two subtractions.
            pushes: how many pushes ``gradient`` is the average of: so many new versions.

        Raises:
            ValueError: ``result`` was given, but the rule does more than replace the model, or there are more workers.

        """
        if result is not None and not (self.rule.replaces_model and self._workers == 1):
            raise ValueError(f"{self.rule} with {self._workers} workers does not replace the model by a local one")
        parameters, buffers = self._split(gradient)
        self.rule.step(parameters, self.layout.views(parameters, "parameter"))
        self._move_buffers(buffers, min(1.0, pushes / self._workers))
        if result is not None:
            self.theta.copy_(self._checked(result))
        self.version += pushes

    def state_dict(self) -> dict[str, Any]:
        """Copies of everything that training needs to continue; tensors by name, readable with ``weights_only``."""
        return {
            "version": self.version,
            "rule": type(self.rule).__name__,
            "theta": {name: view.clone() for name, view in self.layout.views(self.theta).items()},
            "outer": self.rule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``. Without ``"theta"`` in it, the present model is kept.

        Raises:
            ValueError: ``state`` is of another outer optimizer or another model; the text names what does not fit.
                The model may have been changed by then.

        """
        missing = [key for key in ("version", "rule", "outer") if key not in state]
        if missing:
            raise ValueError(f"the saved state of the global model lacks {missing}")
        rule = type(self.rule).__name__
        if state["rule"] != rule:
            raise ValueError(
                f"the checkpoint was written with outer_optimizer={state['rule']}, this run has {rule}; use the same,"
                " or start from the checkpoint's weights only"
            )
        theta = state.get("theta")
        try:
            if theta is not None:
                views = self.layout.views(self.theta)
                check_named("the saved global model", theta, views)
                for name, view in views.items():
                    view.copy_(theta[name])
                self._note_unset()
            self.rule.load_state_dict(state["outer"])
        except ValueError as error:
            raise ValueError(
                f"{error}. The checkpoint is of another model, or this run trains other parameters (frozen ones are not"
                " exchanged); train the same ones, or begin a new run that loads its weights"
            ) from error
        self.version = int(state["version"])

    def _note_unset(self) -> None:
        unset = ~torch.isfinite(self._buffers)
        self._unset = unset if bool(unset.any()) else None

    def _may_be(self, buffers: Tensor) -> bool:
        """Whether the buffers of a push are finite wherever they have to be."""
        if all(math.isfinite(square_sum(chunk)) for (chunk,) in chunks(buffers)):
            return True
        return self._unset is not None and bool((torch.isfinite(buffers) | self._unset).all())

    def _first_odd(self, flat: Tensor) -> str:
        """The name of the first parameter or buffer with an element that is not finite, though it has to be."""
        odd = ~torch.isfinite(flat)
        if self._unset is not None:
            odd[self.layout.parameter_numel :] &= ~self._unset
        index = int(odd.nonzero()[0])
        return next(f"{e.kind} {e.name!r}" for e in self.layout.entries if e.offset <= index < e.offset + e.numel)

    def _move_buffers(self, buffers: Tensor, share: float) -> None:
        if self._unset is None:
            self._buffers.lerp_(buffers, share)
            return
        moved = torch.where(torch.isfinite(self._buffers), torch.lerp(self._buffers, buffers, share), buffers)
        self._buffers.copy_(torch.where(torch.isfinite(buffers), moved, self._buffers))

    def _split(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Parameter part and buffer part."""
        flat = self._checked(flat)
        return flat[: self.layout.parameter_numel], flat[self.layout.parameter_numel :]

    def _checked(self, flat: Tensor) -> Tensor:
        if flat.dtype != torch.float32 or flat.shape != self.theta.shape:
            raise ValueError(
                f"expected a flat fp32 vector of {self.layout.numel} elements, got {flat.dtype} {list(flat.shape)}"
            )
        return flat


def square_sum(chunk: Tensor) -> float:
    """Sum of squares; infinite or not a number if and only if an element is."""
    total = float(torch.dot(chunk, chunk))
    if math.isfinite(total):
        return total
    # Squares of large but finite elements overflow in fp32: look again in fp64.
    return float(torch.linalg.vector_norm(chunk, dtype=torch.float64)) ** 2
