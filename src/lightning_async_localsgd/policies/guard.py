"""Protects the global model from broken workers.

The server refuses pushes that are not finite. :class:`UpdateGuard` detects finite pushes that are too large, which can
do as much harm. :class:`StrikeCounter` counts how often the pushes of a worker are refused for such reasons.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

_log = logging.getLogger(__name__)

SCALE_ABOVE = 100.0
"""With ``"auto"``, pushes larger than this many times the largest expected norm are scaled down to that norm."""

REFUSE_ABOVE = 10_000.0
"""With ``"auto"``, pushes larger than this many times the largest expected norm are refused."""

WARM_UP = 20
"""Number of pushes that must be known before a push is scaled down or refused."""

MAX_WORKERS = 1024
"""Number of workers whose norms are remembered. If there are more, the one with the smallest norm is forgotten."""

_IN_A_ROW = 3
"""Number of consecutive refused pushes, of more than one worker, that show that the run has changed."""

MAX_STRIKES = 5
"""Number of strikes among a worker's last :data:`PUSHES` pushes after which the worker is quarantined."""

PUSHES = 10
"""Number of a worker's last pushes in which strikes are counted."""


def check_max_update_norm(limit: object) -> None:
    """Check a value of the option ``merge.max_update_norm``.

    Raises:
        ValueError: The value is invalid.

    """
    number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
    if limit is not None and limit != "auto" and not (number and 0.0 < float(limit) < math.inf):  # type: ignore[arg-type]
        raise ValueError(
            f"merge.max_update_norm={limit!r} must be 'auto', a norm > 0, or None for no limit; 'auto' refuses pushes "
            f"that are more than {REFUSE_ABOVE:g} times as large as the earlier pushes of the run suggest"
        )


class Verdict(NamedTuple):
    """What becomes of a push.

    Args:
        refusal: why the push is refused, in one line; None if it may be merged.
        factor: factor of the push before it is merged; 1 leaves the push as it is.

    """

    refusal: str | None = None
    factor: float = 1.0


@dataclass
class _Largest:
    """The largest pushes of a worker.

    Args:
        norm: largest norm of a push.
        rate: largest norm of a push, divided by the steps of that push.
        first_base: earliest version of the global model from which one of its pushes started.
        last_base: latest one.

    """

    norm: float
    rate: float
    first_base: int
    last_base: int

    def expected(self, steps: int) -> float:
        """Return the norm that a push of ``steps`` steps may have, if no step moves the model further than before."""
        return max(self.norm, self.rate * steps)


class UpdateGuard:
    """Finds pushes whose L2 norm is too large.

    With ``"auto"``, a push is compared with the largest norms of the whole run, not with recent ones. Norms differ with
    the progress of training: they fall with the loss and with the learning rate, by any factor. A push of a slow worker
    that started from an old model, of a worker whose optimizer is new, and the first push after the learning rate
    returned to its maximum, are all large compared with recent pushes. None of them is large compared with the pushes
    of the beginning. A push of s steps is expected to have at most the norm ``max(n, s * r)``, where n is the largest
    norm of a push so far, and r the largest norm per step.

    A worker's own norms do not count while there are others to compare with. A broken worker therefore cannot raise the
    limit for itself, however slowly its norms grow. Others to compare with have pushed since as early a model, and have
    lately pushed from about the same model. If there are none, because the others are slow, validate or joined late,
    the worker's own norms count as well: only it has seen how norms were at the beginning, or how they have grown.

    Pushes that exceed the expected norm 100 times are merged, but scaled down to it: parameters may have been unfrozen,
    or the learning rate may have jumped. Pushes that exceed it 10,000 times are refused. The first 20 pushes of a run
    are merged as they are. Norms of zero are ignored.

    Three consecutive refused pushes, of at least two workers or of the only worker, mean that the run has changed. The
    third one is accepted, and only its norm is remembered.

    Args:
        limit: ``"auto"``, the largest norm, or None for no limit.

    Raises:
        ValueError: ``limit`` is invalid.

    Example::

        >>> guard = UpdateGuard(limit=2.0)
        >>> guard.judge(worker=0, norm=1.5, steps=50, base=0, live=4)
        Verdict(refusal=None, factor=1.0)
        >>> guard.judge(worker=0, norm=2.5, steps=50, base=1, live=4).refusal
        'its norm of 2.5 is larger than merge.max_update_norm=2'

    """

    def __init__(self, limit: float | Literal["auto"] | None = "auto") -> None:
        check_max_update_norm(limit)
        self._limit = limit
        self._pushes = 0
        self._largest: dict[int, _Largest] = {}
        self._row: deque[int] = deque(maxlen=_IN_A_ROW)

    def judge(self, worker: int, norm: float, steps: int, base: int, live: int) -> Verdict:
        """Check the norm of a push.

        Args:
            worker: the worker's number.
            norm: L2 norm of the pseudo-gradient; finite.
            steps: local steps in the push, at least 1.
            base: version of the global model that the push started from.
            live: number of live workers.

        """
        if self._limit is None:
            return Verdict()
        if self._limit != "auto":
            limit = self._limit
            return Verdict(
                None if norm <= limit else f"its norm of {norm:.4g} is larger than merge.max_update_norm={limit:g}"
            )
        if norm == 0.0:
            return Verdict()
        expected = self._expected(worker, steps, base, live)
        if norm > REFUSE_ABOVE * expected and not self._run_has_changed(worker, norm, expected, live):
            return Verdict(
                f"its norm of {norm:.4g} exceeds {REFUSE_ABOVE:g} times the largest norm expected for {steps} steps "
                f"({expected:.4g}); merge.max_update_norm sets another limit"
            )
        self._row.clear()
        self._pushes = min(self._pushes + 1, WARM_UP)
        self._remember(worker, norm, steps, base)
        if not SCALE_ABOVE * expected < norm <= REFUSE_ABOVE * expected:
            return Verdict()
        _log.warning(
            "worker %d: a push of %d steps has a norm of %.4g, over %g times the largest norm expected (%.4g); "
            "it is merged, but scaled down to that norm. merge.max_update_norm=None merges pushes as they are",
            worker, steps, norm, SCALE_ABOVE, expected,
        )  # fmt: skip
        return Verdict(factor=expected / norm)

    def state_dict(self) -> dict[str, Any]:
        """Return the norms that pushes are compared with."""
        return {"pushes": self._pushes, "largest": {str(w): list(astuple(one)) for w, one in self._largest.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the norms in ``state``."""
        self._pushes = int(state.get("pushes", 0))
        self._largest = {
            int(worker): _Largest(float(norm), float(rate), int(first_base), int(last_base))
            for worker, (norm, rate, first_base, last_base) in state.get("largest", {}).items()
        }
        self._row.clear()

    def _expected(self, worker: int, steps: int, base: int, live: int) -> float:
        """Return the largest norm expected of a push; infinite while too few pushes are known."""
        if self._pushes < WARM_UP:
            return math.inf
        own = self._largest.get(worker)
        others = [one for number, one in self._largest.items() if number != worker]
        # All live workers together make about ``live`` versions while each of them pushes once.
        turn = 2 * live
        if own is not None and not any(
            one.last_base >= base - turn and one.first_base <= own.first_base + turn for one in others
        ):
            others.append(own)
        return max(one.expected(steps) for one in others)

    def _run_has_changed(self, worker: int, norm: float, expected: float, live: int) -> bool:
        """Count a push that is to be refused, and return whether the run has changed, so that it is not refused."""
        self._row.append(worker)
        if len(self._row) < _IN_A_ROW or (len(set(self._row)) == 1 and live > 1):
            return False
        _log.warning(
            "%d consecutive pushes exceeded %g times the largest norm expected (the last one has a norm of %.4g, "
            "expected was %.4g): the run has changed, so the expected norm is measured again",
            _IN_A_ROW, REFUSE_ABOVE, norm, expected,
        )  # fmt: skip
        self._largest.clear()
        return True

    def _remember(self, worker: int, norm: float, steps: int, base: int) -> None:
        known = self._largest.get(worker, _Largest(0.0, 0.0, base, base))
        self._largest[worker] = _Largest(
            max(known.norm, norm),
            max(known.rate, norm / steps),
            min(known.first_base, base),
            max(known.last_base, base),
        )
        if len(self._largest) > MAX_WORKERS:
            del self._largest[min(self._largest, key=lambda number: self._largest[number].norm)]


class StrikeCounter:
    """Counts the strikes among the last pushes of each worker."""

    def __init__(self) -> None:
        self._strikes: dict[int, deque[bool]] = {}

    def note(self, worker: int, strike: bool) -> str | None:
        """Record a push, with or without a strike.

        Returns:
            The number of strikes as a text if the worker must be quarantined; None if not.

        """
        latest = self._strikes.setdefault(worker, deque(maxlen=PUSHES))
        latest.append(strike)
        count = sum(latest)
        return f"{count} of its last {len(latest)} pushes" if count >= MAX_STRIKES else None

    def forget(self, worker: int) -> None:
        """Forget the strikes of a worker."""
        self._strikes.pop(worker, None)
