"""What belongs to each virtual worker and not to the exchanged model, changed from turn to turn.

These are the states of its inner optimizers and their parameter groups, of its schedulers and of the precision plugin,
and the buffers that are not exchanged. Optimizer states are not copied, only referred to; there is one for each worker.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_async_localsgd.checkpoints import on_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import nn
    from torch.optim import Optimizer

    from lightning_async_localsgd.schedules import ProgressSchedulers


_COMMON = frozenset({"params"})


class InnerStates:
    """The inner states of virtual workers by their numbers.

    Args:
        optimizers: of the trainer.
        common_rates: of these, the ones whose learning rates are all workers' together.
        schedulers: of the trainer, those that follow steps or epochs.
        progress: steps the schedulers.
        precision: the trainer's precision plugin.
        buffers: gives the module's tensors that stay with a worker. The module may put others in their place.
        on_cpu: whether the states of the workers that are not at turn are kept in the host's memory.

    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        common_rates: Sequence[Optimizer],
        schedulers: Sequence[Any],
        progress: ProgressSchedulers,
        precision: Any,
        buffers: Callable[[], Sequence[Tensor]],
        on_cpu: bool,
    ) -> None:
        self._optimizers = optimizers
        self._common_rates = {id(optimizer) for optimizer in common_rates}
        self._schedulers = schedulers
        self._progress = progress
        self._precision = precision
        self._buffers = buffers
        self._on_cpu = on_cpu
        self._states: dict[int, dict[str, Any]] = {}
        self._at_turn: int | None = None
        self._marked: dict[str, Any] | None = None
        # What a worker begins with. Where this is a checkpoint's, each has a copy of its own.
        self._first = _copied({**self._present(), "buffers": list(buffers())})
        self._loaded = self._versions()

    def store(self) -> None:
        """The turn of the worker that was loaded last is over."""
        if self._at_turn is None:
            return
        self.spread()
        worker = self._at_turn
        state = self._present()
        before = self._states.get(worker, self._first)["buffers"]
        state["buffers"] = [
            kept if buffer is loaded and version == old else buffer.clone()
            for (buffer, version), (loaded, old), kept in zip(self._versions(), self._loaded, before, strict=True)
        ]
        if self._on_cpu:
            state["optimizers"] = [_moved(one, torch.device("cpu")) for one in state["optimizers"]]
        self._states[worker] = state

    def load(self, worker: int) -> None:
        """The worker's turn begins."""
        self._at_turn = worker
        state = self._states.get(worker)
        if state is None:
            state = _copied(self._first)
        for optimizer, (held, groups) in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.state.clear()
            optimizer.state.update(_back(held) if self._on_cpu else held)
            # A callback may have added groups since, which the worker then has for the first time.
            for group, values in zip(optimizer.param_groups, groups, strict=False):
                group.update(values)
        for scheduler, values in zip(self._schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(values)
        self._progress.taken[:] = state["taken"]
        if state["precision"]:
            self._precision.load_state_dict(state["precision"])
        with torch.no_grad():
            for buffer, kept in zip(self._buffers(), state["buffers"], strict=True):
                if not torch.equal(buffer, kept):
                    buffer.copy_(kept)
        self._loaded = self._versions()

    def mark(self) -> None:
        """Hooks are about to be called that live workers would all call: what they change is changed for all."""
        self._marked = self._rates()

    def spread(self, last: bool = False) -> None:
        """What has changed of parameter groups and schedulers since :meth:`mark` changes for all workers.

        Args:
            last: the hooks are over.

        """
        before, now = self._marked, self._rates() if self._marked is not None else None
        if before is not None and now is not None:
            for state in (self._first, *self._states.values()):
                for (_, kept), groups, earlier in zip(
                    state["optimizers"], now["groups"], before["groups"], strict=True
                ):
                    for values, new, old in zip(kept, groups, earlier, strict=False):
                        values.update({name: copy.deepcopy(new[name]) for name in _changed(new, old)})
                for index, (new, old) in enumerate(zip(now["schedulers"], before["schedulers"], strict=True)):
                    if _changed(new, old):
                        state["schedulers"][index] = copy.deepcopy(new)
        self._marked = None if last else now

    def forget(self, workers: Iterable[int]) -> None:
        """These workers have no turn any more: what is kept of them is of no use."""
        for worker in workers:
            self._states.pop(worker, None)

    def state_dict(self) -> dict[str, Any]:
        """The states that are kept, by the workers' numbers; tensors are copies in the host's memory."""
        at_turn = self._at_turn
        assert at_turn is not None
        self.store()
        saved = {}
        for worker in list(self._states):
            self.load(worker)
            state = {**self._present(), "optimizers": [one.state_dict() for one in self._optimizers]}
            saved[str(worker)] = on_host({**state, "buffers": list(self._buffers())})
        self.load(at_turn)
        return saved

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Goes on with the states in ``saved``; a worker that is not in it begins with what a new one does.

        Raises:
            ValueError: they are of another module or other optimizers.

        """
        for worker, state in saved.items():
            self.load(int(worker))
            try:
                for optimizer, held in zip(self._optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(held)
                for scheduler, values in zip(self._schedulers, state["schedulers"], strict=True):
                    scheduler.load_state_dict(values)
                with torch.no_grad():
                    for buffer, kept in zip(self._buffers(), state["buffers"], strict=True):
                        buffer.copy_(kept)
            except (ValueError, RuntimeError, KeyError) as error:
                raise ValueError(
                    f"the checkpoint's inner state of worker {worker} does not fit this module and its optimizers: "
                    f"{error}"
                ) from error
            if state["precision"]:
                self._precision.load_state_dict(state["precision"])
            self._progress.taken[:] = state["taken"]
            self.store()

    def _versions(self) -> list[tuple[Tensor, int]]:
        return [(buffer, buffer._version) for buffer in self._buffers()]

    def _left_to_all(self, optimizer: Optimizer) -> frozenset[str]:
        return _COMMON | {"lr"} if id(optimizer) in self._common_rates else _COMMON

    def _present(self) -> dict[str, Any]:
        rates = self._rates()
        states = (dict(optimizer.state) for optimizer in self._optimizers)
        return {
            "optimizers": list(zip(states, rates["groups"], strict=True)),
            "schedulers": rates["schedulers"],
            "taken": list(self._progress.taken),
            "precision": dict(self._precision.state_dict()),
        }

    def _rates(self) -> dict[str, Any]:
        return {
            "groups": [
                [_values(group, self._left_to_all(optimizer)) for group in optimizer.param_groups]
                for optimizer in self._optimizers
            ],
            "schedulers": [copy.deepcopy(scheduler.state_dict()) for scheduler in self._schedulers],
        }


def left_out(module: nn.Module, exchanged: Sequence[Tensor]) -> list[Tensor]:
    """The buffers of ``module`` that are not exchanged: counters, and what is not saved."""
    known = {id(tensor) for tensor in exchanged}
    return [buffer for buffer in module.buffers() if id(buffer) not in known]


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """The same with tensors of its own; what is a key, such as a parameter, stays that very object."""
    copied: dict[str, Any] = apply_to_collection(state, Tensor, torch.clone)
    return {**copied, "schedulers": copy.deepcopy(state["schedulers"])}


def _values(group: dict[str, Any], left: frozenset[str]) -> dict[str, Any]:
    """A parameter group without what is left to all. A tensor among its values may be written to later."""
    return {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in group.items() if name not in left
    }


def _changed(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """The names of the values that are not what they were."""

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, Tensor) or isinstance(other, Tensor):
            return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
        return one is other or bool(one == other)

    return [name for name, value in new.items() if name not in old or not same(value, old[name])]


def _moved(state: tuple[dict[Any, Any], list[Any]], device: torch.device) -> tuple[dict[Any, Any], list[Any]]:
    """An optimizer's state on a device, with where each tensor of it has been."""
    held, groups = state

    def move(tensor: Tensor) -> _Moved:
        return _Moved(tensor.to(device), tensor.device)

    return {parameter: apply_to_collection(values, Tensor, move) for parameter, values in held.items()}, groups


def _back(held: dict[Any, Any]) -> dict[Any, Any]:
    def move(moved: _Moved) -> Tensor:
        return moved.tensor.to(moved.device)

    return {parameter: apply_to_collection(values, _Moved, move) for parameter, values in held.items()}


class _Moved:
    """A tensor, and the device that it belongs on."""

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self.tensor = tensor
        self.device = device
