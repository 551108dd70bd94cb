"""The option ``batch_size``: batch sizes and accumulation of single workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

BatchSize = int | tuple[int, int]
"""Samples in a batch, or these and the number of batches that are accumulated for an optimizer step."""

BatchSizes = dict[int, BatchSize] | Callable[[int], BatchSize] | Literal["auto"]
"""Batch sizes by worker, a function of the bytes of a device's memory, or the largest that fit."""

_FORM = "a batch size such as 32, or a batch size and accumulated batches such as (16, 4)"


class StepBatch(NamedTuple):
    """The batches of an optimizer step.

    Attributes:
        size: samples in a batch.
        accumulate: batches whose gradients are accumulated.

    """

    size: int
    accumulate: int

    @property
    def samples(self) -> int:
        """Samples in the step."""
        return self.size * self.accumulate

    def __str__(self) -> str:
        return f"{self.size} samples" if self.accumulate == 1 else f"{self.accumulate} x {self.size} samples"


class WorkerBatches:
    """Batch sizes of the workers, as the strategy's option says it.

    Args:
        option: batch sizes by worker, a function of the bytes of the device's memory that returns one, or ``"auto"``.
            Workers that are not named have the batches of the data loader.

    Raises:
        ValueError: The option is anything else. The text names the value.

    Example::

        >>> batches = WorkerBatches({0: 64, 1: (16, 4)})
        >>> reference = StepBatch(32, 2)
        >>> [tuple(batches.of(worker, reference, memory=0)) for worker in range(3)]
        [(64, 2), (16, 4), (32, 2)]

    """

    def __init__(self, option: Mapping[int, BatchSize] | Callable[[int], BatchSize] | Literal["auto"]) -> None:
        given: Any = option
        if isinstance(given, Mapping):
            if not given:
                raise ValueError(
                    "batch_size={} names no worker; give sizes by worker, such as {1: 32}, or leave it out"
                )
            for worker, size in given.items():
                if type(worker) is not int or worker < 0:
                    raise ValueError(
                        f"batch_size={dict(given)!r} has sizes by worker, but {worker!r} is not a worker's number "
                        "(its global rank), an integer >= 0"
                    )
                _parts(f"batch_size[{worker}]", size)
            # Configuration files have lists. Hosts compare the option as a text.
            given = {worker: tuple(size) if isinstance(size, list) else size for worker, size in given.items()}
        elif given != "auto" and not callable(given):
            raise ValueError(
                f"batch_size={given!r} must have sizes by worker such as {{0: 64, 1: 32}}, or be a function of the "
                "bytes of a device's memory, or 'auto'; a size that is the same for all workers is that of the data "
                "loader"
            )
        self._option = given

    @property
    def is_auto(self) -> bool:
        """Whether each worker searches for the largest size that fits."""
        return isinstance(self._option, str)

    @property
    def is_function(self) -> bool:
        """Whether sizes follow from the memory of the workers' devices."""
        return not self.is_auto and not isinstance(self._option, Mapping)

    @property
    def workers(self) -> list[int]:
        """The workers that the option names."""
        return sorted(self._option) if isinstance(self._option, Mapping) else []

    def __str__(self) -> str:
        """Return a text that is equal on two hosts if and only if they were told the same, as far as can be seen."""
        if isinstance(self._option, Mapping):
            return f"batch_size={ {worker: self._option[worker] for worker in sorted(self._option)} }"
        if self.is_auto:
            return "batch_size='auto'"
        function = getattr(self._option, "__qualname__", type(self._option).__qualname__)
        return f"batch_size={function}"

    def of(self, worker: int, reference: StepBatch, memory: int) -> StepBatch:
        """Return the batches of a worker's step. Not for ``"auto"``.

        Args:
            worker: the worker's number.
            reference: batches of the data loader and the trainer. The accumulation holds for sizes without one.
            memory: bytes of the memory of the worker's device.

        Raises:
            ValueError: The function returns no batch size.

        """
        assert not self.is_auto
        name, size = f"batch_size[{worker}]", reference
        if isinstance(self._option, Mapping):
            size = self._option.get(worker, reference)
        else:
            name = f"batch_size({memory})"
            try:
                size = self._option(memory)
            except Exception as error:
                raise ValueError(f"{name} failed with {type(error).__name__}: {error}") from error
        number, accumulate = _parts(name, size)
        return StepBatch(number, reference.accumulate if accumulate is None else accumulate)

    def check_workers(self, workers: int, others_may_join: bool) -> None:
        """Check the option against the number of workers.

        Args:
            workers: number of workers that the run begins with.
            others_may_join: whether other workers may join.

        Raises:
            ValueError: There is a single worker, or a named worker cannot take part.

        """
        if others_may_join:
            return
        if workers == 1:
            raise ValueError(
                f"{self} gives workers sizes of their own, but there is a single worker; set the batch size of the "
                "data loader, or use more workers"
            )
        unknown = [worker for worker in self.workers if worker >= workers]
        if unknown:
            raise ValueError(
                f"{self} names worker {unknown[0]}, but this run has the {workers} workers 0 to {workers - 1} and none "
                "can join; leave it out, or use more workers"
            )


def _parts(name: str, size: Any) -> tuple[int, int | None]:
    """Return the batch size in ``size``, and the accumulation if there is one.

    Raises:
        ValueError: ``size`` has another form. The text begins with ``name``.

    """
    parts = list(size) if isinstance(size, (tuple, list)) else [size]
    if len(parts) not in (1, 2) or any(type(part) is not int or part < 1 for part in parts):
        raise ValueError(f"{name} is {size!r}; it must be {_FORM}, all >= 1")
    return parts[0], parts[1] if len(parts) == 2 else None
