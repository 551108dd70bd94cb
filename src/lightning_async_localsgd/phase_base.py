"""What a fit's phase of rounds is to those who hold the trainer, whether its workers are ranks or virtual.

A phase has the worker that trains in this process and, on rank 0, the server. Here is what does not depend on where
the other workers are: the global model in the module for as long as it is validated or saved, and how far the run is.
Lightning is not known here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_async_localsgd.plan import Position

if TYPE_CHECKING:
    from lightning_async_localsgd.layout import Binding
    from lightning_async_localsgd.leases import LeaseStock
    from lightning_async_localsgd.plan import RunBudget
    from lightning_async_localsgd.records import WorkerTotals
    from lightning_async_localsgd.server import Server
    from lightning_async_localsgd.settings import PhaseSettings
    from lightning_async_localsgd.worker import Worker


_BEFORE_THE_END = 1e-3
"""So many steps are missing while it is not known that all are taken."""


class Phase(ABC):
    """A phase of rounds; subclasses build its worker and its server.

    Args:
        settings: of the phase.
        module: the model to train.
        binding: its exchanged tensors.
        workers: that the run was started with.
        alone: no other process takes part, and none can join.

    Attributes:
        module: as given.
        binding: as given.
        workers: as given.
        alone: as given.
        budget: what the trainer's limits come to.
        worker: the worker that trains in this process.

    """

    worker: Worker

    def __init__(self, settings: PhaseSettings, module: nn.Module, binding: Binding, workers: int, alone: bool) -> None:
        self.module = module
        self.binding = binding
        self.workers = workers
        self.alone = alone
        self.budget = settings.budget
        self._settings = settings
        self._samples = 0
        self._tokens = 0
        self._in_step = False
        self._held: list[Tensor] | None = None
        self._showing = False
        self._shown_version = 0

    # ------------------------------------------------------------------ running

    @property
    @abstractmethod
    def server(self) -> Server | None:
        """On rank 0, the server."""

    @property
    @abstractmethod
    def stopped(self) -> bool:
        """Training is over in this process; the module holds the final global model."""

    @property
    @abstractmethod
    def keeps_weights(self) -> bool:
        """Whether an exchange leaves the module as it was, to the last bit."""

    @property
    @abstractmethod
    def heard(self) -> float:
        """Local steps of all workers that were done as far as the server has told."""

    @property
    @abstractmethod
    def progress(self) -> float:
        """Local steps of all workers that are done by now, as far as is known here, per worker.

        Where the run has an end this is a share of the steps that were planned for each worker, and all of them then.
        """

    @property
    @abstractmethod
    def next_progress(self) -> float:
        """What :attr:`progress` will be when one step more has been taken here."""

    @property
    def virtual_seconds(self) -> float | None:
        """Virtual time since the start of training; None where time is real."""
        return None

    @property
    @abstractmethod
    def seconds(self) -> float:
        """Since training started, or for as long as it lasted."""

    @property
    @abstractmethod
    def lost_workers(self) -> list[tuple[int, float, str]]:
        """Rank 0: who was gone before training was over, seconds after its start, and why."""

    @property
    @abstractmethod
    def bytes_sent(self) -> int:
        """Rank 0: bytes that the server has sent to workers elsewhere."""

    @property
    @abstractmethod
    def bytes_received(self) -> int:
        """Rank 0: bytes that workers elsewhere have sent to the server."""

    @abstractmethod
    def lease_stock(self, stream: str, items: int, unit: int, ordered: bool) -> LeaseStock:
        """This worker's share of a data loader's items, see :meth:`.LeaseDesk.stock`."""

    def begin_epoch(self, epoch: int) -> None:
        """This rank begins an epoch; where it is rank 0, whoever joins begins with the same."""
        if self.server is not None:
            self.server.about = replace(self.server.about, epoch=epoch)

    @property
    def ahead(self) -> int:
        """Global steps that the trainer has counted beyond what the run calls done, see :func:`.steps_ahead`."""
        return self._settings.ahead

    @property
    def in_step(self) -> bool:
        """Whether an optimizer step has begun and not ended; batches are accumulated for one, for example."""
        return self._in_step

    def see_batch(self, samples: int, tokens: int) -> None:
        """A batch of so many samples and tokens is about to be trained on."""
        self._samples += samples
        self._tokens += tokens
        self._in_step = True

    @abstractmethod
    def end_step(self) -> bool:
        """The loop has come to the end of an optimizer step.

        Returns:
            Whether the round is over.

        """

    @abstractmethod
    def settle(self) -> bool:
        """The global model is about to be shown or saved: where nobody else takes part, it gets what was learnt so far.

        Returns:
            Whether a model was adopted.

        """

    @abstractmethod
    def finish(self, stop: bool) -> None:
        """Hands in what there is, and adopts the final model.

        Args:
            stop: ends training for everybody; otherwise the others go on for as long as they have something to do.

        """

    @abstractmethod
    def leave(self) -> None:
        """Hands in what there is and has no more part in the training, which goes on."""

    def replan(self, budget: RunBudget) -> None:
        """An epoch begins with other data than was expected, and so the run comes to another number of steps."""
        self.budget = budget
        if self.server is not None:
            self.server.replan(budget.total, budget.at_most(self.workers))

    @property
    def asked_to_stop(self) -> bool:
        """Rank 0: whether another rank would have training end once a minimum is reached."""
        return False

    def finish_and_ask(self) -> None:
        """This rank leaves its loop for good; where another one decides when training ends, that is asked to."""
        self.finish(stop=True)

    def request_stop(self) -> None:
        """Rank 0 has decided to stop: everybody is told now, and handed the final model at their next step."""
        if self.server is not None:
            self.server.stop()

    # --------------------------------------------------- rank 0: validate, save

    def pause(self) -> None:
        """Rank 0 is about to do something that is no training: nobody waits for its worker until :meth:`resume`."""
        assert self.server is not None
        self.server.pause(self.worker.number)

    def resume(self) -> None:
        """It goes on; the step around that is not timed."""
        assert self.server is not None
        self.server.resume(self.worker.number)
        self.worker.interrupt()

    def show_global_model(self) -> None:
        """Puts the global model of this moment into the module, and the local weights aside."""
        if self.server is None or self.stopped:
            return
        self.pause()
        tensors = self.binding.tensors()
        if self._held is None:
            self._held = [torch.empty_like(tensor) for tensor in tensors]
        with torch.no_grad():
            for held, tensor in zip(self._held, tensors, strict=True):
                held.copy_(tensor)
        snapshot = torch.empty(self.binding.layout.numel, dtype=torch.float32)
        self._shown_version = self.server.copy_model(snapshot)
        self.binding.load(snapshot)
        self._showing = True

    def hide_global_model(self) -> None:
        """Puts the local weights back, to go on with the round."""
        if not self._showing or self.server is None or self._held is None:
            return
        self._showing = False
        with torch.no_grad():
            for held, tensor in zip(self._held, self.binding.tensors(), strict=True):
                tensor.copy_(held)
        self.resume()

    def global_tensors(self) -> tuple[dict[str, Tensor], int]:
        """Rank 0: the weights to save, fp32 by name, and their version.

        While a validation shows the global model these are the validated weights, otherwise those of this moment.
        """
        assert self.server is not None
        flat = torch.empty(self.binding.layout.numel, dtype=torch.float32)
        if self._showing:
            self.binding.read(flat)
            version = self._shown_version
        else:
            version = self.server.copy_model(flat)
            # A save between two steps takes time that is no computing.
            self.worker.interrupt()
        return self.binding.layout.views(flat), version

    def in_place_of(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[Tensor]]:
        """A module's ``state_dict`` with ``tensors`` (by name, fp32) where it shows the module's own.

        The module may have given its entries other names, or left some out; they are recognised by their memory, which
        also covers tied parameters. Whatever training may still change is a copy, with memory of its own.

        Returns:
            The state, and those of its tensors that restore the exchanged model to the last bit; none if they don't,
            because some are rounded from fp32 or left out.

        """
        names = self._names()
        frozen = {parameter.data_ptr() for parameter in self.module.parameters() if not parameter.requires_grad}
        copies: dict[str, Tensor] = {}
        shown = dict(state)
        for key, value in state.items():
            if not isinstance(value, Tensor):
                continue
            name = names.get((value.data_ptr(), value.shape))
            if name is None:
                shown[key] = value if value.data_ptr() in frozen else value.clone()
            else:
                if name not in copies:
                    copies[name] = tensors[name].to(value.device, value.dtype, copy=True)
                shown[key] = copies[name]
        return shown, list(copies.values()) if self.restored_by(state) else []

    def restored_by(self, state: Mapping[str, Any]) -> bool:
        """Whether a module's ``state_dict``, loaded again, restores the exchanged tensors to the last bit."""
        shown = {(value.data_ptr(), value.shape) for value in state.values() if isinstance(value, Tensor)}
        entries = self.binding.layout.entries
        return all(entry.dtype == "torch.float32" for entry in entries) and self._names().keys() <= shown

    def _names(self) -> dict[tuple[int, torch.Size], str]:
        """The names of the exchanged tensors by their memory."""
        return {
            (tensor.data_ptr(), tensor.shape): entry.name
            for entry, tensor in zip(self.binding.layout.entries, self.binding.tensors(), strict=True)
            if tensor.numel() > 0
        }

    def state_dict(self) -> dict[str, Any]:
        """Rank 0: the server's whole state, of one moment."""
        assert self.server is not None
        state = {"format": 1, "initial_workers": self.workers, **self.server.state_dict()}
        if self.budget.ends_with_data:
            position = Position.of(state["budget"]["done"], self.budget)
            state["position"] = None if position is None else list(position)
        return state

    @property
    def steps_before(self) -> int:
        """Rank 0: local steps of all workers that were taken before, in a run that goes on from a checkpoint."""
        assert self.server is not None
        return self.server.steps_before

    def totals(self) -> dict[int, WorkerTotals]:
        """Rank 0: what each worker has done so far."""
        assert self.server is not None
        return self.server.totals()

    # -------------------------------------------------------------------- ending

    @abstractmethod
    def share_end(self, averaged: bool) -> bool:
        """After the end: everybody takes what this process has where it is not exchanged, or hooks have changed it.

        Args:
            averaged: whether a callback has put averages into rank 0's module, frozen parameters included.

        Returns:
            On rank 0, whether the module still holds the final global model.

        """

    def survivors(self) -> set[int]:
        """Rank 0: the workers that are still there."""
        assert self.server is not None
        return set(self.server.ask(lambda coordinator: coordinator.live))

    @abstractmethod
    def close(self, reason: str | None = None) -> None:
        """Takes everything down. Without an earlier :meth:`finish`, workers that are told so end with an error.

        Args:
            reason: why training ends here, told to the workers that go on.

        """

    # ------------------------------------------------------------------ internal

    def _per_worker(self, done: float) -> float:
        """Local steps of all workers together as :attr:`progress` counts them."""
        total, planned = self.budget.total, self.budget.planned
        if not total or not planned:
            return done / self.workers
        at_most = self.budget.at_most(self.workers)
        if at_most is None or self.heard <= at_most:  # Else there is more data than was expected.
            done = min(done, total)
        return done / total * planned + self._settings.ahead

    def _estimated(self, done: float) -> float:
        """The same where it is an estimate of what others have done.

        Only the server knows that it is the end: the last validation, say, must not come before it.
        """
        found, planned = self._per_worker(done), self.budget.planned
        if planned is None or self.stopped or self.workers == 1 or found != planned + self._settings.ahead:
            return found
        return found - _BEFORE_THE_END
