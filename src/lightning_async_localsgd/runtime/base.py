"""Base class of a process's part in asynchronous training, with live workers or virtual workers.

A runtime has the worker that trains in this process and, on rank 0, the server. The base class contains what does not
depend on where the other workers are: it puts the global model into the module for validation and saving, and reports
the progress of the run. This module does not know Lightning.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_async_localsgd.policies.plan import Position
from lightning_async_localsgd.protocol.module_copy import ModuleCopy
from lightning_async_localsgd.runtime.global_steps import below_end, to_global_steps, to_local_steps
from lightning_async_localsgd.runtime.saved_weights import replace_weights, restores_weights

if TYPE_CHECKING:
    from lightning_async_localsgd.policies.plan import RunBudget
    from lightning_async_localsgd.protocol.layout import Binding
    from lightning_async_localsgd.runtime.leases import LeaseBuffer
    from lightning_async_localsgd.runtime.optimizer_weights import OptimizerWeights
    from lightning_async_localsgd.runtime.settings import RuntimeSettings
    from lightning_async_localsgd.runtime.worker_base import WorkerBase
    from lightning_async_localsgd.server.run_stats import WorkerTotals
    from lightning_async_localsgd.server.server import Server

_log = logging.getLogger(__name__)

STATE_FORMAT = 3
"""Version of :meth:`Runtime.state_dict`. Increase this number when older states can no longer be read."""

RESIDUAL = "residual"
"""Key of a worker's residual in saved states, see :class:`.Uplink`."""


class Runtime(ABC):
    """One process's part in asynchronous training. Subclasses create its worker and its server.

    Args:
        settings: policies and numbers of the run.
        module: the model to train.
        binding: exchanged tensors of the module.
        workers: number of workers that the run was started with.
        single_process: whether no other process takes part, now or later.

    Attributes:
        module: the model to train.
        binding: exchanged tensors of the module.
        workers: number of workers that the run was started with.
        single_process: whether no other process takes part, now or later.
        budget: local steps that the trainer's limits allow.
        worker: the worker that trains in this process.

    """

    worker: WorkerBase

    def __init__(
        self, settings: RuntimeSettings, module: nn.Module, binding: Binding, workers: int, single_process: bool
    ) -> None:
        self.module = module
        self.binding = binding
        self.workers = workers
        self.single_process = single_process
        self.budget = settings.budget
        self._settings = settings
        self._samples = 0
        self._tokens = 0
        self._in_step = False
        self._local_weights = ModuleCopy(binding)
        self._local_shared: tuple[list[int], Tensor] | None = None
        self._shows_global_model = False
        self._shown_version = 0
        self._training: list[int] = []

    # ------------------------------------------------------------------ running

    @property
    def optimizer_weights(self) -> OptimizerWeights | None:
        """What the inner optimizers remember of weights; None if there are no optimizers."""
        return self._settings.optimizer_weights

    @property
    @abstractmethod
    def server(self) -> Server | None:
        """The server on rank 0; None on other ranks."""

    @property
    def may_have_evaluator(self) -> bool:
        """Whether an evaluator takes part, or may join. To join, a process needs the user's token."""
        return self._settings.evaluator is not None or self._settings.token is not None

    @property
    @abstractmethod
    def stopped(self) -> bool:
        """Whether training has ended in this process. If so, the module holds the final global model."""

    @property
    @abstractmethod
    def keeps_weights(self) -> bool:
        """Whether adopting a model leaves the module's weights unchanged, to the last bit."""

    @property
    @abstractmethod
    def confirmed_steps(self) -> float:
        """Local steps of all workers together that the server has counted, as far as known in this process."""

    @property
    @abstractmethod
    def global_steps(self) -> float:
        """Estimated global steps that are done, see :mod:`.global_steps`."""

    @property
    @abstractmethod
    def next_global_steps(self) -> float:
        """Value of :attr:`global_steps` after one more step in this process."""

    @property
    def local_steps(self) -> float:
        """Estimated local steps of all workers together that are done. In the end, these are all of the budget.

        If workers have batch sizes of their own, these are steps of the script's own batch size.
        """
        units = to_local_steps(self.global_steps, self.budget, self.workers, self.step_offset)
        return units / self.budget.unit

    @property
    def virtual_seconds(self) -> float | None:
        """Virtual seconds since training started; None with live workers."""
        return None

    @property
    @abstractmethod
    def seconds(self) -> float:
        """Seconds since training started, or the duration of training if it has ended."""

    @property
    @abstractmethod
    def lost_workers(self) -> list[tuple[int, float, str]]:
        """Workers that were lost during training: number, seconds since the start of training, and reason. Rank 0."""

    @property
    @abstractmethod
    def bytes_sent(self) -> int:
        """Bytes that the server has sent to workers in other processes. Rank 0 only."""

    @property
    @abstractmethod
    def bytes_received(self) -> int:
        """Bytes that the server has received from workers in other processes. Rank 0 only."""

    @abstractmethod
    def lease_buffer(self, stream: str, items: int, unit: int, ordered: bool, own_unit: bool) -> LeaseBuffer:
        """Return this worker's leased items of a data loader, see :meth:`.LeaseClient.stock`."""

    def begin_epoch(self, epoch: int) -> None:
        """Record that this rank begins an epoch. Workers that join later begin with the epoch of rank 0."""
        if self.server is not None:
            self.server.join_info = replace(self.server.join_info, epoch=epoch)

    @property
    def counts_samples(self) -> bool:
        """Whether progress is counted in samples, because workers have batch sizes of their own."""
        return self._settings.step_samples > 0

    @property
    def step_offset(self) -> int:
        """Global steps that the trainer has counted beyond the steps of this run, see :func:`.step_offset_of`."""
        return self._settings.step_offset

    @property
    def reserved_units(self) -> int:
        """Local steps of each epoch that are reserved for worker 0."""
        return self._settings.reserved_units

    @property
    def in_step(self) -> bool:
        """Whether an optimizer step has begun but not ended, for example while batches are accumulated."""
        return self._in_step

    def count_batch(self, samples: int, tokens: int) -> None:
        """Count a batch that is about to be trained on.

        Args:
            samples: number of samples in the batch.
            tokens: number of tokens in the batch.

        """
        self._samples += samples
        self._tokens += tokens
        self._in_step = True

    @abstractmethod
    def end_step(self) -> bool:
        """End an optimizer step.

        Returns:
            Whether the round is over.

        """

    def count_gradients(self) -> None:
        """End a local step of the synchronous beginning, which has no optimizer step: its gradients are accumulated."""
        self.worker.count_step()
        self.worker.end_step(self._samples, self._tokens)
        self._samples = 0
        self._tokens = 0

    @abstractmethod
    def average_gradients(self, factor: float) -> None:
        """Replace the module's gradients by the mean of those of all workers, before the optimizer's step.

        Args:
            factor: factor that makes the module's gradients the mean over the batches of the step.

        Raises:
            ExchangeError: The server cannot be reached any more.

        """

    @abstractmethod
    def end_synchronous_step(self) -> bool:
        """End the optimizer's step after :meth:`average_gradients`.

        Returns:
            Whether a model was adopted, because the synchronous beginning is over.

        """

    @abstractmethod
    def flush_round(self) -> bool:
        """Push the steps of a single worker before the global model is shown or saved.

        Returns:
            Whether a model was adopted.

        """

    @abstractmethod
    def recall_rounds(self) -> bool:
        """Recall rounds before rank 0 validates, if the global model lacks most of the steps since the last validation.

        Returns:
            Whether the worker in this process must end its round, see :meth:`end_round`.

        """

    @abstractmethod
    def end_round(self) -> None:
        """Push the round of the worker in this process early, and adopt the model that comes back."""

    @abstractmethod
    def finish(self, stop: bool) -> None:
        """Push the steps of the unfinished round, and adopt the final model.

        Args:
            stop: whether training ends for all workers. Otherwise, the other workers continue until the budget or
                the data is used up.

        """

    @abstractmethod
    def leave(self) -> None:
        """Push the steps of the unfinished round, and leave training. The other workers continue."""

    def replan(self, budget: RunBudget) -> None:
        """Replace the budget, because the data of an epoch is not as long as expected."""
        self.budget = budget
        if self.server is not None:
            self.server.replan(budget.total, budget.upper_bound(self.workers))

    @property
    def stop_requested(self) -> bool:
        """Whether another rank requests that training end once the trainer's minimum is reached. Rank 0 only."""
        return False

    def finish_and_request_stop(self) -> None:
        """Finish on this rank, and request that rank 0 end training once the trainer's minimum is reached."""
        self.finish(stop=True)

    def request_stop(self) -> None:
        """End training for all workers, by a decision of rank 0. Each worker gets the final model at its next step."""
        if self.server is not None:
            self.server.stop()

    # --------------------------------------------------- rank 0: validate, save

    def interrupt(self) -> None:
        """Let the server not wait for rank 0's worker until :meth:`continue_round`. Called before rank 0 validates."""
        assert self.server is not None
        self.server.interrupt(self.worker.number)

    def continue_round(self) -> None:
        """Tell the server that rank 0's worker trains again. The current step is left out of its speed."""
        assert self.server is not None
        self.server.continue_round(self.worker.number)
        self.worker.leave_out_step()

    def show_global_model(self, snapshot: Tensor | None = None, version: int = 0) -> None:
        """Save the local weights, and load the global model into the module.

        Args:
            snapshot: an earlier state of the global model, flat fp32; None for the current one.
            version: version of the snapshot.

        """
        if self.server is None or (self.stopped and snapshot is None):
            return
        self.interrupt()
        weights = self.optimizer_weights
        if weights is not None:
            self._training = weights.leave()
        self._local_weights.save()
        if snapshot is None:
            snapshot = torch.empty(self.binding.layout.numel, dtype=torch.float32)
            version = self.server.copy_model(snapshot)
        self._shown_version = version
        self.binding.load(snapshot)
        self._show_shared_parameters()
        if weights is not None:
            weights.arrive()
        self._shows_global_model = True

    @property
    def shown_version(self) -> int:
        """Version of the global model that was shown last. Rank 0 only."""
        return self._shown_version

    def hide_global_model(self) -> None:
        """Load the saved local weights into the module again, to continue the round."""
        if not self._shows_global_model:
            return
        self._shows_global_model = False
        weights = self.optimizer_weights
        # Callbacks and hooks may have switched an optimizer meanwhile.
        training = {*self._training, *(weights.leave() if weights is not None else ())}
        self._local_weights.load()
        if self._local_shared is not None and self.worker.shared is not None:
            self.worker.shared.frozen.load(*self._local_shared)
        if weights is not None:
            weights.arrive(sorted(training))
        self.continue_round()

    def _show_shared_parameters(self) -> None:
        """Save the local values of frozen parameters that change in training, and load the run's values."""
        self._local_shared = None
        values = {} if self.server is None else self.server.shared_values()
        if self.worker.shared is not None and values:
            numbers, frozen = sorted(values), self.worker.shared.frozen
            self._local_shared = numbers, frozen.read(numbers)
            frozen.load(numbers, torch.cat([values[number] for number in numbers]))

    def shared_parameters(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return frozen parameters that change in training by name: the module's tensors, and the run's values."""
        values = {} if self.server is None else self.server.shared_values()
        if self.worker.shared is None or not values:
            return {}
        frozen = self.worker.shared.frozen
        tensors = frozen.tensors()
        named = ((frozen.names[number], value) for number, value in values.items())
        return {
            name: (tensors[name], value.view(tensors[name].shape))
            for name, value in named
            if name in tensors and tensors[name].numel() == value.numel()
        }

    def global_tensors(self) -> tuple[dict[str, Tensor], int]:
        """Return the global weights to save and their version. Rank 0 only.

        During a validation, these are the validated weights. Otherwise, they are the current ones.

        Returns:
            The fp32 weights by name, and the version of the global model.

        """
        assert self.server is not None
        flat = torch.empty(self.binding.layout.numel, dtype=torch.float32)
        if self._shows_global_model:
            self.binding.read(flat)
            version = self._shown_version
        else:
            version = self.server.copy_model(flat)
            # The time of a save between two steps is not compute time.
            self.worker.leave_out_step()
        return self.binding.layout.views(flat, "parameter", "buffer"), version

    def with_global_weights(
        self, state: dict[str, Any], weights: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """Replace the module's weights in its ``state_dict``, see :func:`.replace_weights`.

        Args:
            state: ``state_dict`` of the module.
            weights: fp32 weights by name.

        Returns:
            The new ``state_dict``, and those of its tensors that restore the exchanged model to the last bit. The list
            is empty if the state cannot restore the model, because a tensor is missing or is rounded from fp32.

        """
        shared = {} if self._shows_global_model else self.shared_parameters()
        replaced, tensors = replace_weights(state, self.module, self.binding, weights, shared)
        return replaced, tensors if self.restores_global_model(state) else []

    def restores_global_model(self, state: Mapping[str, Any]) -> bool:
        """Return whether loading the module's ``state_dict`` restores the exchanged tensors to the last bit."""
        return restores_weights(state, self.binding)

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state of the server at one moment. Rank 0 only."""
        assert self.server is not None
        state = {"format": STATE_FORMAT, "initial_workers": self.workers, **self.server.state_dict()}
        if self.budget.ends_with_data:
            position = Position.of(state["budget"]["done"], self.budget)
            state["position"] = None if position is None else list(position)
        return state

    @property
    def steps_before(self) -> int:
        """Local steps of all workers that were taken before this run was resumed from a checkpoint. Rank 0 only."""
        assert self.server is not None
        return self.server.steps_before

    def totals(self) -> dict[int, WorkerTotals]:
        """Return the totals of each worker so far. Rank 0 only."""
        assert self.server is not None
        return self.server.totals()

    # -------------------------------------------------------------------- ending

    @abstractmethod
    def sync_final_state(self, averaged: bool) -> bool:
        """Give all processes the state of rank 0's module that is not exchanged or that hooks have changed.

        Called after the end of training.

        Args:
            averaged: whether a callback has written averaged weights, including frozen parameters, into rank 0's
                module.

        Returns:
            On rank 0, whether the module still holds the final global model.

        """

    def live_workers(self) -> set[int]:
        """Return the workers that are still connected. Rank 0 only."""
        assert self.server is not None
        return set(self.server.live)

    def present_workers(self) -> set[int]:
        """Return the workers that were there at the end of training, or that are there now. Rank 0 only."""
        assert self.server is not None
        return self.server.present

    @abstractmethod
    def close(self, reason: str | None = None) -> None:
        """Free everything. If :meth:`finish` was not called, workers that are still training end with an error.

        Args:
            reason: why training ends, for the error of the other workers.

        """

    # ------------------------------------------------------------------ internal

    def _to_global_steps(self, local_steps: float) -> float:
        """Convert local steps of all workers together to global steps."""
        return to_global_steps(local_steps, self.confirmed_steps, self.budget, self.workers, self.step_offset)

    def _estimate_global_steps(self, local_steps: float) -> float:
        """Convert an estimate of the local steps of all workers. Only the server can report the end of the run."""
        steps = self._to_global_steps(local_steps)
        if self.stopped or self.workers == 1:
            return steps
        return below_end(steps, self.budget, self.step_offset)


def warn_of_own_buffer(what: str) -> None:
    """Warn that a buffer is no longer merged."""
    _log.warning(
        "%s, so it cannot be merged any more. Each rank has its own from now on, and at the end of training all ranks "
        "get that of rank 0", what,
    )  # fmt: skip
