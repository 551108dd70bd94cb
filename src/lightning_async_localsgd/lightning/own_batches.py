"""Batch sizes of single workers in a fit: what the option means here, and that all hosts were told the same."""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.memory import is_oom_error

from lightning_async_localsgd.lightning.trainer_access.callbacks import callbacks_of
from lightning_async_localsgd.policies.worker_batches import StepBatch, WorkerBatches
from lightning_async_localsgd.protocol.messages import DOES_NOT_FIT

if TYPE_CHECKING:
    from collections.abc import Iterable

    import lightning.pytorch as pl

    from lightning_async_localsgd.launch.rendezvous import Rendezvous
    from lightning_async_localsgd.lightning.fit_state import FitState

_log = logging.getLogger(__name__)


def parsed_batches(option: Any) -> WorkerBatches | None:
    """Return the strategy's option ``batch_size``; None if all workers have the batches of the data loader.

    Raises:
        ValueError: The option has an unknown form.

    """
    return None if option is None else WorkerBatches(option)


def check_own_batches(trainer: pl.Trainer, batches: WorkerBatches | None) -> None:
    """Check that workers can have batch sizes of their own, before anything is trained.

    Raises:
        ValueError: A callback changes the accumulation.

    """
    if batches is None:
        return
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks_of(trainer)):
        raise ValueError(
            f"{batches} counts samples in steps of one size, but GradientAccumulationScheduler changes the size of the "
            "script's steps; use Trainer(accumulate_grad_batches=...), or leave batch_size out"
        )


def settle_batches(
    batches: WorkerBatches, trainer: pl.Trainer, fit: FitState, device: torch.device, rendezvous: Rendezvous | None
) -> None:
    """Let this worker have its own batches, once all ranks know that they were told the same.

    Args:
        batches: the option.
        trainer: the trainer, whose data is set up.
        fit: state of the fit, which gets the batches.
        device: this worker's device.
        rendezvous: where the ranks meet; None for a single rank and for a late joiner.

    Raises:
        ValueError: The sizes do not fit the data, or a function returns none. The text names this host.
        HostsDifferError: Another rank has raised the error.

    """
    worker, host = trainer.global_rank, socket.gethostname()
    meets = rendezvous if fit.grant is None else None

    def end(reason: str) -> NoReturn:
        text = f"worker {worker} on host {host}: {reason}"
        if meets is not None:
            meets.end_all(text)
        raise ValueError(text)

    if fit.search_error is not None:
        end(fit.search_error)
    try:
        own = _own_batches(batches, trainer, fit, worker, device_memory(device))
    except ValueError as error:
        end(str(error))
    fit.data.batch_of = lambda _: own
    fit.batch_size = _text(batches, fit)
    if meets is not None:
        of_rank_0, host_0 = meets.broadcast((fit.batch_size, host))
        if of_rank_0 != fit.batch_size:
            end(f"it has {fit.batch_size}, but rank 0 on host {host_0} has {of_rank_0}; use the same on every host")
        meets.barrier("batch sizes")


def check_virtual_batches(batches: WorkerBatches | None, worker_data: object) -> None:
    """Check the option of a simulated run.

    Raises:
        ValueError: It depends on the memory of devices, or workers have data of their own.

    """
    if batches is None:
        return
    if batches.is_auto or batches.is_function:
        raise ValueError(
            f"{batches} follows from the memory of each worker's device, but all simulated workers share one device; "
            "give sizes by worker, such as {0: 64, 1: 32}"
        )
    if worker_data is not None:
        raise ValueError(
            f"{batches} lets workers make batches of the trainer's data, but with worker_data each worker has a loader "
            "of its own; set the batch size of that loader, or leave worker_data out"
        )


def settle_virtual_batches(batches: WorkerBatches, workers: Iterable[int], trainer: pl.Trainer, fit: FitState) -> None:
    """Let the workers of a simulated run have their own batches.

    Raises:
        ValueError: The sizes do not fit the data.

    """
    own = {worker: _own_batches(batches, trainer, fit, worker, memory=0) for worker in workers}
    fit.data.batch_of = own.__getitem__
    fit.batch_size = _text(batches, fit)


def _own_batches(batches: WorkerBatches, trainer: pl.Trainer, fit: FitState, worker: int, memory: int) -> StepBatch:
    """Return the batches of a worker's step.

    Raises:
        ValueError: They do not fit the data or the module, or a function returns none.

    """
    reference, items = fit.data.reference, fit.data.items_per_epoch or 0
    if fit.found_batch_size is not None:
        # The other workers need samples, too.
        return StepBatch(max(1, min(fit.found_batch_size, items // fit.workers)), reference.accumulate)
    own = batches.of(worker, reference, memory)
    if own.accumulate > 1 and not trainer.lightning_module.automatic_optimization:
        raise ValueError(
            f"{batches} accumulates {own.accumulate} batches, but with automatic_optimization=False the module steps "
            "its optimizers itself; give a batch size only"
        )
    if own.size > items:
        raise ValueError(
            f"{batches} gives worker {worker} batches of {own.size} samples, but an epoch has only {items}; use a "
            "smaller size"
        )
    if fit.data.drops_last and own.size > items // fit.workers:
        # If no batch is larger than an equal part, at least one worker has a whole batch in each epoch.
        raise ValueError(
            f"{batches} gives worker {worker} batches of {own.size} samples, but each of {fit.workers} workers has "
            f"only {items // fit.workers} of an epoch's {items} samples on average, and with drop_last=True it would "
            "drop them; use a smaller size, or drop_last=False"
        )
    return own


def _text(batches: WorkerBatches, fit: FitState) -> str:
    return f"{batches} and steps of {fit.data.reference} in the data loader and the trainer"


def device_memory(device: torch.device) -> int:
    """Return the bytes of a device's memory. For the CPU, this is the whole memory of the host."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def text_if_too_large(
    batches: WorkerBatches, fit: FitState, trainer: pl.Trainer, device: torch.device, error: BaseException
) -> str | None:
    """Return and log what to tell all hosts if a worker's own batches do not fit into memory; None for other errors.

    Validation has the batches of its own loader, which the option does not change.
    """
    if not fit.batch_size or not trainer.training or not is_oom_error(error):
        return None
    worker = trainer.global_rank
    text = (
        f"a batch of {fit.data.batch_of(worker).size} samples of worker {worker} {DOES_NOT_FIT} of {device} on host "
        f"{socket.gethostname()} ({batches}); use a smaller size, with more accumulated batches such as (16, 4), or "
        "batch_size='auto'"
    )
    _log.error("%s", text)  # The error itself does not name the option.
    return text
