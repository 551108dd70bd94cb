"""The global model: a flat fp32 vector, its version, and the outer optimizer that updates it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_async_localsgd.outer.base import OuterOptimizer, check_saved_tensors, chunks

if TYPE_CHECKING:
    from lightning_async_localsgd.protocol.layout import Binding, Layout


@dataclass(frozen=True)
class PushNorm:
    """Result of one read-only pass over a push.

    Args:
        norm: L2 norm of the parameters of the pseudo-gradient; NaN if it is not finite.
        momentum_cosine: cosine between the pseudo-gradient and the outer momentum; None if either is zero or missing.
        diverged: name of the first parameter or buffer with NaN or infinite values, or moment with infinite or negative
            ones; None if there is none. Buffers may have such values where the loaded model has them.

    """

    norm: float
    momentum_cosine: float | None
    diverged: str | None = None


class GlobalModel:
    """The model that all workers train. Not thread-safe.

    Args:
        layout: layout of the model.
        outer_optimizer: the outer optimizer. It must not be used elsewhere.
        workers: number of live workers, at least 1.

    Attributes:
        theta: the model, flat fp32, and the moments; zeros until :meth:`load`. Unknown moments are NaN.
        version: number of pushes applied so far.

    Raises:
        ValueError: The outer optimizer's hyperparameters do not fit ``workers``.

    Example::

        >>> from lightning_async_localsgd.protocol.layout import Layout
        >>> from lightning_async_localsgd.outer import DelayedNesterov
        >>> model = GlobalModel(Layout.of(torch.nn.Linear(1, 1)), DelayedNesterov(lr=1.0, momentum=0.0), workers=2)
        >>> model.load(torch.tensor([1.0, 2.0]))
        >>> model.apply(torch.tensor([1.0, 0.0]))
        >>> model.theta, model.version
        (tensor([0.5000, 2.0000]), 1)

    """

    def __init__(self, layout: Layout, outer_optimizer: OuterOptimizer, workers: int) -> None:
        self.layout = layout
        self.outer_optimizer = outer_optimizer
        self.theta = torch.zeros(layout.numel, dtype=torch.float32)
        self.version = 0
        self._workers = workers
        self._parameters = self.theta[: layout.parameter_numel]
        self._buffers = self.theta[layout.parameter_numel : layout.model_numel]
        self._moments = self.theta[layout.model_numel :].fill_(math.nan)
        # Elements of buffers that are not finite in the loaded model: a mask, or a range that is measured later.
        self._unset: Tensor | None = None
        outer_optimizer.setup(self._parameters, layout.views(self.theta, "parameter"), workers)

    @property
    def workers(self) -> int:
        """Number of live workers."""
        return self._workers

    def set_workers(self, workers: int) -> None:
        """Set the number of live workers. May change the model, but not the version."""
        if workers < 1:
            raise ValueError(f"workers must be >= 1, got {workers}")
        self.outer_optimizer.set_workers(workers)
        self._workers = workers

    def set_local_steps(self, local_steps: int) -> None:
        """Set the local steps of the fastest worker's round. May change the model, but not the version."""
        self.outer_optimizer.set_local_steps(local_steps)

    def load(self, flat: Tensor) -> None:
        """Copy ``flat`` to the model. The version and the outer optimizer's state do not change.

        Where buffers in ``flat`` are not finite, those of pushes need not be finite either.
        """
        self.theta.copy_(self._checked(flat))
        self._note_unset()

    def read(self, binding: Binding) -> None:
        """Load the parameters and buffers of a module."""
        binding.read(self.theta)
        self._note_unset()

    def copy_to(self, out: Tensor) -> None:
        """Copy the model to ``out``."""
        self._checked(out).copy_(self.theta)

    def inspect(self, gradient: Tensor) -> PushNorm:
        """Check and measure a push, in one pass and without temporary tensors larger than a chunk."""
        squares = momentum_squares = product = 0.0
        parameters, buffers, moments = self._split(self._checked(gradient))
        momentum = self.outer_optimizer.momentum_buffer
        if not (self._buffers_are_valid(buffers) and _moments_are_valid(moments)):
            return PushNorm(math.nan, None, self._first_invalid(gradient))
        # Without a momentum, iterate over the gradient twice. The cosine is then dropped below.
        for chunk, part in chunks(parameters, parameters if momentum is None else momentum):
            square = square_sum(chunk)
            if not math.isfinite(square):
                return PushNorm(math.nan, None, self._first_invalid(gradient))
            squares += square
            if momentum is not None:
                product += float(torch.dot(chunk, part))
                momentum_squares += square_sum(part)
        norm = math.sqrt(squares)
        scale = norm * math.sqrt(momentum_squares) if math.isfinite(momentum_squares) else 0.0
        # If the products overflow fp32, there is no cosine. It is only a metric.
        cosine = max(-1.0, min(1.0, product / scale)) if scale > 0.0 and math.isfinite(product) else None
        return PushNorm(norm, cosine)

    def apply(self, gradient: Tensor, result: Tensor | None = None, pushes: int = 1) -> None:
        """Apply one push, or the average of several pushes, as one outer step.

        The outer optimizer updates the parameters. Buffers (running statistics) move by 1/workers of the way towards
        the worker's own values, which are the buffer part of a push. So they never leave the range of the workers'
        values, a variance stays positive however stale the push, and buffers that are equal everywhere keep their bits.
        An average of n pushes moves them n times as far, at most all of the way. Elements that are not finite in the
        loaded model stay as they are until a push has a finite value, which they take. Second moments move like
        buffers; the first known value of a moment sets it.

        Args:
            gradient: flat vector as formed by :meth:`.Binding.subtract_from`, which :meth:`inspect` found to be finite.
                It is only read.
            result: the local model of a single worker, if :attr:`.OuterOptimizer.replaces_model` holds. Becomes the
                global model as it is, without the rounding errors of two subtractions.
            pushes: number of pushes that ``gradient`` is the average of. The version grows by it.

        Raises:
            ValueError: ``result`` was given, but the outer step does not replace the model by it.

        """
        if result is not None and not (self.outer_optimizer.replaces_model and self._workers == 1):
            raise ValueError(
                f"{self.outer_optimizer} with {self._workers} workers does not replace the model by a local one"
            )
        parameters, buffers, moments = self._split(self._checked(gradient))
        self.outer_optimizer.step(parameters, self.layout.views(parameters, "parameter"))
        share = min(1.0, pushes / self._workers)
        self._move_buffers(buffers, share)
        self._move_moments(moments, share)
        if result is not None:
            self.theta.copy_(self._checked(result))
        self.version += pushes

    def state_dict(self) -> dict[str, Any]:
        """Return copies of everything that training needs to continue: tensors by name, and plain values."""
        return {
            "version": self.version,
            "outer_optimizer": type(self.outer_optimizer).__name__,
            "shapes": {name: list(view.shape) for name, view in self._model_views().items()},
            "theta": {name: view.clone() for name, view in self._model_views().items()},
            "moments": {name: view.clone() for name, view in self.layout.views(self.theta, "moment").items()},
            "outer": self.outer_optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state``. Without ``"theta"`` in it, the model does not change. Moments that it lacks are unknown.

        Raises:
            ValueError: ``state`` belongs to another outer optimizer or model. The text names what does not fit. The
                model may be partly restored.

        """
        missing = [key for key in ("version", "outer_optimizer", "outer", "shapes") if key not in state]
        if missing:
            raise ValueError(f"the saved state of the global model lacks {missing}")
        outer_optimizer = type(self.outer_optimizer).__name__
        if state["outer_optimizer"] != outer_optimizer:
            raise ValueError(
                f"the checkpoint was written with outer_optimizer={state['outer_optimizer']}, this run has "
                f"{outer_optimizer}; use the same, or start from the checkpoint's weights only"
            )
        theta, views = state.get("theta"), self._model_views()
        shapes = {name: list(shape) for name, shape in state["shapes"].items()}
        # A buffer may have taken its shape in training. The module that is resumed has its value already.
        reshaped = {e.name for e in self.layout.entries if e.kind == "buffer" and shapes.get(e.name) != list(e.shape)}
        views = {name: view for name, view in views.items() if name not in reshaped}
        try:
            if theta is not None:
                theta = {name: value for name, value in theta.items() if name not in reshaped}
                check_saved_tensors("the saved global model", theta, views)
                for name, view in views.items():
                    view.copy_(theta[name])
                self._note_unset()
            else:
                saved = {n: torch.empty(shape, device="meta") for n, shape in shapes.items() if n not in reshaped}
                check_saved_tensors("the saved global model", saved, views)
            self._load_moments(state.get("moments", {}))
            self.outer_optimizer.load_state_dict(state["outer"])
        except ValueError as error:
            raise ValueError(
                f"{error}. The checkpoint belongs to another model, or this run trains other parameters (frozen ones "
                "are not exchanged); train the same parameters, or start a new run that loads the checkpoint's weights"
            ) from error
        self.version = int(state["version"])

    def _load_moments(self, saved: Mapping[str, Tensor]) -> None:
        """Restore the moments that are saved and exchanged; the others are unknown. Optimizers may have changed."""
        self._moments.fill_(math.nan)
        for name, view in self.layout.views(self.theta, "moment").items():
            if name in saved and saved[name].shape == view.shape:
                view.copy_(saved[name])

    def _model_views(self) -> dict[str, Tensor]:
        return self.layout.views(self.theta, "parameter", "buffer")

    def _note_unset(self) -> None:
        unset = ~torch.isfinite(self._buffers)
        self._unset = unset if bool(unset.any()) else None

    def _buffers_are_valid(self, buffers: Tensor) -> bool:
        """Return whether the buffers of a push are finite wherever they must be."""
        if all(math.isfinite(square_sum(chunk)) for (chunk,) in chunks(buffers)):
            return True
        return self._unset is not None and bool((torch.isfinite(buffers) | self._unset).all())

    def _first_invalid(self, flat: Tensor) -> str:
        """Return the name of the first tensor with an element that must not be in a push."""
        invalid = ~torch.isfinite(flat)
        _, buffers, moments = self._split(invalid)
        if self._unset is not None:
            buffers &= ~self._unset
        moments.copy_(_is_invalid_moment(self._split(flat)[2]))
        index = int(invalid.nonzero()[0])
        return next(f"{e.kind} {e.name!r}" for e in self.layout.entries if e.offset <= index < e.offset + e.numel)

    def _move_buffers(self, buffers: Tensor, share: float) -> None:
        if self._unset is None:
            self._buffers.lerp_(buffers, share)
            return
        moved = torch.where(torch.isfinite(self._buffers), torch.lerp(self._buffers, buffers, share), buffers)
        self._buffers.copy_(torch.where(torch.isfinite(buffers), moved, self._buffers))

    def _move_moments(self, moments: Tensor, share: float) -> None:
        for own, pushed in chunks(self._moments, moments):
            if math.isfinite(float(own.sum() + pushed.sum())):
                own.lerp_(pushed, share)
            else:  # Some are unknown.
                moved = torch.where(torch.isnan(own), pushed, torch.lerp(own, pushed, share))
                own.copy_(torch.where(torch.isnan(pushed), own, moved))

    def _split(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the parameters, the buffers and the moments."""
        layout = self.layout
        return (
            flat[: layout.parameter_numel],
            flat[layout.parameter_numel : layout.model_numel],
            flat[layout.model_numel :],
        )

    def _checked(self, flat: Tensor) -> Tensor:
        if flat.dtype != torch.float32 or flat.shape != self.theta.shape:
            raise ValueError(
                f"expected a flat fp32 vector of {self.layout.numel} elements, got {flat.dtype} {list(flat.shape)}"
            )
        return flat


def _moments_are_valid(moments: Tensor) -> bool:
    """Return whether each moment is unknown (NaN), or finite and not negative."""
    for (chunk,) in chunks(moments):
        low, high = (float(bound) for bound in torch.aminmax(chunk))
        # Both are NaN if any element is.
        if not (low >= 0.0 and high < math.inf) and bool(_is_invalid_moment(chunk).any()):
            return False
    return True


def _is_invalid_moment(moments: Tensor) -> Tensor:
    return (moments < 0.0) | torch.isinf(moments)


def square_sum(chunk: Tensor) -> float:
    """Return the sum of squares. It is infinite or NaN if and only if an element is."""
    total = float(torch.dot(chunk, chunk))
    if math.isfinite(total):
        return total
    # Squares of large finite elements overflow in fp32, so repeat the sum in fp64.
    return float(torch.linalg.vector_norm(chunk, dtype=torch.float64)) ** 2
