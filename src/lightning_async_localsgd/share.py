"""What ranks agree on beside the exchanged tensors: frozen parameters, counters, what hooks do at the very end.

None of it changes in a way that could be merged, so it is not in the exchange. Every rank takes rank 0's values,
through the rendezvous: before training only what really differs, so that pretrained weights, which are the same
everywhere, cost no more than their hashes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from torch import nn

    from lightning_async_localsgd.layout import Layout
    from lightning_async_localsgd.rendezvous import Rendezvous

_log = logging.getLogger(__name__)

_SHOWN = 5
"""Names that an error shows."""


def not_exchanged(module: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """The tensors of ``module`` that all ranks need, but that are not in ``layout``, by name.

    These are frozen parameters, and what isn't floating-point among parameters and persistent buffers.
    """
    exchanged = {entry.name for entry in layout.entries}
    tensors = {**dict(module.named_parameters()), **_saved_buffers(module)}
    return {
        part: tensor for name, whole in tensors.items() if name not in exchanged for part, tensor in _plain(name, whole)
    }


def counters(module: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers that aren't floating-point, such as BatchNorm's ``num_batches_tracked``, by name."""
    return {name: buffer for name, buffer in _saved_buffers(module).items() if not buffer.is_floating_point()}


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A hash of every tensor's dtype, shape and bytes."""
    return {name: _digest(tensor) for name, tensor in tensors.items()}


def unshared(module: nn.Module, hashes: Mapping[str, str]) -> str:
    """One hash of all of ``hashes`` that are to be equal on every worker, counters of ``module`` left out."""
    left_out = counters(module)
    kept = {name: digest for name, digest in hashes.items() if name not in left_out}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def share_differing(tensors: Mapping[str, Tensor], hashes: Mapping[str, str], rendezvous: Rendezvous) -> None:
    """Gives every rank rank 0's values of ``tensors`` where any rank has others. Every rank calls this.

    Args:
        tensors: by name.
        hashes: of ``tensors``, see :func:`digests`.
        rendezvous: the meeting point.

    Raises:
        ValueError: a rank has tensors of other names, shapes or dtypes.

    """
    kinds = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in tensors.items()}
    its_kinds, its_hashes = rendezvous.broadcast((kinds, dict(hashes)))
    misfits = sorted(name for name in kinds.keys() | its_kinds.keys() if kinds.get(name) != its_kinds.get(name))
    mine = [name for name in tensors if hashes[name] != its_hashes.get(name)]
    names: set[str] = set()
    for rank in range(1, rendezvous.world_size):
        found, wanted = rendezvous.broadcast((misfits, mine), src=rank)
        if found:
            raise ValueError(
                f"frozen parameters or buffers of rank {rank} are not those of rank 0: {found[:_SHOWN]} differ in name,"
                " shape or dtype; build the same model on every rank"
            )
        names.update(wanted)
    differing = [name for name in tensors if name in names]
    if differing and rendezvous.rank == 0:
        size = sum(tensors[name].numel() * tensors[name].element_size() for name in differing)
        _log.info("%d tensors that are not exchanged differ between ranks; all take rank 0's (%d bytes)",
                  len(differing), size)  # fmt: skip
    send({name: tensors[name] for name in differing}, rendezvous)


def send(tensors: Mapping[str, Tensor], rendezvous: Rendezvous) -> None:
    """Gives every rank rank 0's values of ``tensors``, which on the others need the same names and shapes."""
    with torch.no_grad():
        for tensor in tensors.values():
            # One after the other: no more than one of them is in memory a second time.
            value = rendezvous.broadcast(tensor.detach().cpu() if rendezvous.rank == 0 else None)
            if rendezvous.rank > 0:
                tensor.copy_(value)


def _saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers, shared ones once, under the first of their names."""
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, owner in module.named_modules():
        for key, buffer in owner._buffers.items():
            if buffer is not None and key not in owner._non_persistent_buffers_set:
                found.setdefault(id(buffer), (f"{prefix}.{key}" if prefix else key, buffer))
    return dict(found.values())


def _plain(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """``tensor`` as ordinary tensors that share its memory; a quantised weight may be made of several."""
    if is_traceable_wrapper_subclass(tensor):
        for part in tensor.__tensor_flatten__()[0]:
            yield from _plain(f"{name}.{part}", getattr(tensor, part))
    else:
        yield name, tensor.detach().as_subclass(Tensor)


def _digest(tensor: Tensor) -> str:
    what = f"{tensor.dtype}{list(tensor.shape)}".encode()
    data = tensor.detach().cpu().to_dense() if tensor.layout != torch.strided else tensor.detach().cpu()
    state = hashlib.sha256(what)
    state.update(data.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
