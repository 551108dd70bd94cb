"""Reasons to refuse a push: a text for the log and the worker, and a short name under which rejections are counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_async_localsgd.protocol.messages import ALREADY_APPLIED, NOT_FINITE

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_async_localsgd.protocol.messages import Push

_MAX_FILE_NAME = 255
"""Longest file name, in characters."""


@dataclass(frozen=True)
class Rejection:
    """A reason to refuse a push.

    Args:
        kind: a short name. There is a fixed number of kinds, so that counting them takes a fixed amount of memory.
        text: one line that says what is wrong with this push.
        counts_steps: count the steps towards the budget, and the items as trained on, though they did not change the
            model. Otherwise a worker whose pushes are always refused would keep the run from ending.
        strike: the worker itself is at fault. A worker with too many strikes is quarantined.
        untrusted: nothing in the push can be believed.

    """

    kind: str
    text: str
    counts_steps: bool = False
    strike: bool = False
    untrusted: bool = False


REPEATED = Rejection("already_applied", ALREADY_APPLIED)
"""The push was sent again because its answer was lost. The first copy counts."""

WRONG_INCARNATION = Rejection("incarnation", "based on a model of another incarnation of the server")
"""The push belongs to a timeline that ended when the server was restarted."""

TOO_LATE = Rejection("too_late", "training was over when the push arrived")
"""All other workers had received the final model."""


STEP_MISSED = Rejection("step_missed", "the workers of the synchronous beginning have gone on without this gradient")
"""The worker was away while the others took the step."""


def diverged(where: str) -> Rejection:
    """Return the rejection of a push with NaN or infinite values."""
    return Rejection("not_finite", f"{NOT_FINITE} in {where}", counts_steps=True, strike=True)


def norm_too_large(text: str) -> Rejection:
    """Return the rejection of a push whose norm exceeds the limit of the :class:`.UpdateGuard`."""
    return Rejection("norm", text, counts_steps=True, strike=True)


def wrong_base(version: int) -> Rejection:
    """Return the rejection of a push that is not based on the worker's last dispatch."""
    return Rejection("base", f"based on version {version}, which was not this worker's last dispatch")


def stale(text: str) -> Rejection:
    """Return the rejection of a push that the staleness stage drops. Its steps were taken, and count."""
    return Rejection("stale", text, counts_steps=True)


def malformed(text: str) -> Rejection:
    """Return the rejection of a push whose header cannot be true."""
    return Rejection("malformed", text, strike=True, untrusted=True)


def items_not_held(text: str) -> Rejection:
    """Return the rejection of a push trained on items that were leased to other workers meanwhile."""
    return Rejection("items", text)


def inactive_session(worker: int, session: str) -> Rejection:
    """Return the rejection of a push whose session is no longer part of the run."""
    return Rejection(
        "session",
        f"session {session} of worker {worker} is not active: a newer session has replaced it, or the server has given "
        "it up; restart the worker to rejoin",
    )


def quarantined(text: str) -> Rejection:
    """Return the rejection of a push whose worker is in quarantine."""
    return Rejection("quarantined", text)


def check_header(push: Push, gradient: Tensor | None, numel: int) -> Rejection | None:
    """Check a push's header, and whether its pseudo-gradient has the right size.

    Args:
        push: the header.
        gradient: the pseudo-gradient that came with it.
        numel: elements of the model.

    Returns:
        Why the push is refused; None if nothing is wrong.

    """
    if push.steps < 0 or push.samples < 0 or push.tokens < 0:
        return malformed(f"claims {push.steps} steps, {push.samples} samples and {push.tokens} tokens")
    if not 0 <= push.overlap_steps <= push.steps or min(push.answer_seconds, push.wait_seconds) < 0.0:
        return malformed(
            f"claims {push.overlap_steps} of {push.steps} steps before its model, {push.answer_seconds:g} s until an "
            f"answer and {push.wait_seconds:g} s of waiting"
        )
    if not push.has_known_contents or (push.contents == "weights" and push.steps > 0):
        return malformed(f"hands in {push.contents[:80]!r} with {push.steps} steps")
    if push.has_data and (gradient is None or gradient.numel() != numel):
        size = 0 if gradient is None else gradient.numel()
        return malformed(f"has {size} elements, the model has {numel}")
    # Other processes will look for a file of that name.
    name = push.optimizer_file
    if len(name) > _MAX_FILE_NAME or name.startswith(".") or set(name) & set("/\\\0"):
        return malformed(f"names the optimizer file {name[:80]!r}, which is not a valid file name")
    return None
