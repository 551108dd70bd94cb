"""Why a push is refused: a line for the log and for its worker, and a short name under which it is counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_async_localsgd.messages import ALREADY_APPLIED, NOT_FINITE

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_async_localsgd.messages import Push

_LONGEST_NAME = 255
"""Of a file, in characters."""


@dataclass(frozen=True)
class Objection:
    """A reason to refuse a push.

    Args:
        kind: a short name; there is a fixed number of them, so that counting them takes a fixed amount of memory.
        text: one line that says what is wrong with this push.
        counts: the steps of the round count towards the budget, and its items as trained on, though they taught
            nothing. Otherwise a worker that goes on like this would keep a run from ever coming to its end.
        offence: it is the worker's own doing; a worker that does it again and again is quarantined.
        nonsense: nothing that the push says is to be believed.

    """

    kind: str
    text: str
    counts: bool = False
    offence: bool = False
    nonsense: bool = False


REPEATED = Objection("already_applied", ALREADY_APPLIED)
"""It was sent again, because the answer was lost. The first copy counts."""

OTHER_INCARNATION = Objection("incarnation", "made for another incarnation of the server")
"""It belongs to a timeline that was lost when the server was started again."""

TOO_LATE = Objection("too_late", "training was over when it came")
"""Everybody else had been given the final model."""


def diverged(where: str) -> Objection:
    """It holds NaN or infinite values."""
    return Objection("not_finite", f"{NOT_FINITE} in {where}", counts=True, offence=True)


def too_large(text: str) -> Objection:
    """Its norm is beyond what the :class:`.UpdateGuard` lets through."""
    return Objection("norm", text, counts=True, offence=True)


def other_base(version: int) -> Objection:
    """It is not based on what its worker was dispatched last."""
    return Objection("base", f"based on version {version}, which was not this worker's last dispatch")


def stale(text: str) -> Objection:
    """The staleness stage drops it: its steps were taken, and are worth nothing to the model as it is now."""
    return Objection("stale", text, counts=True)


def malformed(text: str) -> Objection:
    """What it says of itself cannot be."""
    return Objection("malformed", text, offence=True, nonsense=True)


def items_elsewhere(text: str) -> Objection:
    """Others have been given the items that it was trained on."""
    return Objection("items", text)


def not_live(worker: int, session: str) -> Objection:
    """Its session has no place in the run any more."""
    return Objection(
        "session",
        f"session {session} of worker {worker} is not a live one: a newer session has taken its place, or the server "
        "had given it up; start the worker again to rejoin",
    )


def quarantined(text: str) -> Objection:
    """Its worker is in quarantine."""
    return Objection("quarantined", text)


def form_objection(push: Push, gradient: Tensor | None, numel: int) -> Objection | None:
    """What is wrong with a push on the face of it.

    Args:
        push: its header.
        gradient: what came with it.
        numel: elements of the model.

    """
    if push.steps < 0 or push.samples < 0 or push.tokens < 0:
        return malformed(f"claims {push.steps} steps, {push.samples} samples and {push.tokens} tokens")
    if push.steps > 0 and (gradient is None or gradient.numel() != numel):
        size = 0 if gradient is None else gradient.numel()
        return malformed(f"has {size} elements, the model has {numel}")
    # Other processes will look for a file of that name.
    name = push.inner
    if len(name) > _LONGEST_NAME or name.startswith(".") or set(name) & set("/\\\0"):
        return malformed(f"has saved its optimizer's state as {name[:80]!r}, which is no name of a file")
    return None
