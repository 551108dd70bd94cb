"""Averages the gradients of the workers in a step of the synchronous beginning, weighted by their samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lightning_async_localsgd.outer.base import check_saved_tensors, chunks
from lightning_async_localsgd.protocol.frozen import pack_numbers, unpack_numbers
from lightning_async_localsgd.protocol.messages import Push

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

    from lightning_async_localsgd.protocol.layout import Layout


@dataclass
class HeldGradient:
    """A gradient that waits for those of the other workers.

    Args:
        push: the header.
        gradient: mean gradient over the worker's samples, and the worker's buffers. A copy.

    """

    push: Push
    gradient: Tensor


class GradientAverages:
    """Holds the gradients of a step until it is complete, and averages them in the order of the workers' numbers.

    Gradients in a checkpoint were computed from the checkpoint's weights, so they belong to the first step of the
    resumed run.

    Args:
        layout: layout of the model. Of a gradient's vector, the moments mean nothing.

    Attributes:
        mean: the mean of the last step.
        absent: numbers of the parameters for which no worker had a gradient, see :attr:`.Reply.absent`.

    """

    def __init__(self, layout: Layout) -> None:
        self.mean: Tensor | None = None
        self.absent = ""
        self._layout = layout
        self._parameters = sum(entry.kind == "parameter" for entry in layout.entries)
        self._held: dict[int, HeldGradient] = {}
        self._restored: list[HeldGradient] = []
        self._free: list[Tensor] = []

    def __bool__(self) -> bool:
        """Return whether there is a gradient of the present step."""
        return bool(self._held or self._restored)

    def hold(self, push: Push, gradient: Tensor) -> None:
        """Hold a copy of a gradient.

        Raises:
            MessageError: the header names parameters that the model does not have.

        """
        unpack_numbers(push.absent, self._parameters)
        self._held[push.worker] = HeldGradient(push, self._buffer().copy_(gradient))

    def average(self) -> int:
        """Average the gradients of the step into :attr:`mean`, and return their number.

        Each gradient is weighted by its samples, and each worker's buffers count the same. Without any gradient, no
        parameter has one in the mean.
        """
        held = [*self._restored, *(self._held[worker] for worker in sorted(self._held))]
        self._restored.clear()
        self._held.clear()
        if self.mean is not None:
            self._free.append(self.mean)
        if not held:
            self.mean = self._buffer().zero_()
            self.absent = pack_numbers(range(self._parameters))
            return 0
        absent = set.intersection(*(set(unpack_numbers(one.push.absent, self._parameters)) for one in held))
        self.absent = pack_numbers(sorted(absent))
        total = sum(one.push.samples for one in held)
        factors = [one.push.samples * len(held) / total if total > 0 else 1.0 for one in held]
        first, *others = [one.gradient for one in held]
        split, end = self._layout.parameter_numel, self._layout.model_numel
        _average([flat[:split] for flat in (first, *others)], factors)
        _average([flat[split:end] for flat in (first, *others)], [1.0] * len(held))
        self.mean = first
        self._free += others
        return len(held)

    def drop(self) -> None:
        """Free all memory, because there are no more synchronous steps."""
        self.mean = None
        self._held.clear()
        self._restored.clear()
        self._free.clear()

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the gradients of the present step, as plain values and tensors."""
        held = [*self._restored, *(self._held[worker] for worker in sorted(self._held))]
        return [
            {
                "push": dataclasses.asdict(one.push),
                "gradient": {
                    name: view.clone() for name, view in self._layout.views(one.gradient, "parameter", "buffer").items()
                },
            }
            for one in held
        ]

    def load_state_dict(self, state: Collection[Mapping[str, Any]]) -> None:
        """Restore ``state``.

        Raises:
            ValueError: The gradients belong to another model. The text names what does not fit.

        """
        self._held.clear()
        self._restored.clear()
        for saved in state:
            flat = self._buffer().zero_()
            views = self._layout.views(flat, "parameter", "buffer")
            check_saved_tensors("a saved gradient", saved["gradient"], views)
            for name, view in views.items():
                view.copy_(saved["gradient"][name])
            self._restored.append(HeldGradient(Push(**saved["push"]), flat))

    def _buffer(self) -> Tensor:
        return self._free.pop() if self._free else torch.empty(self._layout.numel, dtype=torch.float32)


def _average(flats: list[Tensor], factors: list[float]) -> None:
    """Write the mean of ``flats`` times ``factors`` to the first of them: a sum in their order, then one division."""
    for first, *others in chunks(*flats):
        if factors[0] != 1.0:
            first.mul_(factors[0])
        for other, factor in zip(others, factors[1:], strict=True):
            first.add_(other, alpha=factor)
        first.div_(len(flats))
