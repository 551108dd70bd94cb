"""Exchanges frozen parameters that the module moves itself, as soon as a worker has noticed that they change."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning_async_localsgd.protocol.frozen import pack_numbers, unpack_numbers
from lightning_async_localsgd.protocol.messages import Share, worker_name

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_async_localsgd.protocol.frozen import FrozenParameters
    from lightning_async_localsgd.protocol.messages import Push, Reply

_log = logging.getLogger(__name__)

_SHOWN_NAMES = 3
"""Number of parameters that the log names."""


class SharedParameters:
    """One worker's values of frozen parameters that have changed, and their exchange with the server.

    Args:
        frozen: the frozen parameters of the module.
        send: sends values to the server, and replaces them by the run's values.
        keeps_own: whether values are not exchanged, because the user does not want it. Changes are only reported.

    """

    def __init__(
        self, frozen: FrozenParameters, send: Callable[[Share, Tensor], Reply], keeps_own: bool = False
    ) -> None:
        self.frozen = frozen
        self._send = send
        self._keeps_own = keeps_own
        self._numbers: list[int] = []
        self._values: Tensor | None = None

    @property
    def numbers(self) -> list[int]:
        """Numbers of the parameters that have changed, on this worker or another one."""
        return self._numbers

    def push(self, push: Push) -> None:
        """Exchange the values at the end of a round, before its push."""
        new = [number for number in self.frozen.changed() if number not in self._numbers]
        if new:
            self._report(push.worker, new)
            self._numbers = sorted({*self._numbers, *new})
        if self._numbers and not self._keeps_own:
            self._values = self._exchange(push.worker, push.session, push.sequence, push.incarnation, merge=True)

    def adopt(self, worker: int, session: str, reply: Reply) -> None:
        """Load the run's values when a model is adopted.

        The values came with the last exchange. They are fetched again if the reply names more parameters, and at the
        end of training, so that all workers have the same.
        """
        listed = unpack_numbers(reply.shared, len(self.frozen.names))
        missing = not set(listed) <= set(self._numbers)
        if listed and (missing or reply.stop):
            self._numbers = sorted({*self._numbers, *listed})
            self._values = self._exchange(worker, session, reply.sequence, reply.incarnation, merge=False)
        if self._values is not None:
            self.frozen.load(self._numbers, self._values)

    def differing(self) -> list[str]:
        """Return the names of parameters whose values are not those of the run, after the end of training."""
        numbers = self.frozen.changed(thorough=True)
        if self._values is None:
            return [self.frozen.names[number] for number in numbers]
        unnoticed = [self.frozen.names[number] for number in numbers if number not in self._numbers]
        return [*self.frozen.differing(self._numbers, self._values), *unnoticed]

    def _exchange(self, worker: int, session: str, sequence: int, incarnation: str, merge: bool) -> Tensor:
        values = self.frozen.read(self._numbers)
        self._send(Share(worker, session, sequence, incarnation, pack_numbers(self._numbers), merge), values)
        return values

    def _report(self, worker: int, new: list[int]) -> None:
        names = ", ".join(repr(self.frozen.names[number]) for number in new[:_SHOWN_NAMES])
        what = f"{len(new)} frozen parameter(s) change in training: {names}{', ...' * (len(new) > _SHOWN_NAMES)}"
        if self._keeps_own:
            _log.warning(
                "%s: %s. With exchange.frozen=False they are not exchanged, so each rank has values of its own "
                "until the end of training, when all ranks take those of rank 0. To exchange them, remove the option",
                worker_name(worker), what,
            )  # fmt: skip
        else:
            _log.info("%s: %s; workers average them like buffers", worker_name(worker), what)
