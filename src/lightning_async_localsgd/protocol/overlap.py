"""What a worker learns between a push and its answer, so that it need not wait for the answer.

With overlap, a worker goes on training from its local model theta_local while its push is in flight. When the new
global model theta_new arrives, the worker adopts theta_new + (theta_local - theta_pushed): what it has learned
meanwhile is kept. The next pseudo-gradient is taken against theta_new, so these steps are pushed once, with the next
round. Streaming DiLoCo (arXiv 2501.18512) and eager updates (arXiv 2502.12996) overlap averages in similar ways.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_async_localsgd.protocol.module_copy import ModuleCopy
from lightning_async_localsgd.protocol.module_tensors import fetch

if TYPE_CHECKING:
    from lightning_async_localsgd.protocol.layout import Binding


class LocalProgress:
    """Remembers what a worker has pushed, and moves the worker's progress since then onto another model.

    Parameters move by their difference. Buffers and second moments are statistics, whose differences do not add up: a
    few stale ones would take a falling variance below zero. So each element of them moves by its difference, but only
    as far as the worker's own value, and stays between two values that workers had.

    Keeps a copy of the exchanged tensors, on their devices, and of the second moments.

    Args:
        binding: exchanged tensors of the module.

    Example::

        >>> from lightning_async_localsgd.protocol.layout import Binding, Layout
        >>> module = torch.nn.Linear(1, 1, bias=False)
        >>> _ = module.weight.data.fill_(1.0)
        >>> binding = Binding(Layout.of(module), module)
        >>> progress = LocalProgress(binding)
        >>> progress.mark(binding.new_flat())  # the model is pushed with a weight of 1
        >>> _ = module.weight.data.fill_(1.5)  # and trained on
        >>> progress.load_onto(torch.tensor([3.0]))
        >>> module.weight.item()
        3.5

    """

    def __init__(self, binding: Binding) -> None:
        layout = binding.layout
        self._binding = binding
        self._pushed = ModuleCopy(binding)
        self._moments = torch.empty(layout.numel - layout.model_numel, dtype=torch.float32)

    def mark(self, push: Tensor | None) -> None:
        """Remember the module's tensors as they are, and the second moments in the push that was made of them.

        Args:
            push: flat fp32 vector, see :meth:`.Binding.subtract_from`; None if no step was pushed.

        """
        self._pushed.save()
        if push is None:
            self._moments.fill_(math.nan)
        else:
            self._moments.copy_(push[self._binding.layout.model_numel :])

    def restore(self) -> None:
        """Load the remembered tensors into the module."""
        self._pushed.load()

    def load_onto(self, model: Tensor) -> None:
        """Load ``model`` plus the progress since :meth:`mark` into the module and the inner optimizers.

        If a parameter is not fp32, the rounded sum minus the progress is written back to ``model``. Otherwise the next
        pseudo-gradient would contain the rounding error as if it had been learned.

        Args:
            model: flat fp32 vector.

        """
        with torch.no_grad():
            for entry, part, tensor in self._binding.parts(model):
                mark = self._pushed.tensors[entry.name]
                new = part.to(tensor.device, tensor.dtype, non_blocking=True)
                if entry.kind == "buffer":
                    tensor.copy_(_moved_statistic(new, tensor, mark))
                    continue
                progress = torch.sub(tensor, mark, out=mark)
                tensor.copy_(new).add_(progress)
                if tensor.dtype != torch.float32:
                    fetch(part, tensor - progress)
            self._load_moments(model)
        # Complete the copies before the caller writes to ``model`` again, or reads the rounded values.
        self._binding.synchronize()

    def _load_moments(self, model: Tensor) -> None:
        moments = self._binding.moments
        if moments is None:
            return
        begin = self._binding.layout.model_numel
        for entry, part, parameter in self._binding.moment_parts(model):
            own = moments.read(parameter)
            if own is not None:
                mark = self._moments[entry.offset - begin : entry.offset - begin + entry.numel].view(entry.shape)
                new, mark = (value.to(own.device, own.dtype) for value in (part, mark))
                moments.write(parameter, _moved_statistic(new, own, mark))


def _moved_statistic(new: Tensor, own: Tensor, mark: Tensor) -> Tensor:
    """Move ``new`` by the change of ``own`` since ``mark``, not beyond ``own``. If that is not finite, keep it."""
    moved = (own - mark).add_(new).clamp_(torch.minimum(new, own), torch.maximum(new, own))
    return torch.where(torch.isfinite(moved), moved, new)
