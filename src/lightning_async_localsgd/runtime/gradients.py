"""Copies gradients between a module and a flat vector, for the steps of the synchronous beginning."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from lightning_async_localsgd.protocol.module_tensors import fetch

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_async_localsgd.protocol.layout import Binding


def read_gradients(binding: Binding, out: Tensor, factor: float = 1.0) -> list[int]:
    """Copy the gradients of a module's parameters, and its buffers, into a flat vector.

    Args:
        binding: exchanged tensors of the module.
        out: the flat vector. Its moments become zero.
        factor: factor of the gradients.

    Returns:
        Numbers of the parameters without a gradient, in the layout's order. Their part of the vector becomes zero.

    Raises:
        RuntimeError: A parameter has a sparse gradient, or was frozen when training began and is trainable now.

    """
    binding.check_frozen()
    absent: list[int] = []
    with torch.no_grad():
        out[binding.layout.parameter_numel :].zero_()
        for number, (entry, part, tensor) in enumerate(binding.parts(out)):
            if entry.kind == "buffer":
                fetch(part, tensor)
            elif tensor.grad is None:
                absent.append(number)
                part.zero_()
            elif tensor.grad.layout != torch.strided:
                raise RuntimeError(
                    f"parameter {entry.name!r} has a sparse gradient, which cannot be averaged in the synchronous "
                    "beginning; use sparse=False in the layer, or sync_warmup_steps=0"
                )
            else:
                fetch(part, tensor.grad)
    binding.synchronize()
    if factor != 1.0:
        out[: binding.layout.parameter_numel].mul_(factor)
    return absent


def write_gradients(binding: Binding, flat: Tensor, absent: Collection[int]) -> None:
    """Copy a flat vector into the gradients of a module's parameters, and into its buffers.

    Args:
        binding: exchanged tensors of the module.
        flat: the flat vector.
        absent: numbers of the parameters whose gradient becomes None. If no parameter has a gradient, the buffers stay.

    """
    missing = set(absent)
    parts = list(binding.parts(flat))
    none_has_one = len(missing) == sum(entry.kind == "parameter" for entry, _, _ in parts)
    with torch.no_grad():
        for number, (entry, part, tensor) in enumerate(parts):
            if entry.kind == "buffer":
                if not none_has_one:
                    tensor.copy_(part, non_blocking=True)
            elif number in missing:
                tensor.grad = None
            elif tensor.grad is None:
                tensor.grad = part.to(tensor.device, tensor.dtype, copy=True)
            else:
                tensor.grad.copy_(part, non_blocking=True)
    binding.synchronize()


def drop_gradients(binding: Binding) -> None:
    """Remove the gradients of a module's parameters, so that an optimizer step changes nothing."""
    for tensor in binding.tensors():
        tensor.grad = None
