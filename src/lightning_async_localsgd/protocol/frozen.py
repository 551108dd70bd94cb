"""Frozen parameters that change during training, because the module moves them itself.

A teacher that follows its student (BYOL, MoCo, DINO, mean teacher) and a target network are parameters with
``requires_grad=False``. They look like a frozen backbone until they change. So frozen parameters are not part of the
layout, and are watched instead: those that have changed are exchanged from then on, beside the flat vector. A backbone
that never changes costs a few compared elements in each round.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_async_localsgd.protocol.messages import MessageError
from lightning_async_localsgd.protocol.module_tensors import DTYPES, fetch, places, tensor_at

if TYPE_CHECKING:
    from lightning_async_localsgd.protocol.layout import Layout

_SAMPLED = 16
"""Elements of each parameter that are compared in each round."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class FrozenParameters:
    """The frozen parameters of a module that are not in its layout and could be exchanged. They are numbered in order.

    Args:
        module: the module, before training. All ranks must have the same frozen parameters.
        layout: the layout of the module.

    Attributes:
        names: names of the parameters.
        sizes: their numbers of elements.

    Example::

        >>> module = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1).requires_grad_(False))
        >>> from lightning_async_localsgd.protocol.layout import Layout
        >>> frozen = FrozenParameters(module, Layout.of(module))
        >>> frozen.watch()
        >>> frozen.changed()
        []
        >>> _ = module[1].bias.data.add_(1.0)
        >>> [frozen.names[number] for number in frozen.changed()]
        ['1.bias']

    """

    def __init__(self, module: nn.Module, layout: Layout) -> None:
        self._module = module
        exchanged = {entry.name for entry in layout.entries}
        self._watched: dict[int, _FirstValue] = {}
        self._samples: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._changed: set[int] = set()
        self.names: list[str] = []
        self.sizes: list[int] = []
        for name, kind, owner, key in places(module):
            tensor = tensor_at(owner, kind, key)
            if kind == "parameter" and name not in exchanged and _can_be_exchanged(tensor):
                self.names.append(name)
                self.sizes.append(tensor.numel())

    def watch(self) -> None:
        """Remember the present values, which all ranks have by now. Changes from them count."""
        tensors = self.tensors()
        self._changed.clear()
        self._watched = {number: _FirstValue(tensors[name]) for number, name in enumerate(self.names)}
        self._samples = self._sampled(tensors)

    def numel(self, numbers: Iterable[int]) -> int:
        """Return the number of elements of some of the parameters."""
        return sum(self.sizes[number] for number in numbers)

    def changed(self, thorough: bool = False) -> list[int]:
        """Return the numbers of the parameters that have changed since :meth:`watch`.

        Args:
            thorough: read all elements. Otherwise, a change of a few elements through ``.data`` may be missed.

        """
        tensors = self.tensors()
        samples = self._sampled(tensors)
        # One comparison for all parameters is enough as long as none changes.
        if thorough or samples.keys() != self._samples.keys() or not _equal_samples(samples, self._samples):
            differing = {
                number
                for number, first in self._watched.items()
                if self.names[number] in tensors and first.differs_from(tensors[self.names[number]])
            }
        else:
            differing = {
                number
                for number, first in self._watched.items()
                if self.names[number] in tensors and first.was_written(tensors[self.names[number]])
            }
        if differing:
            self._changed |= differing
            self._watched = {number: first for number, first in self._watched.items() if number not in differing}
            self._samples = self._sampled(tensors)
        return sorted(self._changed)

    def _sampled(self, tensors: Mapping[str, Tensor]) -> dict[tuple[torch.device, torch.dtype], Tensor]:
        """Return some elements of all watched parameters, as integers, by device and dtype."""
        parts: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for number in self._watched:
            tensor = tensors.get(self.names[number])
            if tensor is not None:
                parts.setdefault((tensor.device, tensor.dtype), []).append(_sample(tensor))
        return {kind: _bits(torch.cat(samples)) for kind, samples in parts.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return the module's tensors by name. The module may have replaced tensors, and whole submodules."""
        return dict(self._module.named_parameters())

    def read(self, numbers: Iterable[int]) -> Tensor:
        """Return the values of some of the parameters as one flat fp32 vector."""
        flat = torch.zeros(self.numel(numbers), dtype=torch.float32)
        with torch.no_grad():
            for part, tensor in self._parts(numbers, flat):
                fetch(part, tensor)
        _synchronize(self.tensors().values())
        return flat

    def load(self, numbers: Iterable[int], flat: Tensor) -> None:
        """Copy the values in a flat fp32 vector to some of the parameters, in place."""
        with torch.no_grad():
            for part, tensor in self._parts(numbers, flat):
                tensor.copy_(part, non_blocking=True)
        _synchronize(self.tensors().values())

    def differing(self, numbers: Iterable[int], flat: Tensor) -> list[str]:
        """Return the names of those parameters that differ from what :meth:`load` of ``flat`` would set."""
        numbers, tensors = list(numbers), self.tensors()
        return [
            self.names[number]
            for number, part in self.split(numbers, flat)
            if (tensor := tensors.get(self.names[number])) is None
            or tensor.numel() != part.numel()
            or not torch.equal(part.view(tensor.shape).to(tensor.device, tensor.dtype), tensor.detach())
        ]

    def split(self, numbers: Iterable[int], flat: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the number and the part of ``flat`` of each of some of the parameters."""
        return split(self.sizes, numbers, flat)

    def _parts(self, numbers: Iterable[int], flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        tensors = self.tensors()
        for number, part in self.split(numbers, flat):
            tensor = tensors.get(self.names[number])
            # A parameter that was removed or has another shape stays the worker's own.
            if tensor is not None and tensor.numel() == part.numel():
                yield part.view(tensor.shape), tensor


def split(sizes: list[int], numbers: Iterable[int], flat: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the number and the part of ``flat`` of each of some parameters, whose sizes are given by number."""
    start = 0
    for number in numbers:
        yield number, flat[start : start + sizes[number]]
        start += sizes[number]


def pack_numbers(numbers: Iterable[int]) -> str:
    """Return increasing numbers as a short text, such as ``"0-3,7"``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def unpack_numbers(text: str, count: int) -> list[int]:
    """Return the numbers that :func:`pack_numbers` has packed.

    Raises:
        MessageError: the numbers are not increasing, or not below ``count``.

    """
    numbers: list[int] = []
    try:
        for part in text.split(",") if text else ():
            first, dash, last = part.partition("-")
            begin, end = int(first), int(last if dash else first)
            if not (numbers[-1] if numbers else -1) < begin <= end < count:
                raise ValueError
            numbers.extend(range(begin, end + 1))
    except ValueError:
        raise MessageError(f"{text[:80]!r} does not list frozen parameters of {count}") from None
    return numbers


class _FirstValue:
    """What is remembered of a parameter's value, to notice changes without a copy of the parameter."""

    def __init__(self, tensor: Tensor) -> None:
        self._kind = tensor.shape, tensor.dtype
        self._sum = _sum_of_bits(tensor)
        self._sample = _bits(_sample(tensor)).clone()
        self._seen = _state(tensor)

    def was_written(self, tensor: Tensor) -> bool:
        """Return whether the parameter has changed, unless that was through ``.data``."""
        return _state(tensor) != self._seen and self.differs_from(tensor)

    def differs_from(self, tensor: Tensor) -> bool:
        """Return whether the parameter has changed."""
        if (tensor.shape, tensor.dtype) != self._kind:
            return True
        sample = _bits(_sample(tensor))
        if not torch.equal(sample, self._sample.to(sample.device)) or _sum_of_bits(tensor) != self._sum:
            return True
        # Written to without a change, for example by a callback that swaps weights.
        self._seen = _state(tensor)
        return False


def _equal_samples(first: Mapping[Any, Tensor], second: Mapping[Any, Tensor]) -> bool:
    return all(torch.equal(first[kind], second[kind]) for kind in first)


def _can_be_exchanged(tensor: Any) -> bool:
    if is_traceable_wrapper_subclass(tensor):
        return False
    return tensor.layout == torch.strided and str(tensor.dtype) in DTYPES and tensor.numel() > 0


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _sample(tensor: Tensor) -> Tensor:
    # In the order in memory: a flat view of another order, such as that of channels_last, would be a copy.
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    flat = tensor.detach().permute(order).reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED]


def _bits(tensor: Tensor) -> Tensor:
    """Return the elements as integers, so that NaN equals NaN."""
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])


def _sum_of_bits(tensor: Tensor) -> int:
    return int(_bits(tensor).sum(dtype=torch.int64))


def _synchronize(tensors: Iterable[Tensor]) -> None:
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
