"""The layout of a module's tensors in the flat vector that workers and the server exchange.

The model is one flat fp32 vector: first every trainable floating-point parameter in the order of ``named_parameters``
(tied parameters once), then every floating-point persistent buffer. Frozen parameters are left out, because training
does not change them: a model with adapters (LoRA) exchanges its adapters. Frozen parameters that the module moves
itself are exchanged beside the vector, see :mod:`.frozen`. If parameters may be unfrozen during
training, frozen parameters are part of the layout, because the layout never changes during a run. Workers may have the
same tensors in other dtypes, because each worker has a precision of its own. Integer and complex
tensors, such as BatchNorm's ``num_batches_tracked``, and non-persistent buffers stay with each worker.

The vector may end with the second moments that inner optimizers keep of the parameters, see
:class:`.SecondMoments`. They are exchanged like buffers, and are not part of the model. NaN stands for a moment that is
not known yet.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from lightning_async_localsgd.protocol.module_tensors import (
    DTYPES,
    Kind,
    check_whole,
    fetch,
    is_exchanged,
    is_frozen,
    places,
    tensor_at,
)

if TYPE_CHECKING:
    from lightning_async_localsgd.protocol.moments import SecondMoments

_KINDS: tuple[Kind, ...] = get_args(Kind)
_MAX_ELEMENTS = 2**53
_SHOWN_DIFFERENCES = 5


@dataclass(frozen=True)
class TensorSpec:
    """One tensor's place in the flat vector.

    Args:
        name: name in ``named_parameters`` or ``named_buffers``; of a moment, see :func:`_moment_name`.
        shape: shape of the tensor.
        dtype: dtype of the tensor in the module, such as ``"torch.bfloat16"``. The flat vector is always fp32.
        kind: ``"parameter"``, ``"buffer"`` or ``"moment"``.
        offset: position of the first element in the flat vector.
        numel: number of elements.

    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    offset: int
    numel: int

    def view(self, flat: Tensor) -> Tensor:
        """Return this tensor's part of the flat vector, in its shape. The memory is shared."""
        return flat[self.offset : self.offset + self.numel].view(self.shape)

    def __str__(self) -> str:
        return f"{self.name!r} {self.dtype.removeprefix('torch.')} {list(self.shape)}"


class Layout:
    """The ordered tensors of a model and their positions in the flat vector.

    Args:
        tensors: (name, shape, dtype, kind) of each tensor: parameters, then buffers, then moments.

    Raises:
        ValueError: a name occurs twice, or the kinds are in another order.

    Attributes:
        entries: the tensors, in order.
        numel: elements of the flat vector.
        parameter_numel: elements of its parameter part, which comes first.
        model_numel: elements of its parameters and buffers, which come before the moments.
        dtypes: dtypes of the tensors in the module, such as ``"bfloat16,float32"``.
        fingerprint: hash of the ordered (name, shape, kind) list. Workers with the same fingerprint can exchange.

    Example::

        >>> layout = Layout.of(torch.nn.Linear(3, 2))
        >>> [(entry.name, entry.offset, entry.numel) for entry in layout.entries]
        [('weight', 0, 6), ('bias', 6, 2)]
        >>> flat = torch.arange(8.0)
        >>> layout.views(flat)["bias"]
        tensor([6., 7.])

    """

    def __init__(self, tensors: list[tuple[str, tuple[int, ...], str, Kind]]) -> None:
        entries: list[TensorSpec] = []
        names: set[str] = set()
        offset = 0
        ends = dict.fromkeys(_KINDS, 0)
        for name, shape, dtype, kind in tensors:
            if name in names:
                raise ValueError(f"the layout names {name!r} twice")
            if entries and _KINDS.index(entries[-1].kind) > _KINDS.index(kind):
                raise ValueError(f"{kind} {name!r} follows a {entries[-1].kind}; the order is {', '.join(_KINDS)}")
            names.add(name)
            numel = math.prod(shape)
            entries.append(TensorSpec(name, shape, dtype, kind, offset, numel))
            offset += numel
            ends[kind] = offset
        self.entries: tuple[TensorSpec, ...] = tuple(entries)
        self.numel = offset
        self.parameter_numel = ends["parameter"]
        self.model_numel = max(ends["parameter"], ends["buffer"])
        self.dtypes = ",".join(sorted({entry.dtype.removeprefix("torch.") for entry in entries}))
        places = [[entry.name, list(entry.shape), entry.kind] for entry in entries]
        self.fingerprint: str = hashlib.sha256(
            json.dumps(places, separators=(",", ":"), ensure_ascii=True).encode()
        ).hexdigest()

    @classmethod
    def of(cls, module: nn.Module, frozen: bool = False, moments: SecondMoments | None = None) -> Layout:
        """Return the layout of ``module``.

        Args:
            module: the module, with the parameters frozen that are frozen when training starts.
            frozen: include parameters with ``requires_grad=False``.
            moments: include the second moments of the exchanged parameters that have one.

        Raises:
            ValueError: the module has no trainable parameter, or a tensor that cannot be exchanged. The text names the
                tensor and says what to do.

        """
        tensors: list[tuple[str, tuple[int, ...], str, Kind]] = []
        of_moments: list[tuple[str, tuple[int, ...], str, Kind]] = []
        trainable = False
        for name, kind, owner, key in places(module):
            tensor = tensor_at(owner, kind, key)
            check_whole(name, kind, tensor)
            if (is_frozen(kind, tensor) and not frozen) or not is_exchanged(name, kind, tensor):
                continue
            tensors.append((name, tuple(tensor.shape), str(tensor.dtype), kind))
            if moments is not None and isinstance(tensor, nn.Parameter) and moments.has(tensor):
                of_moments.append((_moment_name(name), tuple(tensor.shape), str(tensor.dtype), "moment"))
            trainable = trainable or (kind == "parameter" and tensor.requires_grad)
        if not trainable:
            raise ValueError(
                f"{type(module).__name__} has no trainable parameter; create the parameters in `__init__` or "
                "`configure_model`, and leave `requires_grad=True` on at least one parameter"
            )
        return cls(tensors + of_moments)

    @property
    def model_bytes(self) -> int:
        """Bytes of the parameters and buffers as fp32: what travels in the synchronous beginning, without moments."""
        return 4 * self.model_numel

    def describe(self) -> list[list[Any]]:
        """Return the ordered [name, shape, dtype, kind] list, made of JSON types only."""
        return [[entry.name, list(entry.shape), entry.dtype, entry.kind] for entry in self.entries]

    @classmethod
    def from_description(cls, description: Any) -> Layout:
        """Return the layout that :meth:`describe` has described, possibly on another machine.

        Raises:
            ValueError: ``description`` does not describe a layout.

        """
        if not isinstance(description, list):
            raise ValueError(f"a layout's description must be a list, got {type(description).__name__}")
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
                and dtype in DTYPES
                and kind in _KINDS
                and numel < _MAX_ELEMENTS
            ):
                raise ValueError(f"entry {index} of a layout's description is invalid: {str(item)[:200]}")
            tensors.append((name, tuple(shape), dtype, kind))
        return cls(tensors)

    def difference(self, other: Layout) -> str:
        """Return the first differences from ``other`` ("there") in readable lines.

        Empty if both have the same fingerprint. Tensors that differ in their dtype alone are no difference.
        """
        lines: list[str] = []
        count = 0
        for kind in _KINDS:
            here = [entry for entry in self.entries if entry.kind == kind]
            there = [entry for entry in other.entries if entry.kind == kind]
            for index in range(max(len(here), len(there))):
                mine = here[index] if index < len(here) else None
                theirs = there[index] if index < len(there) else None
                if mine is not None and theirs is not None and (mine.name, mine.shape) == (theirs.name, theirs.shape):
                    continue
                count += 1
                if count <= _SHOWN_DIFFERENCES:
                    lines.append(f"{kind} {index}: {mine or 'nothing'} here, {theirs or 'nothing'} there")
        if count > _SHOWN_DIFFERENCES:
            lines.append(f"and {count - _SHOWN_DIFFERENCES} more")
        return "\n".join(lines)

    def views(self, flat: Tensor, *kinds: Kind) -> dict[str, Tensor]:
        """Return shaped views into ``flat`` by name.

        Args:
            flat: the flat vector. For parameters alone, its parameter part is enough.
            kinds: return only tensors of these kinds; all tensors without one.

        Raises:
            ValueError: ``flat`` does not have the layout's length.

        """
        if flat.numel() != self.numel and not (kinds == ("parameter",) and flat.numel() == self.parameter_numel):
            raise ValueError(f"the flat vector has {flat.numel()} elements, the layout needs {self.numel}")
        return {entry.name: entry.view(flat) for entry in self.entries if not kinds or entry.kind in kinds}


class Binding:
    """Copies a module's live tensors to and from flat vectors of a layout.

    The tensors are looked up at each call, because a module may replace a buffer's tensor. Copies from and to CUDA
    devices run in parallel, on the devices' current streams, and are complete when a method returns.

    A buffer that takes another shape than at the start (a memory bank that grows) cannot be merged. From then on it is
    the worker's own: it is not read, not loaded, and a push leaves the global value as it is.

    Args:
        layout: the layout of ``module``.
        module: the module whose tensors are read and written.
        moments: the second moments of the module's parameters, if they are part of ``layout``.

    Attributes:
        layout: the layout of the module.
        entries: the layout's entries of the module's tensors, without moments.
        own: names of the buffers that are the worker's own by now.
        on_own: called with a text when a buffer becomes the worker's own.
        moments: the second moments of the module's parameters; None if they are not part of the layout.

    Raises:
        ValueError: ``module`` has another layout.

    """

    def __init__(self, layout: Layout, module: nn.Module, moments: SecondMoments | None = None) -> None:
        wanted = {entry.name for entry in layout.entries}
        found = list(places(module))
        frozen = any(name in wanted and is_frozen(kind, tensor_at(at, kind, key)) for name, kind, at, key in found)
        difference = Layout.of(module, frozen, moments).difference(layout)
        if difference:
            raise ValueError(f"the tensors of {type(module).__name__} do not match the layout:\n{difference}")
        self.layout = layout
        self.entries = tuple(entry for entry in layout.entries if entry.kind != "moment")
        self.own: set[str] = set()
        self.on_own: Callable[[str], None] = lambda _: None
        self.moments = moments
        self._places = [(kind, owner, key) for name, kind, owner, key in found if name in wanted]
        position = {_moment_name(entry.name): number for number, entry in enumerate(self.entries)}
        self._moment_places = [
            (entry, self._places[position[entry.name]]) for entry in layout.entries if entry.kind == "moment"
        ]
        self._left_out = [
            (name, owner, key) for name, kind, owner, key in found if kind == "parameter" and name not in wanted
        ]

    def tensors(self) -> list[Tensor]:
        """Return the module's exchanged tensors in the layout's order."""
        return list(self.named().values())

    def named(self) -> dict[str, Tensor]:
        """Return the module's exchanged tensors by name, in the layout's order.

        Raises:
            RuntimeError: a parameter was removed, or has another shape than at the start.

        """
        named: dict[str, Tensor] = {}
        for entry, (kind, owner, key) in zip(self.entries, self._places, strict=True):
            if entry.name in self.own:
                continue
            if kind == "buffer":
                buffer = owner._buffers.get(key)
                if buffer is None or tuple(buffer.shape) != entry.shape or not buffer.is_floating_point():
                    self._release(entry, buffer)
                    continue
            tensor = tensor_at(owner, kind, key)
            if tuple(tensor.shape) != entry.shape:
                raise RuntimeError(
                    f"{kind} {entry.name!r} had shape {list(entry.shape)} when training began and has "
                    f"{list(tensor.shape)} now; parameters must keep their shapes during fit"
                )
            named[entry.name] = tensor
        return named

    def _release(self, entry: TensorSpec, buffer: Tensor | None) -> None:
        """Make a buffer the worker's own."""
        self.own.add(entry.name)
        now = "was removed" if buffer is None else f"is {str(buffer.dtype).removeprefix('torch.')} {list(buffer.shape)}"
        self.on_own(f"buffer {entry} {now} in training")

    def changed_from(self, flat: Tensor) -> list[str]:
        """Return the names of the module's tensors that differ from what :meth:`load` of ``flat`` would set."""
        return [
            entry.name
            for entry, part, tensor in self.parts(flat)
            if not torch.equal(part.to(tensor.device, tensor.dtype), tensor)
        ]

    def check_frozen(self) -> None:
        """Check that the parameters outside the layout are still frozen.

        Raises:
            RuntimeError: a parameter is trainable now. The text names it and says what to do.

        """
        for name, owner, key in self._left_out:
            parameter = owner._parameters[key]
            if parameter is not None and parameter.requires_grad:
                raise RuntimeError(
                    f"parameter {name!r} was frozen when training began and is trainable now. Frozen parameters are "
                    "not exchanged, so each rank would train its own copy; set "
                    "AsyncLocalSGDStrategy(exchange=ExchangeOptions(frozen=True)) to exchange all parameters"
                )

    @property
    def device(self) -> torch.device:
        """The CUDA device that has all of the module's parameters, or the CPU."""
        devices = {tensor.device for tensor in self.tensors() if isinstance(tensor, nn.Parameter)}
        device = devices.pop() if len(devices) == 1 else torch.device("cpu")
        return device if device.type == "cuda" else torch.device("cpu")

    def new_flat(self) -> Tensor:
        """Return a flat vector of zeros for :meth:`read` and :meth:`load`. Pinned memory if the module is on CUDA."""
        pinned = any(tensor.is_cuda for tensor in self.tensors())
        return torch.zeros(self.layout.numel, dtype=torch.float32, pin_memory=pinned)

    def synchronize(self) -> None:
        """Wait until CUDA devices have finished the work on their current streams."""
        for device in {tensor.device for tensor in self.tensors() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()

    def read(self, out: Tensor) -> None:
        """Copy the module's tensors into the flat vector ``out``."""
        with torch.no_grad():
            for _, part, tensor in self.parts(out):
                fetch(part, tensor)
        self.synchronize()

    def load(self, flat: Tensor) -> None:
        """Copy ``flat`` into the module's tensors, in place. The moments stay, see :meth:`load_moments`.

        If a tensor is not fp32, its rounded value is written back to ``flat``. Otherwise the next pseudo-gradient would
        contain the rounding error as if it had been learned.
        """
        with torch.no_grad():
            for _, part, tensor in self.parts(flat):
                # Not through `.data`: autograd must detect that values it still needs have changed.
                tensor.copy_(part, non_blocking=True)
                if tensor.dtype != torch.float32:
                    fetch(part, tensor)
        # Complete the copies before the caller writes to ``flat`` again, or reads the rounded values.
        self.synchronize()

    def load_moments(self, flat: Tensor) -> None:
        """Copy the moments in ``flat`` to the inner optimizers, as far as the moments are known and states exist."""
        if self.moments is None:
            return
        with torch.no_grad():
            for _, part, parameter in self.moment_parts(flat):
                self.moments.write(parameter, part)
        self.synchronize()

    def subtract_from(self, base: Tensor, out: Tensor) -> None:
        """Write the contents of a push to ``out``, tensor by tensor, without a temporary.

        For parameters this is the pseudo-gradient, ``base`` minus the module's present value. For buffers and moments
        it is the present value itself: they hold statistics, not sums of steps, and differences of statistics don't add
        up. A few stale differences would take a falling running variance below zero, see
        :meth:`.server.global_model.GlobalModel.apply`.

        Args:
            base: the flat vector that the round started from.
            out: flat vector; must not share memory with ``base``. It may be on the parameters' device, see
                :attr:`device`. Then the parameters are not copied to the host.

        Raises:
            RuntimeError: a parameter that was frozen, and so is not in the layout, is trainable now.

        """
        self.check_frozen()
        arriving: list[tuple[TensorSpec, Tensor]] = []
        with torch.no_grad():
            parts = list(self.parts(out))
            for entry in self.entries:
                if entry.name in self.own:
                    entry.view(out).copy_(entry.view(base))
            for entry, part, tensor in parts:
                local = tensor
                if entry.kind == "buffer" or tensor.dtype != torch.float32 or tensor.device != part.device:
                    local = fetch(part, tensor)
                if entry.kind == "parameter" and tensor.device != part.device:
                    arriving.append((entry, part))
                elif entry.kind == "parameter":
                    torch.sub(entry.view(base).to(part.device, non_blocking=True), local, out=part)
            if self.moments is not None:
                for _, part, parameter in self.moment_parts(out):
                    moment = self.moments.read(parameter, out=part)
                    if moment is None:
                        part.fill_(math.nan)
                    elif moment is not part:
                        fetch(part, moment)
            self.synchronize()
            for entry, part in arriving:
                torch.sub(entry.view(base), part, out=part)

    def parts(self, flat: Tensor) -> Iterator[tuple[TensorSpec, Tensor, Tensor]]:
        """Yield each exchanged entry, its shaped view into ``flat``, and the module's tensor."""
        views, named = self.layout.views(flat, "parameter", "buffer"), self.named()
        for entry in self.entries:
            if entry.name in named:
                yield entry, views[entry.name], named[entry.name]

    def moment_parts(self, flat: Tensor) -> Iterator[tuple[TensorSpec, Tensor, nn.Parameter]]:
        """Yield each moment's entry, its shaped view into ``flat``, and the parameter whose moment it is."""
        for entry, (kind, owner, key) in self._moment_places:
            parameter = tensor_at(owner, kind, key)
            assert isinstance(parameter, nn.Parameter)
            yield entry, entry.view(flat), parameter


def _moment_name(parameter: str) -> str:
    """Return the name of a parameter's second moment. No parameter or buffer has a name like it."""
    return f"{parameter}:second_moment"
