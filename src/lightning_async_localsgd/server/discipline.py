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


class Discipline:
    """Quarantines workers with too many strikes.

    Args:
        strikes: counts the workers' strikes.
        membership: who takes part.

    """

    def __init__(self, strikes: StrikeCounter, membership: Membership) -> None:
        self._strikes = strikes
        self._membership = membership

    def note(self, worker: int, rejection: Rejection | None, session: WorkerSession) -> str | None:
        """Count the worker's strikes. After too many, quarantine the worker, or reset the optimizer of worker 0.

        Args:
            worker: a worker whose push was decided on.
            rejection: why the push was refused; None if it was not.
            session: the worker's session.

        Returns:
            Why the worker is quarantined; None if it is not.

        """
        strikes = self._strikes.note(worker, rejection is not None and rejection.strike)
        if strikes is None:
            return None
        assert rejection is not None
        strikes = f"{strikes} were refused (the last one: {rejection.text})"
        if worker != HOST or len(self._membership.live) == 1:
            return self._membership.quarantine(worker, strikes)
        self._strikes.forget(worker)
        session.reset_optimizer = True
        _log.error(
            "worker %d: %s, though each round began with a fresh global model. The server is in its process, so worker "
            "%d is not quarantined. Its optimizer is reset, and its pushes are still checked. Lower the learning rate, "
            "clip gradients, or look at the data that this worker got",
            worker, strikes, worker,
        )  # fmt: skip
        return None
