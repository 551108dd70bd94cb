"""Walks over the tensors of a module, and decides which of them can be exchanged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Kind = Literal["parameter", "buffer", "moment"]
"""Kind of a tensor. In the flat vector, tensors are in the order of these kinds."""

DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
"""Dtypes that can be exchanged, by name."""


def places(module: nn.Module) -> Iterator[tuple[str, Kind, nn.Module, str]]:
    """Yield (name, kind, owner, key) of every parameter, then of every persistent buffer, shared tensors once."""
    seen: set[int] = set()
    for prefix, owner in module.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}.{key}" if prefix else key, "parameter", owner, key
    for prefix, owner in module.named_modules():
        for key, buffer in owner._buffers.items():
            if buffer is not None and id(buffer) not in seen and key not in owner._non_persistent_buffers_set:
                seen.add(id(buffer))
                yield f"{prefix}.{key}" if prefix else key, "buffer", owner, key


def fetch(part: Tensor, tensor: Tensor) -> Tensor:
    """Copy ``tensor`` into ``part`` of a flat vector. Copies from a device need :meth:`Binding.synchronize`."""
    # Convert to fp32 on the device. A converting copy would convert on the host, before the values have arrived.
    return part.copy_(tensor.to(part.dtype) if tensor.is_cuda else tensor, non_blocking=True)


def tensor_at(owner: nn.Module, kind: Kind, key: str) -> Tensor:
    """Return the tensor that a module has under a key.

    Raises:
        RuntimeError: the tensor was removed.

    """
    tensor = owner._parameters[key] if kind == "parameter" else owner._buffers[key]
    if tensor is None:
        raise RuntimeError(f"{kind} {key!r} of {type(owner).__name__} was removed during training")
    return tensor


def is_frozen(kind: Kind, tensor: Tensor) -> bool:
    """Return whether ``tensor`` is a frozen parameter."""
    return kind == "parameter" and not tensor.requires_grad


def check_whole(name: str, kind: Kind, tensor: Tensor) -> None:
    """Check that ``tensor``, exchanged or not, is materialized and not sharded.

    Raises:
        ValueError: the tensor is sharded, lazy, or on the meta device.

    """
    what = f"{kind} {name!r}"
    classes = {cls.__name__ for cls in type(tensor).__mro__}
    if classes & {"DTensor", "ShardedTensor", "FlatParameter"} or getattr(tensor, "_is_flat_param", False):
        raise ValueError(
            f"{what} is sharded ({type(tensor).__name__}), but every worker needs the whole model; turn off FSDP, "
            "tensor parallelism and DeepSpeed"
        )
    if is_lazy(tensor):
        raise ValueError(f"{what} is not initialized; run one batch through the lazy modules before fit")
    if tensor.is_meta:
        raise ValueError(f"{what} is on the meta device; materialize it (`module.to_empty(...)`) before fit")


def is_exchanged(name: str, kind: Kind, tensor: Tensor) -> bool:
    """Return whether ``tensor``, which is not left out as frozen, belongs to the layout.

    Raises:
        ValueError: the tensor belongs to the layout, but cannot be exchanged.

    """
    what = f"{kind} {name!r}"
    if kind == "parameter" and tensor.is_complex():
        raise ValueError(f"{what} is complex; keep it as a real tensor and use `torch.view_as_complex` in forward")
    if not tensor.is_floating_point():
        return False
    if tensor.layout != torch.strided:
        raise ValueError(f"{what} is sparse ({tensor.layout}); keep it as a dense tensor")
    if str(tensor.dtype) not in DTYPES:
        raise ValueError(
            f"{what} has dtype {tensor.dtype}, which cannot be exchanged; use one of {', '.join(sorted(DTYPES))}"
        )
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(
            f"{what} of shape {list(tensor.shape)} is expanded: several elements share memory (strides "
            f"{list(tensor.stride())}); give each element its own memory with `.contiguous()`"
        )
    return True
