"""State of each virtual worker that is not exchanged. It is loaded and stored when the current worker changes.

The state consists of the inner optimizers' states and parameter groups, the schedulers, the precision plugin, and the
buffers that are not exchanged. Optimizer states are not copied: each worker has its own tensors.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_async_localsgd.lightning.checkpoints.contents import copy_to_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import nn
    from torch.optim import Optimizer

    from lightning_async_localsgd.lightning.loop.schedules import ProgressSchedulers


_SHARED = frozenset({"params"})
"""Keys of a parameter group that are the same for all workers."""


class WorkerStates:
    """States of the virtual workers by number.

    Args:
        optimizers: optimizers of the trainer.
        shared_rates: those optimizers whose learning rates are the same for all workers.
        schedulers: schedulers of the trainer that follow steps or epochs.
        progress: steps the schedulers.
        precision: precision plugin of the trainer.
        buffers: returns the module's buffers that are not exchanged. The module may replace buffers.
        set_buffer: sets a buffer that may have another shape.
        exchanged_value: returns the value in the current worker's last model, of a buffer that was exchanged then.
        on_cpu: whether the states of workers that are not the current one are kept in the host's memory.

    Attributes:
        left: what :meth:`.OptimizerWeights.leave` has returned, if the current worker's optimizers have left its
            weights; None otherwise.

    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        shared_rates: Sequence[Optimizer],
        schedulers: Sequence[Any],
        progress: ProgressSchedulers,
        precision: Any,
        buffers: Callable[[], dict[str, Tensor]],
        set_buffer: Callable[[str, Tensor], None],
        exchanged_value: Callable[[str], Tensor | None],
        on_cpu: bool,
    ) -> None:
        self._optimizers = optimizers
        self._shared_rates = {id(optimizer) for optimizer in shared_rates}
        self._schedulers = schedulers
        self._progress = progress
        self._precision = precision
        self._buffers = buffers
        self._set_buffer = set_buffer
        self._exchanged_value = exchanged_value
        self._on_cpu = on_cpu
        self._states: dict[int, dict[str, Any]] = {}
        self._current: int | None = None
        self.left: list[int] | None = None
        self._before_hooks: dict[str, Any] | None = None
        # The state with which a new worker begins. In a resumed run it is the checkpoint's. Each worker gets a copy.
        self._initial = _copied({**self._read(), "buffers": buffers(), "left": None})
        self._loaded_buffers = self._buffer_versions()

    def store(self) -> None:
        """Store the state of the current worker, which :meth:`load` has loaded."""
        if self._current is None:
            return
        self.share_changes()
        worker = self._current
        state = {**self._read(), "left": self.left}
        before = self._states.get(worker, self._initial)["buffers"]
        state["buffers"] = {
            name: before[name] if name in before and self._is_loaded(name, buffer) else buffer.clone()
            for name, buffer in self._buffers().items()
        }
        if self._on_cpu:
            state["optimizers"] = [_offload(optimizer_state) for optimizer_state in state["optimizers"]]
        self._states[worker] = state

    def share(self, workers: Iterable[int]) -> None:
        """Give workers copies of the current worker's state, because they have taken the same steps."""
        for worker in workers:
            if worker != self._current:
                state = _copied({**self._read(), "buffers": self._buffers(), "left": self.left})
                if self._on_cpu:
                    state["optimizers"] = [_offload(optimizer_state) for optimizer_state in state["optimizers"]]
                self._states[worker] = state

    def load(self, worker: int) -> None:
        """Load the state of a worker, which becomes the current one."""
        self._current = worker
        state = self._states.get(worker)
        if state is None:
            state = _copied(self._initial)
        for optimizer, (tensors, groups) in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.state.clear()
            optimizer.state.update(_reload(tensors) if self._on_cpu else tensors)
            # A callback may have added parameter groups since, which the stored state does not have.
            for group, values in zip(optimizer.param_groups, groups, strict=False):
                group.update(values)
        for scheduler, values in zip(self._schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(values)
        self._progress.step_counts[:] = state["scheduler_steps"]
        if state["precision"]:
            self._precision.load_state_dict(state["precision"])
        self.left = state["left"]
        self._load_buffers(state["buffers"])
        self._loaded_buffers = self._buffer_versions()

    def begin_shared_hooks(self) -> None:
        """Begin a phase in which hooks run that all live workers would call, such as those at the end of an epoch.

        Changes that these hooks make to parameter groups and schedulers apply to all workers.
        """
        self._before_hooks = self._read_groups_and_schedulers()

    def share_changes(self, end: bool = False) -> None:
        """Apply changes since :meth:`begin_shared_hooks` to parameter groups and schedulers of all workers.

        Args:
            end: whether the phase of shared hooks has ended.

        """
        before, now = self._before_hooks, self._read_groups_and_schedulers() if self._before_hooks is not None else None
        if before is not None and now is not None:
            for state in (self._initial, *self._states.values()):
                for (_, stored_groups), new_groups, old_groups in zip(
                    state["optimizers"], now["groups"], before["groups"], strict=True
                ):
                    for stored, new, old in zip(stored_groups, new_groups, old_groups, strict=False):
                        stored.update({name: copy.deepcopy(new[name]) for name in _changed(new, old)})
                for index, (new, old) in enumerate(zip(now["schedulers"], before["schedulers"], strict=True)):
                    if _changed(new, old):
                        state["schedulers"][index] = copy.deepcopy(new)
        self._before_hooks = None if end else now

    def drop(self, workers: Iterable[int]) -> None:
        """Free the states of workers that take no more steps."""
        for worker in workers:
            self._states.pop(worker, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the stored states by worker number. Their tensors are copies in the host's memory."""
        current = self._current
        assert current is not None
        self.store()
        saved = {}
        for worker in list(self._states):
            self.load(worker)
            state = {**self._read(), "optimizers": [optimizer.state_dict() for optimizer in self._optimizers]}
            saved[str(worker)] = copy_to_host({**state, "buffers": self._buffers(), "left": self.left})
        self.load(current)
        return saved

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Load stored states. A worker without one begins like a new worker.

        Raises:
            ValueError: The states belong to another module or to other optimizers.

        """
        for worker, state in saved.items():
            self.load(int(worker))
            try:
                for optimizer, optimizer_state in zip(self._optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(optimizer_state)
                for scheduler, values in zip(self._schedulers, state["schedulers"], strict=True):
                    scheduler.load_state_dict(values)
                self._load_buffers(state["buffers"])
                self.left = state["left"]
            except (ValueError, RuntimeError, KeyError) as error:
                raise ValueError(
                    f"the state of simulated worker {worker} in the checkpoint does not fit this module and its "
                    f"optimizers: {error}"
                ) from error
            if state["precision"]:
                self._precision.load_state_dict(state["precision"])
            self._progress.step_counts[:] = state["scheduler_steps"]
            self.store()

    def _load_buffers(self, stored: Mapping[str, Tensor]) -> None:
        now = self._buffers()
        for name in (*now, *(name for name in stored if name not in now)):
            value = stored[name] if name in stored else self._exchanged_value(name)
            if value is not None and (name not in now or not _equal(now[name], value)):
                self._set_buffer(name, value.clone())

    def _buffer_versions(self) -> dict[str, tuple[Tensor, int]]:
        return {name: (buffer, buffer._version) for name, buffer in self._buffers().items()}

    def _is_loaded(self, name: str, buffer: Tensor) -> bool:
        """Return whether a buffer is unchanged since it was loaded."""
        loaded, version = self._loaded_buffers.get(name, (None, 0))
        return buffer is loaded and buffer._version == version

    def _shared_keys(self, optimizer: Optimizer) -> frozenset[str]:
        return _SHARED | {"lr"} if id(optimizer) in self._shared_rates else _SHARED

    def _read(self) -> dict[str, Any]:
        """Return the current worker's state without buffers. Optimizer tensors are not copied."""
        current = self._read_groups_and_schedulers()
        states = (dict(optimizer.state) for optimizer in self._optimizers)
        return {
            "optimizers": list(zip(states, current["groups"], strict=True)),
            "schedulers": current["schedulers"],
            "scheduler_steps": list(self._progress.step_counts),
            "precision": dict(self._precision.state_dict()),
        }

    def _read_groups_and_schedulers(self) -> dict[str, Any]:
        return {
            "groups": [
                [_without(group, self._shared_keys(optimizer)) for group in optimizer.param_groups]
                for optimizer in self._optimizers
            ],
            "schedulers": [copy.deepcopy(scheduler.state_dict()) for scheduler in self._schedulers],
        }


def unexchanged_buffers(module: nn.Module, exchanged: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the buffers of ``module`` that are not exchanged: integer, not persistent, or of another shape by now."""
    known = {id(tensor) for tensor in exchanged}
    return {name: buffer for name, buffer in module.named_buffers() if id(buffer) not in known}


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """Copy a state. Tensors are cloned, and keys such as parameters stay the same objects."""
    copied: dict[str, Any] = apply_to_collection(state, Tensor, torch.clone)
    return {**copied, "schedulers": copy.deepcopy(state["schedulers"])}


def _without(group: dict[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    """Copy a parameter group without ``keys``. Tensors are cloned, because they may be changed in place later."""
    return {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in group.items() if name not in keys
    }


def _changed(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """Return the names of the values that differ from ``old``."""

    def equal(first: Any, second: Any) -> bool:
        if isinstance(first, Tensor) or isinstance(second, Tensor):
            return isinstance(first, Tensor) and isinstance(second, Tensor) and torch.equal(first, second)
        return first is second or bool(first == second)

    return [name for name, value in new.items() if name not in old or not equal(value, old[name])]


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.device == second.device and torch.equal(first, second)


class _Offloaded:
    """A tensor in the host's memory, and the device to which it returns."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.to("cpu")
        self.device = tensor.device


def _offload(state: tuple[dict[Any, Any], list[Any]]) -> tuple[dict[Any, Any], list[Any]]:
    """Move an optimizer's state to the host's memory."""
    tensors, groups = state
    return {parameter: apply_to_collection(values, Tensor, _Offloaded) for parameter, values in tensors.items()}, groups


def _reload(tensors: dict[Any, Any]) -> dict[Any, Any]:
    """Move an offloaded optimizer state back to its devices."""

    def reload(offloaded: _Offloaded) -> Tensor:
        return offloaded.tensor.to(offloaded.device)

    return {parameter: apply_to_collection(values, _Offloaded, reload) for parameter, values in tensors.items()}
