"""A copy of a module's exchanged tensors, which stays on their devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_async_localsgd.protocol.layout import Binding


class ModuleCopy:
    """Saves the exchanged tensors of a module, and loads them again. The memory is kept for the next time.

    Args:
        binding: exchanged tensors of the module.

    Attributes:
        tensors: the saved tensors by name.

    Example::

        >>> from lightning_async_localsgd.protocol.layout import Binding, Layout
        >>> module = torch.nn.Linear(1, 1, bias=False)
        >>> copy = ModuleCopy(Binding(Layout.of(module), module))
        >>> _ = module.weight.data.fill_(1.0)
        >>> copy.save()
        >>> _ = module.weight.data.fill_(2.0)
        >>> copy.load()
        >>> module.weight.item()
        1.0

    """

    def __init__(self, binding: Binding) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._binding = binding

    def save(self) -> None:
        """Copy the module's tensors as they are."""
        with torch.no_grad():
            for name, tensor in self._binding.named().items():
                if name not in self.tensors:
                    self.tensors[name] = torch.empty_like(tensor, requires_grad=False)
                self.tensors[name].copy_(tensor)

    def load(self) -> None:
        """Copy the saved tensors into the module."""
        with torch.no_grad():
            for name, tensor in self._binding.named().items():
                tensor.copy_(self.tensors[name])
