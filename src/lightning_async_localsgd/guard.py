"""What keeps a worker that has gone wrong from spoiling the model that belongs to all.

A push that is not finite never reaches the global model. One that is finite can do as much harm if it is large enough;
:class:`UpdateGuard` tells which is too large. :class:`Conduct` counts how often a worker does such things.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

_log = logging.getLogger(__name__)

FACTOR = 100.0
"""``"auto"`` refuses what is larger than so many times what was to be expected."""

WINDOW = 64
"""The median is over so many norms."""

WARM_UP = 20
"""Before so many have been seen nothing is refused."""

_IN_A_ROW = 3
"""So many large pushes one after the other don't come from one worker that has gone wrong."""

OFFENCES = 5
"""So many offences among a worker's last :data:`PUSHES` put it in quarantine."""

PUSHES = 10


class UpdateGuard:
    """Refuses pushes whose L2 norm is too large.

    With ``"auto"`` that is a hundred times the median of what the last 64 pushes of all workers, refused ones included,
    let expect, once 20 have been seen. That is much on purpose: near the end of training the push of a worker whose
    optimizer has begun anew may be tens of times as large as others', and sound. Workers take different numbers of
    steps in a round, and a push grows with them, at least like their square root and at most in proportion. So one of
    norm n_i in s_i steps lets expect at most ``n_i * max(s / s_i, sqrt(s / s_i))`` in s steps: n_i itself where rounds
    are equally long.

    A third push in a row that is too large means that the run has changed (a learning rate that jumps, parameters that
    are unfrozen), if these are of two workers at least or there is only one worker: it is let through, and the median
    begins anew. Norms of zero say nothing and are left out.

    Args:
        limit: ``"auto"``, the largest norm, or None for no limit.

    Raises:
        ValueError: ``limit`` is something else.

    Example::

        >>> guard = UpdateGuard(limit=2.0)
        >>> guard.judge(worker=0, norm=1.5, steps=50, live=4)
        >>> guard.judge(worker=0, norm=2.5, steps=50, live=4)
        'its norm of 2.5 is larger than max_update_norm=2'

    """

    def __init__(self, limit: float | Literal["auto"] | None = "auto") -> None:
        number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
        if limit is not None and limit != "auto" and not (number and 0.0 < float(limit) < math.inf):
            raise ValueError(
                f'max_update_norm must be "auto", a norm > 0, or None for no limit, got {limit!r}; "auto" refuses what '
                f"is more than {FACTOR:g} times as large as was to be expected"
            )
        self._limit = limit
        # Norms, and the steps that they came of.
        self._seen: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._row: deque[int] = deque(maxlen=_IN_A_ROW)

    def judge(self, worker: int, norm: float, steps: int, live: int) -> str | None:
        """Looks at a push.

        Args:
            worker: whose it is.
            norm: of its pseudo-gradient; finite.
            steps: local steps that it came of, >= 1.
            live: live workers.

        Returns:
            Why it is refused, in one line; None if it may be applied.

        """
        if self._limit is None:
            return None
        if self._limit != "auto":
            limit = self._limit
            return None if norm <= limit else f"its norm of {norm:.4g} is larger than max_update_norm={limit:g}"
        if norm == 0.0:
            return None
        expected = self._expected(steps)
        self._seen.append((norm, steps))
        if norm <= FACTOR * expected:
            self._row.clear()
            return None
        self._row.append(worker)
        if len(self._row) == _IN_A_ROW and (len(set(self._row)) > 1 or live == 1):
            _log.warning(
                "%d pushes in a row were more than %g times as large as was to be expected (this one has a norm of "
                "%.4g, not %.4g): the run has changed, and this is not one worker that has gone wrong; what is to be "
                "expected is measured anew",
                _IN_A_ROW, FACTOR, norm, expected,
            )  # fmt: skip
            self._row.clear()
            self._seen.clear()
            self._seen.append((norm, steps))
            return None
        return (
            f"its norm of {norm:.4g} is more than {FACTOR:g} times what the latest pushes let expect of {steps} steps "
            f"({expected:.4g}); max_update_norm sets another limit"
        )

    def _expected(self, steps: int) -> float:
        """The norm that a push of ``steps`` steps usually has at most; infinite as long as nobody can tell."""
        if len(self._seen) < WARM_UP:
            return math.inf
        ratios = ((norm, steps / before) for norm, before in self._seen)
        return statistics.median(norm * max(ratio, math.sqrt(ratio)) for norm, ratio in ratios)

    def state_dict(self) -> dict[str, Any]:
        """The norms that the median is over, with their steps."""
        return {"seen": [list(pair) for pair in self._seen]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the norms in ``state``."""
        self._seen = deque(((float(norm), int(steps)) for norm, steps in state["seen"]), maxlen=WINDOW)
        self._row.clear()


class Conduct:
    """What each worker's latest pushes were like."""

    def __init__(self) -> None:
        self._offences: dict[int, deque[bool]] = {}

    def note(self, worker: int, offence: bool) -> str | None:
        """Takes note of a push.

        Returns:
            If the worker is to be put in quarantine, how often it has offended, in words.

        """
        latest = self._offences.setdefault(worker, deque(maxlen=PUSHES))
        latest.append(offence)
        count = sum(latest)
        return f"{count} of its last {len(latest)} pushes" if count >= OFFENCES else None

    def forget(self, worker: int) -> None:
        """Nothing is held against the worker any more."""
        self._offences.pop(worker, None)
