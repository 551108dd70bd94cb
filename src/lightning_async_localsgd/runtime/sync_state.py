"""Synchronizes module state that is not exchanged: frozen parameters, integer buffers, changes by hooks at the end.

Such state does not change in a way that could be merged. All ranks take rank 0's values through the rendezvous
instead. Before training, only tensors that differ between ranks are sent: pretrained weights, which are the same on
all ranks, cost only their hashes. Ranks may have the same tensor in other dtypes, because each has a precision of its
own. Then the values count as bf16 has them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from torch import nn

    from lightning_async_localsgd.launch.rendezvous import Rendezvous
    from lightning_async_localsgd.protocol.layout import Layout

_log = logging.getLogger(__name__)

_MAX_NAMES = 5
"""Number of tensor names that an error text lists."""


def unexchanged_tensors(module: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """Return the tensors of ``module`` that all ranks need but that are not in ``layout``, by name.

    These are frozen parameters, and parameters and persistent buffers that are not floating-point.
    """
    exchanged = {spec.name for spec in layout.entries}
    tensors = {**dict(module.named_parameters()), **persistent_buffers(module)}
    return {
        part: tensor
        for name, whole in tensors.items()
        if name not in exchanged
        for part, tensor in _plain_tensors(name, whole)
    }


def counter_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers that are not floating-point, such as ``num_batches_tracked``, by name."""
    return {name: buffer for name, buffer in persistent_buffers(module).items() if not buffer.is_floating_point()}


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return two hashes of each tensor, with a colon in between.

    The first one is of the shape and the values in bf16, and is equal for fp64, fp32 and bf16 versions of a tensor. The
    second one is of the dtype, the shape and the exact bytes. Dtypes of 8 and 4 bits, in which weights are quantized,
    are no precision of a Trainer, and count with their exact bytes.
    """
    return {name: _digest(tensor) for name, tensor in tensors.items()}


def frozen_digest(module: nn.Module, tensors: Mapping[str, Tensor], digests: Mapping[str, str]) -> str:
    """Return three hashes of all tensors that must be equal on all workers, which excludes the module's counters.

    They are of the dtypes, of the values in bf16, and of the exact values, see :func:`same_frozen`.

    Args:
        module: the module.
        tensors: tensors by name.
        digests: hashes of each tensor, see :func:`tensor_digests`.

    """
    kept = sorted(digests.keys() - counter_buffers(module).keys())
    dtypes = [(name, str(tensors[name].dtype)) for name in kept]
    rounded = [(name, digests[name].partition(":")[0]) for name in kept]
    exact = [(name, digests[name].partition(":")[2]) for name in kept]
    return ":".join(hashlib.sha256(json.dumps(pairs).encode()).hexdigest() for pairs in (dtypes, rounded, exact))


def same_frozen(first: str, second: str) -> bool:
    """Return whether two workers have the same frozen parameters, given the :func:`frozen_digest` of each.

    Equal dtypes need exactly the same values. With unequal ones, the values count as bf16 has them.
    """
    one, other = first.split(":"), second.split(":")
    return one == other or (one[0] != other[0] and one[1:2] == other[1:2])


def sync_differing(tensors: Mapping[str, Tensor], digests: Mapping[str, str], rendezvous: Rendezvous) -> None:
    """Overwrite tensors that differ between ranks with rank 0's values. All ranks must call this.

    Args:
        tensors: tensors by name.
        digests: hashes of each tensor, see :func:`tensor_digests`.
        rendezvous: meeting point of the ranks.

    Raises:
        ValueError: A rank has tensors with other names, shapes or dtypes than rank 0. All dtypes of floating-point
            numbers count as equal.

    """
    dtypes = {name: str(tensor.dtype) for name, tensor in tensors.items()}
    specs = {
        name: ["floating" if tensor.is_floating_point() else dtypes[name], *tensor.shape]
        for name, tensor in tensors.items()
    }
    specs_of_rank_0, dtypes_of_rank_0, digests_of_rank_0 = rendezvous.broadcast((specs, dtypes, dict(digests)))
    names = specs.keys() | specs_of_rank_0.keys()
    own_mismatches = sorted(name for name in names if specs.get(name) != specs_of_rank_0.get(name))
    own_differing = [
        name
        for name, digest in digests.items()
        if digest != (other := digests_of_rank_0.get(name, ""))
        and (dtypes[name] == dtypes_of_rank_0.get(name) or digest.partition(":")[0] != other.partition(":")[0])
    ]
    any_differing: set[str] = set()
    for rank in range(1, rendezvous.world_size):
        mismatches, differing = rendezvous.broadcast((own_mismatches, own_differing), src=rank)
        if mismatches:
            raise ValueError(
                f"frozen parameters or buffers of rank {rank} differ from rank 0 in name, shape or dtype: "
                f"{mismatches[:_MAX_NAMES]}; build the same model on all ranks"
            )
        any_differing.update(differing)
    to_send = [name for name in tensors if name in any_differing]
    if to_send and rendezvous.rank == 0:
        size = sum(tensors[name].numel() * tensors[name].element_size() for name in to_send)
        _log.info(
            "%d tensors that are not exchanged differ between ranks; all ranks take rank 0's values (%d bytes)",
            len(to_send), size,
        )  # fmt: skip
    broadcast_tensors({name: tensors[name] for name in to_send}, rendezvous)


def broadcast_tensors(tensors: Mapping[str, Tensor], rendezvous: Rendezvous) -> None:
    """Copy rank 0's values into ``tensors`` on all other ranks, where they must have the same names and shapes."""
    with torch.no_grad():
        for tensor in tensors.values():
            # One at a time, so that only one tensor is in memory twice.
            value = rendezvous.broadcast(tensor.detach().cpu() if rendezvous.rank == 0 else None)
            if rendezvous.rank > 0:
                tensor.copy_(value)


def sync_buffers(module: nn.Module, names: Sequence[str], rendezvous: Rendezvous) -> None:
    """Give all ranks some of rank 0's buffers, whatever their shapes are by now.

    Args:
        module: the module.
        names: names of the buffers. Only rank 0's names count.
        rendezvous: meeting point of the ranks.

    """
    for name in rendezvous.broadcast(list(names)):
        buffer = persistent_buffers(module)[name].detach().cpu() if rendezvous.rank == 0 else None
        value = rendezvous.broadcast(buffer)
        if rendezvous.rank > 0:
            set_buffer(module, name, value)


def set_buffer(module: nn.Module, name: str, value: Tensor) -> None:
    """Set a buffer to a value. If the shape or dtype differs, the buffer's tensor is replaced.

    A floating-point buffer keeps its dtype, which follows from the precision of the rank.
    """
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    present = owner._buffers.get(key)
    if present is not None and present.is_floating_point() and value.is_floating_point():
        value = value.to(present.dtype)
    if present is not None and present.shape == value.shape and present.dtype == value.dtype:
        with torch.no_grad():
            present.copy_(value)
        return
    near = present if present is not None else next(module.parameters())
    if key in owner._buffers:
        owner._buffers[key] = value.to(near.device)
    else:
        owner.register_buffer(key, value.to(near.device))


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers by name. A shared buffer is returned once, under its first name."""
    buffers: dict[int, tuple[str, Tensor]] = {}
    for prefix, owner in module.named_modules():
        for key, buffer in owner._buffers.items():
            if buffer is not None and key not in owner._non_persistent_buffers_set:
                buffers.setdefault(id(buffer), (f"{prefix}.{key}" if prefix else key, buffer))
    return dict(buffers.values())


def _plain_tensors(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield ``tensor`` as plain tensors that share its memory. A quantized weight may consist of several."""
    if is_traceable_wrapper_subclass(tensor):
        for part in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(f"{name}.{part}", getattr(tensor, part))
    else:
        yield name, tensor.detach().as_subclass(Tensor)


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().to_dense() if tensor.layout != torch.strided else tensor.detach().cpu()
    exact = _hash_of(data)
    if not data.is_floating_point() or data.itemsize == 1 or data.dtype == torch.bfloat16:
        return f"{exact}:{exact}"
    return f"{_hash_of(data.to(torch.bfloat16))}:{exact}"


def _hash_of(data: Tensor) -> str:
    digest = hashlib.sha256(f"{data.dtype}{list(data.shape)}".encode())
    digest.update(data.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
