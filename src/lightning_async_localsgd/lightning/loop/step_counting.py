"""Counts the steps of an inner optimizer, which may wrap another one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from torch.optim import Optimizer

from lightning_async_localsgd.runtime.optimizer_weights import nested_optimizers


class StepCounter:
    """Calls ``count`` after every step of an optimizer, until :meth:`close`.

    A module that steps its optimizers itself may call a method of a wrapper that steps the wrapped optimizer alone,
    such as the second half of a step of SAM. That is a step, too.

    Args:
        optimizer: the optimizer.
        count: called after a step. A step that a gradient scaler skips is none.

    """

    def __init__(self, optimizer: Optimizer, count: Callable[[], None]) -> None:
        self._count = count
        self._in_step = False
        self._hooks = ExitStack()
        self._hooks.callback(optimizer.register_step_pre_hook(lambda *_: self._begin()).remove)
        self._hooks.callback(optimizer.register_step_post_hook(lambda *_: self._end()).remove)
        for inner in nested_optimizers(optimizer)[1:]:
            self._hooks.callback(inner.register_step_post_hook(lambda *_: self._end_inner()).remove)

    def close(self) -> None:
        """Count no more steps."""
        self._hooks.close()

    def end_batch(self) -> None:
        """End a batch. A step that raised an error has not been counted."""
        self._in_step = False

    def _begin(self) -> None:
        self._in_step = True

    def _end(self) -> None:
        self._in_step = False
        self._count()

    def _end_inner(self) -> None:
        if not self._in_step:
            self._count()
