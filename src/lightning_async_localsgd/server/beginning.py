"""The synchronous beginning of a run, on the server: who takes part in its steps, and when it is over.

All initial workers have the same weights and the same fresh state of their inner optimizers. In each step they hand in
their gradients, are answered with the mean, and take the same optimizer step. So their weights and optimizer states
stay equal, and only the workers know them. After the last step, one worker hands in its weights, which become the
global model, and all workers begin their first asynchronous rounds.

A step waits for all members that compute or validate, and for a moment for one whose connection has ended, because it
usually reconnects at once. A worker that misses a step, because it was away for longer, is no member any more, and
neither is a new session or a late joiner: they wait for the end of the beginning, and are sent the model then.
"""

from __future__ import annotations

import logging
import math
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.protocol.messages import MessageError
from lightning_async_localsgd.protocol.rejections import STEP_MISSED, Rejection, malformed
from lightning_async_localsgd.server.gradient_averages import GradientAverages

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lightning_async_localsgd.policies.budget import Budget
    from lightning_async_localsgd.policies.pacing import SpeedAwareSteps
    from lightning_async_localsgd.policies.synchronous_beginning import SynchronousBeginning
    from lightning_async_localsgd.policies.worker_minimum import WorkerMinimum
    from lightning_async_localsgd.protocol.messages import Hello, Push
    from lightning_async_localsgd.server.global_model import GlobalModel
    from lightning_async_localsgd.server.sessions import WorkerSession

_log = logging.getLogger(__name__)


PATIENCE = 5.0
"""Seconds for which a step waits for a member that was lost."""


class _Phase(Enum):
    """Where a run is in its synchronous beginning."""

    START = auto()
    """No worker was dispatched yet."""

    STEPS = auto()
    """The members compute gradients."""

    HAND_OVER = auto()
    """The members take the last step, and then one of them hands in its weights."""


class Beginning:
    """Members and steps of the synchronous beginning.

    Args:
        policy: how long the beginning is, and how much each worker contributes to a step.
        model: the global model.
        budget: local steps of all workers together.
        pacing: has measured the workers' speeds.
        live: live sessions by worker.
        minimum: knows whether training is paused. Then no step is completed.

    Attributes:
        on: whether the run is in its synchronous beginning.
        averages: the gradients of the present step, and the mean of the last one.
        completed: number of steps that are complete.

    """

    def __init__(
        self,
        policy: SynchronousBeginning,
        model: GlobalModel,
        budget: Budget,
        pacing: SpeedAwareSteps,
        live: Mapping[int, WorkerSession],
        minimum: WorkerMinimum,
    ) -> None:
        self.on = policy.steps > 0
        self.averages = GradientAverages(model.layout)
        self.completed = 0
        self._policy = policy
        self._model = model
        self._budget = budget
        self._pacing = pacing
        self._live = live
        self._minimum = minimum
        self._phase = _Phase.START
        self._members: dict[int, str] = {}
        # Whether the global model has the weights of the members.
        self._has_weights = True
        # When members were lost. They may be back since.
        self._lost_at: dict[int, float] = {}
        # For each member, the push that was answered last, and the fields of that answer.
        self._answers: dict[int, tuple[int, dict[str, Any]]] = {}
        # Members that must be answered again, because the answer was lost.
        self._repeats: set[int] = set()

    def check_dtypes(self, hello: Hello) -> str | None:
        """Return why a worker cannot begin the run synchronously; None if it can, or if the run has begun already.

        Its weights would drift away from those of the others, because the same step is rounded differently.
        """
        own = self._model.layout.dtypes
        if not self.on or self._phase is not _Phase.START or hello.dtypes in ("", own):
            return None
        return (
            f"worker {hello.worker} has tensors of {hello.dtypes} and rank 0 of {own}, but in the synchronous "
            "beginning the weights of all workers must be equal; use the same dtypes, for example "
            "precision='bf16-mixed' instead of 'bf16-true', or sync_warmup_steps=0"
        )

    # -------------------------------------------------------------------- pushes

    def rejection(self, push: Push, session: WorkerSession) -> Rejection | None:
        """Return why a push must not be merged, given whether the run is in its beginning; None if it may be."""
        if push.contents == "round":
            if self.on and push.steps > 0:
                return malformed("hands in a round in the synchronous beginning")
            return None
        return None if self.on and self.is_member(push.worker, session.id) else STEP_MISSED

    def merge(self, push: Push, vector: Tensor) -> Rejection | None:
        """Hold a gradient, or take over a member's weights. Return None, or why the push is refused."""
        if push.contents == "weights":
            self._model.load(vector)
            self._has_weights = True
            return None
        try:
            self.averages.hold(push, vector)
        except MessageError as error:
            return malformed(f"names as parameters without a gradient {error}")
        return None

    def arrive(self, push: Push, rejection: Rejection | None) -> None:
        """Note a push that was decided on. Its worker waits for the next step, unless it takes no more steps."""
        broken = push.contents == "weights" and rejection is not None and rejection.strike
        if push.final or broken:
            self._members.pop(push.worker, None)

    def join_again(self, worker: int, session: WorkerSession | None) -> bool:
        """Answer the hello of a member again that did not receive its first dispatch.

        Args:
            worker: the worker's number.
            session: the live session that has sent the hello; None if it is new, or reconnects.

        Returns:
            Whether the session is such a member.

        """
        return session is not None and session.computing and self.repeat(worker, 0)

    def leave(self, worker: int, session: str, now: float) -> None:
        """Note that a session was lost."""
        if self.is_member(worker, session):
            self._lost_at[worker] = now

    def repeat(self, worker: int, sequence: int) -> bool:
        """Answer a member's message again, in the same way, if it was answered before and the answer was lost.

        Args:
            worker: the worker's number.
            sequence: number of the push; 0 for a hello.

        Returns:
            Whether the message was answered before, in this beginning.

        """
        session = self._live[worker]
        if not self.on or not self.is_member(worker, session.id) or self._answers.get(worker, (-1,))[0] != sequence:
            return False
        self._repeats.add(worker)
        return True

    def load_weights(self, worker: int, weights: Tensor) -> None:
        """Load the weights that a member has reached, for a validation or a checkpoint."""
        session = self._live.get(worker)
        if not self.on or session is None or not self.is_member(worker, session.id):
            return
        diverged = self._model.inspect(weights).diverged
        if diverged is None:
            self._model.load(weights)
        else:
            _log.error(
                "the weights have NaN or infinite values (%s) in the synchronous beginning; the global model keeps "
                "earlier ones. Lower the learning rate, or clip gradients", diverged,
            )  # fmt: skip

    # ---------------------------------------------------------------- dispatches

    def is_member(self, worker: int, session: str) -> bool:
        """Return whether a session takes part in the present step."""
        return self._members.get(worker) == session

    def is_due(self, now: float) -> bool:
        """Return whether :meth:`dispatch` has something to do: no member is awaited any more."""
        if self._repeats.intersection(self._live_members()):
            return True
        due_at = self._due_at()
        return due_at is not None and now >= due_at

    @property
    def deadline(self) -> float | None:
        """When lost members are not awaited any more, in seconds; None if others are, or none was lost."""
        due_at = self._due_at()
        return None if due_at is None or due_at == -math.inf else due_at

    def dispatch(self, now: float, stopping: bool, broadcast: str) -> dict[int, dict[str, Any]]:
        """Complete the step, and dispatch its members.

        Args:
            now: seconds.
            stopping: whether training ends, so that no further step begins.
            broadcast: see :attr:`.Reply.broadcast`. It is the same when an answer comes again, because learning rates
                follow it, and the optimizers of all members must take the step with the same ones.

        Returns:
            Fields of the members' replies. Empty if the beginning is over, so that all waiting workers are dispatched
            as usual.

        """
        repeats = self._repeats.intersection(self._live_members())
        self._repeats.clear()
        if repeats:
            return {worker: self._answers[worker][1] for worker in sorted(repeats)}
        if self._phase is _Phase.START:
            self._members = {worker: session.id for worker, session in self._live.items() if session.waiting}
        # A session that is away misses the step.
        self._members = {worker: self._live[worker].id for worker in self._live_members()}
        members = sorted(self._members)
        if not members or (self._phase is _Phase.HAND_OVER and self._has_weights):
            self._end()
            return {}
        if self._phase is _Phase.HAND_OVER:
            # The worker that was to hand in the weights has left.
            return self._dispatch({members[0]: 0}, now, False, broadcast)
        averaged = self._phase is _Phase.STEPS
        if averaged:
            self._model.version += self.averages.average()
            self.completed += 1
            self._has_weights = False
        left, free, sizes = self._policy.left(self._budget.done), self._budget.left, self._pacing.sizes
        least = {worker: sizes.of(worker) for worker in members}
        # Gradients in a checkpoint need one more step.
        if (left > 0 or self.averages) and free >= sum(least.values()) and not stopping:
            self._phase = _Phase.STEPS
            dynamic = self._pacing.dynamic
            speeds = {worker: self._pacing.speed(worker) if dynamic else None for worker in members}
            shares = self._policy.shares(speeds, min(left, free), least)
            for worker, steps in shares.items():
                self._budget.reserve(worker, steps * least[worker], now)
            return self._dispatch(shares, now, averaged, broadcast)
        if averaged:
            self._phase = _Phase.HAND_OVER
            return self._dispatch(dict.fromkeys(members, 0), now, averaged, broadcast)
        self._end()
        return {}

    # --------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Return what outlives the server."""
        return {"on": self.on, "steps": self._policy.steps, "gradients": self.averages.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state``. A run that was past its beginning, or had none, has none now.

        The inner optimizers' states have to be equal in the beginning, and are not any more after it.
        """
        self.on = self.on and bool(state.get("on"))
        if self.on:
            self.averages.load_state_dict(state["gradients"])

    # ------------------------------------------------------------------ internal

    def _due_at(self) -> float | None:
        """Return since when, or from when on, no member is awaited.

        Returns:
            None if a live member is awaited, if no worker waits, and in a pause.

        """
        if self._minimum.paused or not all(self._live[worker].waiting for worker in self._live_members()):
            return None
        if not any(session.waiting for session in self._live.values()):
            return None
        lost = (at for worker, at in self._lost_at.items() if worker in self._members and worker not in self._live)
        return max((at + PATIENCE for at in lost), default=-math.inf)

    def _live_members(self) -> list[int]:
        return sorted(worker for worker, session in self._live.items() if self.is_member(worker, session.id))

    def _dispatch(
        self, steps: Mapping[int, int], now: float, averaged: bool, broadcast: str
    ) -> dict[int, dict[str, Any]]:
        sender = min(steps) if self._phase is _Phase.HAND_OVER else None
        units = sum(number * self._pacing.sizes.of(worker) for worker, number in steps.items())
        answers = {}
        for worker, number in steps.items():
            session = self._live[worker]
            session.dispatch(self._model.version, number, now)
            answers[worker] = {
                "synchronous": True,
                "averaged": averaged,
                "absent": self.averages.absent if averaged else "",
                "send_weights": worker == sender,
                "broadcast": broadcast,
                "progress": float(self._budget.done),
                "progress_per_step": units / number if number > 0 else 1.0,
            }
            self._answers[worker] = session.sequence, answers[worker]
        return answers

    def _end(self) -> None:
        self.on = False
        if self.completed > 0:
            _log.info("the synchronous beginning is over after %d step(s); asynchronous rounds begin", self.completed)
        if not self._has_weights:
            _log.error(
                "no worker has handed in finite weights at the end of the synchronous beginning, so training goes on "
                "from an earlier model: the last one that was validated or saved, or the initial one. Lower the "
                "learning rate, or clip gradients"
            )
        self._members = {}
        self._answers = {}
        self._lost_at = {}
        self.averages.drop()
