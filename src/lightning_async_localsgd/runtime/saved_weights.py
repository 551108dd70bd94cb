"""The global model's weights in a module's ``state_dict``, found by the memory of the exchanged tensors."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lightning_async_localsgd.protocol.layout import Binding


def replace_weights(
    state: dict[str, Any],
    module: nn.Module,
    binding: Binding,
    weights: Mapping[str, Tensor],
    shared: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({}),
) -> tuple[dict[str, Any], list[Tensor]]:
    """Replace the exchanged tensors in a module's ``state_dict``.

    The module may have renamed or omitted entries, so the exchanged tensors are found by their memory. This also
    covers tied parameters.

    Args:
        state: ``state_dict`` of ``module``, on the module's own memory.
        module: the module.
        binding: the exchanged tensors of the module.
        weights: fp32 weights by name.
        shared: frozen parameters that change in training by name: the module's tensor, and the value to save.

    Returns:
        A new ``state_dict``, in which all tensors that training may change are copies, and the replaced tensors.

    """
    names = _names_by_memory(binding)
    names.update({(tensor.data_ptr(), tensor.shape): name for name, (tensor, _) in shared.items()})
    values = {**weights, **{name: value for name, (_, value) in shared.items()}}
    frozen = {parameter.data_ptr() for parameter in module.parameters() if not parameter.requires_grad}
    copies: dict[str, Tensor] = {}
    replaced = dict(state)
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        name = names.get((value.data_ptr(), value.shape))
        if name is None:
            replaced[key] = value if value.data_ptr() in frozen else value.clone()
        else:
            if name not in copies:
                copies[name] = values[name].to(value.device, value.dtype, copy=True)
            replaced[key] = copies[name]
    return replaced, list(copies.values())


def restores_weights(state: Mapping[str, Any], binding: Binding) -> bool:
    """Return whether loading a module's ``state_dict`` restores all exchanged tensors to the last bit.

    The state does not if a tensor is missing or is not fp32, because the global model is kept in fp32.
    """
    tensors = {(value.data_ptr(), value.shape) for value in state.values() if isinstance(value, Tensor)}
    all_fp32 = all(spec.dtype == "torch.float32" for spec in binding.entries)
    return all_fp32 and _names_by_memory(binding).keys() <= tensors


def _names_by_memory(binding: Binding) -> dict[tuple[int, torch.Size], str]:
    """Return the names of the exchanged tensors by address and shape."""
    return {(tensor.data_ptr(), tensor.shape): name for name, tensor in binding.named().items() if tensor.numel() > 0}
