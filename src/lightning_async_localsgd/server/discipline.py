"""What becomes of a worker whose pushes are refused again and again."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lightning_async_localsgd.server.recalls import HOST

if TYPE_CHECKING:
    from lightning_async_localsgd.policies.guard import StrikeCounter
    from lightning_async_localsgd.protocol.rejections import Rejection
    from lightning_async_localsgd.server.membership import Membership
    from lightning_async_localsgd.server.sessions import WorkerSession

_log = logging.getLogger(__name__)

_IN_ROUNDS = (
    "though each round began with a fresh global model; its optimizer's state is probably broken, or its machine is: "
    "lower the learning rate, clip gradients, or look at the data that this worker got"
)
_IN_BEGINNING = (
    "though all workers have the same weights in the synchronous beginning; the data that this worker got is probably "
    "broken, or its machine is: look at both, lower the learning rate, or clip gradients"
)


class Discipline:
    """Quarantines workers with too many strikes.

    Args:
        strikes: counts the workers' strikes.
        membership: who takes part.

    """

    def __init__(self, strikes: StrikeCounter, membership: Membership) -> None:
        self._strikes = strikes
        self._membership = membership

    def note(
        self, worker: int, rejection: Rejection | None, session: WorkerSession, synchronous: bool = False
    ) -> str | None:
        """Count the worker's strikes. After too many, quarantine the worker, or reset the optimizer of worker 0.

        In the synchronous beginning, all optimizers have the same state, so that of worker 0 is not reset.

        Args:
            worker: a worker whose push was decided on.
            rejection: why the push was refused; None if it was not.
            session: the worker's session.
            synchronous: whether the run is in its synchronous beginning.

        Returns:
            Why the worker is quarantined; None if it is not.

        """
        strikes = self._strikes.note(worker, rejection is not None and rejection.strike)
        if strikes is None:
            return None
        assert rejection is not None
        strikes = f"{strikes} were refused (the last one: {rejection.text})"
        if worker != HOST or len(self._membership.live) == 1:
            return self._membership.quarantine(worker, strikes, _IN_BEGINNING if synchronous else _IN_ROUNDS)
        self._strikes.forget(worker)
        if synchronous:
            _log.error(
                "worker %d: %s, %s. The server is in its process, so worker %d is not quarantined. Its gradients are "
                "still checked, and invalid ones are left out",
                worker, strikes, _IN_BEGINNING, worker,
            )  # fmt: skip
            return None
        session.reset_optimizer = True
        _log.error(
            "worker %d: %s, though each round began with a fresh global model. The server is in its process, so worker "
            "%d is not quarantined. Its optimizer is reset, and its pushes are still checked. Lower the learning rate, "
            "clip gradients, or look at the data that this worker got",
            worker, strikes, worker,
        )  # fmt: skip
        return None
