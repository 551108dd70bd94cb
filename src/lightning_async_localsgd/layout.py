"""Where each tensor of a module lies in the flat vector that workers and the server exchange.

The model is one flat fp32 vector: first every trainable floating-point parameter in the order of ``named_parameters``
(tied ones once), then every floating-point persistent buffer. Frozen parameters are left out, since nothing changes
them: a model with adapters (LoRA) exchanges its adapters. Where parameters may be unfrozen while training runs, frozen
ones belong to the layout, too, which never changes during a run. Integer and complex tensors, such as BatchNorm's
``num_batches_tracked``, and non-persistent buffers stay with each worker.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Kind = Literal["parameter", "buffer"]

_DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
_MAX_ELEMENTS = 2**53
_SHOWN_DIFFERENCES = 5


@dataclass(frozen=True)
class Entry:
    """One tensor's place in the flat vector.

    Args:
        name: as in ``named_parameters`` or ``named_buffers``.
        shape: of the tensor.
        dtype: of the tensor in the module, such as ``"torch.bfloat16"``; the flat vector is always fp32.
        kind: ``"parameter"`` or ``"buffer"``.
        offset: of the first element in the flat vector.
        numel: elements.

    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    offset: int
    numel: int

    def __str__(self) -> str:
        return f"{self.name!r} {self.dtype.removeprefix('torch.')} {list(self.shape)}"


class Layout:
    """The ordered tensors of a model and their places in the flat vector.

    Args:
        tensors: (name, shape, dtype, kind) of each tensor, parameters before buffers.

    Raises:
        ValueError: a name occurs twice, or a parameter follows a buffer.

    Example::

        >>> layout = Layout.of(torch.nn.Linear(3, 2))
        >>> [(entry.name, entry.offset, entry.numel) for entry in layout.entries]
        [('weight', 0, 6), ('bias', 6, 2)]
        >>> flat = torch.arange(8.0)
        >>> layout.views(flat)["bias"]
        tensor([6., 7.])

    """

    def __init__(self, tensors: list[tuple[str, tuple[int, ...], str, Kind]]) -> None:
        entries: list[Entry] = []
        names: set[str] = set()
        offset = 0
        parameter_numel = 0
        for name, shape, dtype, kind in tensors:
            if name in names:
                raise ValueError(f"the layout names {name!r} twice")
            if kind == "parameter" and entries and entries[-1].kind == "buffer":
                raise ValueError(f"parameter {name!r} follows a buffer; parameters come first")
            names.add(name)
            numel = math.prod(shape)
            entries.append(Entry(name, shape, dtype, kind, offset, numel))
            offset += numel
            if kind == "parameter":
                parameter_numel = offset
        self.entries: tuple[Entry, ...] = tuple(entries)
        self.numel = offset
        self.parameter_numel = parameter_numel
        self.fingerprint: str = hashlib.sha256(
            json.dumps(self.describe(), separators=(",", ":"), ensure_ascii=True).encode()
        ).hexdigest()

    @classmethod
    def of(cls, module: nn.Module, frozen: bool = False) -> Layout:
        """The layout of ``module``.

        Args:
            module: the module, its parameters frozen as they will be when training starts.
            frozen: whether parameters with ``requires_grad=False`` belong to it.

        Raises:
            ValueError: the module has no trainable parameter, or a tensor that can't be exchanged; the text names it
                and says what to do.

        """
        tensors: list[tuple[str, tuple[int, ...], str, Kind]] = []
        trainable = False
        for name, kind, owner, key in _places(module):
            tensor = _tensor_at(owner, kind, key)
            _check_whole(name, kind, tensor)
            if (_is_frozen(kind, tensor) and not frozen) or not _is_exchanged(name, kind, tensor):
                continue
            tensors.append((name, tuple(tensor.shape), str(tensor.dtype), kind))
            trainable = trainable or (kind == "parameter" and tensor.requires_grad)
        if not trainable:
            raise ValueError(
                f"{type(module).__name__} has no trainable parameter, so there is nothing to train; create the"
                " parameters in `__init__` or `configure_model` and leave `requires_grad=True` on at least one"
            )
        return cls(tensors)

    def describe(self) -> list[list[Any]]:
        """The ordered [name, shape, dtype, kind] list, made of JSON's types only."""
        return [[entry.name, list(entry.shape), entry.dtype, entry.kind] for entry in self.entries]

    @classmethod
    def from_description(cls, description: Any) -> Layout:
        """The layout that :meth:`describe` has described, possibly on another machine.

        Raises:
            ValueError: this is no description of a layout.

        """
        if not isinstance(description, list):
            raise ValueError(f"a layout's description is a list, got {type(description).__name__}")
        tensors: list[tuple[str, tuple[int, ...], str, Kind]] = []
        numel = 0
        for index, item in enumerate(description):
            if not (isinstance(item, list) and len(item) == 4):
                raise ValueError(f"entry {index} of a layout's description must be [name, shape, dtype, kind]")
            name, shape, dtype, kind = item
            good_shape = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
            numel += math.prod(shape) if good_shape else 0
            if not (
                isinstance(name, str)
                and good_shape
                and isinstance(dtype, str)
                and dtype in _DTYPES
                and kind in ("parameter", "buffer")
                and numel < _MAX_ELEMENTS
            ):
                raise ValueError(f"entry {index} of a layout's description is invalid: {str(item)[:200]}")
            tensors.append((name, tuple(shape), dtype, kind))
        return cls(tensors)

    def difference(self, other: Layout) -> str:
        """The first differences to ``other`` ("there") in readable lines; empty if there are none."""
        lines: list[str] = []
        count = 0
        for kind in ("parameter", "buffer"):
            here = [entry for entry in self.entries if entry.kind == kind]
            there = [entry for entry in other.entries if entry.kind == kind]
            for index in range(max(len(here), len(there))):
                mine = str(here[index]) if index < len(here) else "nothing"
                theirs = str(there[index]) if index < len(there) else "nothing"
                if mine == theirs:
                    continue
                count += 1
                if count <= _SHOWN_DIFFERENCES:
                    lines.append(f"{kind} {index}: {mine} here, {theirs} there")
        if count > _SHOWN_DIFFERENCES:
            lines.append(f"and {count - _SHOWN_DIFFERENCES} more")
        return "\n".join(lines)

    def views(self, flat: Tensor, kind: Kind | None = None) -> dict[str, Tensor]:
        """Shaped views into ``flat`` by name.

        Args:
            flat: the flat vector; with ``kind="parameter"`` its parameter part alone will do.
            kind: only parameters, or only buffers.

        Raises:
            ValueError: ``flat`` has another length.

        """
        if flat.numel() != self.numel and not (kind == "parameter" and flat.numel() == self.parameter_numel):
            raise ValueError(f"the flat vector has {flat.numel()} elements, the layout {self.numel}")
        return {
            entry.name: flat[entry.offset : entry.offset + entry.numel].view(entry.shape)
            for entry in self.entries
            if kind is None or entry.kind == kind
        }


class Binding:
    """A module's live tensors under a layout.

    The tensors are looked up anew at each call, since a module may put another tensor in a buffer's place. Copies from
    and to CUDA devices run side by side, on the devices' current streams, and are complete when a method returns.

    Args:
        layout: of ``module``.
        module: the module whose tensors are read and written.

    Raises:
        ValueError: ``module`` has another layout.

    """

    def __init__(self, layout: Layout, module: nn.Module) -> None:
        wanted = {entry.name for entry in layout.entries}
        places = list(_places(module))
        frozen = any(name in wanted and _is_frozen(kind, _tensor_at(at, kind, key)) for name, kind, at, key in places)
        difference = Layout.of(module, frozen).difference(layout)
        if difference:
            raise ValueError(f"{type(module).__name__} does not have the layout it is bound to:\n{difference}")
        self.layout = layout
        self._places = [(kind, owner, key) for name, kind, owner, key in places if name in wanted]
        self._left_out = [
            (name, owner, key) for name, kind, owner, key in places if kind == "parameter" and name not in wanted
        ]

    def tensors(self) -> list[Tensor]:
        """The module's tensors in the layout's order."""
        return [_tensor_at(owner, kind, key) for kind, owner, key in self._places]

    def named(self) -> dict[str, Tensor]:
        """The module's tensors by name."""
        return {entry.name: tensor for entry, tensor in zip(self.layout.entries, self.tensors(), strict=True)}

    def changed_from(self, flat: Tensor) -> list[str]:
        """The names of the module's tensors that do not hold what :meth:`load` would have given them."""
        return [
            entry.name
            for entry, part, tensor in self._parts(flat)
            if not torch.equal(part.to(tensor.device, tensor.dtype), tensor)
        ]

    def check_frozen(self) -> None:
        """Looks whether the parameters that are left out are frozen still.

        Raises:
            RuntimeError: one is trainable now; the text names it and says what to do.

        """
        for name, owner, key in self._left_out:
            parameter = owner._parameters[key]
            if parameter is not None and parameter.requires_grad:
                raise RuntimeError(
                    f"parameter {name!r} was frozen when training began and is trainable now, but what is frozen is not"
                    " exchanged, so that ranks would train it apart; set"
                    " AsyncLocalSGDStrategy(exchange=ExchangeOptions(frozen=True)), which exchanges everything"
                )

    def new_flat(self) -> Tensor:
        """A flat vector of zeros for copies from and to the module: for a module on CUDA devices in pinned memory."""
        pinned = any(tensor.is_cuda for tensor in self.tensors())
        return torch.zeros(self.layout.numel, dtype=torch.float32, pin_memory=pinned)

    def synchronize(self) -> None:
        """Waits until CUDA devices have done what they were given; what is on the CPU is done already."""
        for device in {tensor.device for tensor in self.tensors() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()

    def read(self, out: Tensor) -> None:
        """Copies the module's tensors into the flat vector ``out``."""
        with torch.no_grad():
            for _, part, tensor in self._parts(out):
                _fetch(part, tensor)
        self.synchronize()

    def load(self, flat: Tensor) -> None:
        """Copies ``flat`` into the module's tensors, in place.

        Where a tensor is not fp32, the value that it really took goes back into ``flat``: a pseudo-gradient formed
        against the unrounded value would push the rounding error as if it had been learned.
        """
        with torch.no_grad():
            for _, part, tensor in self._parts(flat):
                # Not through `.data`: an autograd graph that still needs the old values must notice.
                tensor.copy_(part, non_blocking=True)
                if tensor.dtype != torch.float32:
                    _fetch(part, tensor)
        # Before anybody writes to ``flat`` again, or reads what was rounded.
        self.synchronize()

    def subtract_from(self, base: Tensor, out: Tensor) -> None:
        """Forms the contents of a push in ``out``, tensor by tensor, without a temporary.

        Parameters: the pseudo-gradient, ``base`` minus the module's present value. Buffers: the present value itself.
        Buffers hold statistics, not sums of steps, and differences of statistics don't add up: a few stale ones take
        a falling running variance below zero (see :meth:`.global_model.GlobalModel.apply`).

        Args:
            base: the flat vector that the round started from.
            out: flat vector; must not share memory with ``base``.

        Raises:
            RuntimeError: a parameter that was frozen, and so isn't in the layout, is trainable now.

        """
        self.check_frozen()
        arriving: list[tuple[Entry, Tensor]] = []
        with torch.no_grad():
            for entry, part, tensor in self._parts(out):
                local = tensor
                if entry.kind == "buffer" or tensor.dtype != torch.float32 or tensor.device != part.device:
                    local = _fetch(part, tensor)
                if entry.kind == "parameter" and tensor.is_cuda:
                    arriving.append((entry, part))
                elif entry.kind == "parameter":
                    torch.sub(base[entry.offset : entry.offset + entry.numel].view(entry.shape), local, out=part)
            self.synchronize()
            for entry, part in arriving:
                torch.sub(base[entry.offset : entry.offset + entry.numel].view(entry.shape), part, out=part)

    def _parts(self, flat: Tensor) -> Iterator[tuple[Entry, Tensor, Tensor]]:
        """Each entry, its shaped view into ``flat``, and the module's tensor."""
        views = self.layout.views(flat)
        for entry, (kind, owner, key) in zip(self.layout.entries, self._places, strict=True):
            tensor = _tensor_at(owner, kind, key)
            if tuple(tensor.shape) != entry.shape:
                raise RuntimeError(
                    f"{kind} {entry.name!r} has become {list(tensor.shape)}, it was {list(entry.shape)} when training"
                    " began; tensors must keep their shapes during fit"
                )
            yield entry, views[entry.name], tensor


def _places(module: nn.Module) -> Iterator[tuple[str, Kind, nn.Module, str]]:
    """(name, kind, owner, key) of every parameter, then of every persistent buffer, shared ones once."""
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


def _fetch(part: Tensor, tensor: Tensor) -> Tensor:
    """Copies ``tensor`` into ``part`` of a flat vector; from a device it has arrived after ``Binding.synchronize``."""
    # To fp32 on the device: a copy that has to convert does so on the host, where the values may not be yet.
    return part.copy_(tensor.to(part.dtype) if tensor.is_cuda else tensor, non_blocking=True)


def _tensor_at(owner: nn.Module, kind: Kind, key: str) -> Tensor:
    tensor = owner._parameters[key] if kind == "parameter" else owner._buffers[key]
    if tensor is None:
        raise RuntimeError(f"{kind} {key!r} of {type(owner).__name__} was removed while training ran")
    return tensor


def _is_frozen(kind: Kind, tensor: Tensor) -> bool:
    """Whether ``tensor`` is a parameter that training leaves as it is."""
    return kind == "parameter" and not tensor.requires_grad


def _check_whole(name: str, kind: Kind, tensor: Tensor) -> None:
    """Checks that ``tensor``, exchanged or not, is there with all its values.

    Raises:
        ValueError: it is not.

    """
    what = f"{kind} {name!r}"
    classes = {cls.__name__ for cls in type(tensor).__mro__}
    if classes & {"DTensor", "ShardedTensor", "FlatParameter"} or getattr(tensor, "_is_flat_param", False):
        raise ValueError(
            f"{what} is sharded ({type(tensor).__name__}); every worker needs the whole model: leave FSDP, tensor"
            " parallelism and DeepSpeed off"
        )
    if is_lazy(tensor):
        raise ValueError(f"{what} is not initialised; run one batch through the lazy modules before fit")
    if tensor.is_meta:
        raise ValueError(f"{what} is on the meta device; materialise it (`module.to_empty(...)`) before fit")


def _is_exchanged(name: str, kind: Kind, tensor: Tensor) -> bool:
    """Whether ``tensor``, which is not left out as frozen, belongs to the layout.

    Raises:
        ValueError: it belongs there, but cannot be exchanged.

    """
    what = f"{kind} {name!r}"
    if kind == "parameter" and tensor.is_complex():
        raise ValueError(f"{what} is complex; keep it as a real tensor and use `torch.view_as_complex` in forward")
    if not tensor.is_floating_point():
        return False
    if tensor.layout != torch.strided:
        raise ValueError(f"{what} is sparse ({tensor.layout}); keep it as a dense tensor")
    if str(tensor.dtype) not in _DTYPES:
        raise ValueError(f"{what} is {tensor.dtype}; exchanged are {', '.join(sorted(_DTYPES))}")
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(
            f"{what} of shape {list(tensor.shape)} is expanded: several of its elements are one (strides"
            f" {list(tensor.stride())}); give each its own memory with `.contiguous()`"
        )
    return True
