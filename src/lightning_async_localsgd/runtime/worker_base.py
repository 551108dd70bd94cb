"""A worker: counts local steps, pushes pseudo-gradients and adopts the global model.

The inner optimizer's state stays with the worker when a model is adopted. A pseudo-gradient is computed from the model
as the worker received it, rounded to the dtypes of its parameters. Otherwise, rounding errors would be pushed as if
they were training progress.

With overlap, a worker goes on training while its push is in flight, and adopts the answer when a later step ends.

In the synchronous beginning, a worker accumulates the gradients of some local steps, hands them in and is answered with
the mean of all workers' gradients, with which its inner optimizer then takes one step.

Pushes may travel with fewer bits. The worker keeps what rounding leaves over, see :class:`.Uplink`.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning_async_localsgd.protocol.frozen import pack_numbers, unpack_numbers
from lightning_async_localsgd.protocol.messages import (
    ALREADY_APPLIED,
    MAX_TEXT,
    NOT_FINITE,
    PROTOCOL_VERSION,
    Hello,
    Push,
    Reply,
)
from lightning_async_localsgd.protocol.options import ExchangeOptions
from lightning_async_localsgd.protocol.overlap import LocalProgress
from lightning_async_localsgd.protocol.traits import WorkerTraits
from lightning_async_localsgd.runtime.gradients import drop_gradients, read_gradients, write_gradients
from lightning_async_localsgd.runtime.uplink import Uplink

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_async_localsgd.protocol.layout import Binding
    from lightning_async_localsgd.runtime.optimizer_weights import OptimizerWeights
    from lightning_async_localsgd.runtime.shared_parameters import SharedParameters

_log = logging.getLogger(__name__)


class WorkerBase:
    """Counts the steps of one worker, makes its pushes and adopts models. Subclasses exchange them with the server.

    A worker keeps two flat fp32 tensors: the model of the last dispatch, and the pseudo-gradient. With overlap, it also
    keeps the local model that it has pushed.

    Args:
        number: the worker's number (its global rank).
        binding: exchanged tensors of the module.
        clock: returns monotonic seconds.
        gradient: flat fp32 memory for pseudo-gradients, if several workers share it.
        exchange_options: how pushes and models travel; without rounding if not given.
        packed: memory for packed pushes, if several workers share it.
        sends_packed: see :attr:`.Exchange.sends_packed`.

    Attributes:
        reply: header of the last dispatch.
        round_steps: optimizer steps in this round, without steps that the optimizer skipped. In the synchronous
            beginning, local steps whose gradients are accumulated.
        steps_since_reply: optimizer steps since the last reply was adopted.
        total_steps: optimizer steps since the worker joined, without steps that the optimizer skipped.
        step_samples: samples in a step of this worker, if workers have batch sizes of their own; otherwise 0.
        stopped: whether training has ended and the final model has been adopted.
        diverged: whether the last push was refused because it was not finite.
        optimizer_reset: whether this round begins with fresh states of the inner optimizers.
        metrics: returns what the module has logged since the last call, see :attr:`.Push.metrics`.
        items_used: returns which data items were used since the last call, see :attr:`.Push.items_used`.
        optimizer_file: returns the file with the inner optimizers' states, see :attr:`.Push.optimizer_file`.
        shared: frozen parameters that the module moves itself; None if no other worker has them.
        optimizer_weights: what the inner optimizers remember of weights; None if the loop takes care of it.
        traits: what this worker computes with, which its hello says.
        uplink: packs this worker's pushes; None if they travel as fp32.

    """

    def __init__(
        self,
        number: int,
        binding: Binding,
        clock: Callable[[], float] = time.monotonic,
        gradient: Tensor | None = None,
        exchange_options: ExchangeOptions | None = None,
        packed: Tensor | None = None,
        sends_packed: bool = False,
    ) -> None:
        self.number = number
        self.session = uuid.uuid4().hex
        self.round_steps = 0
        self.steps_since_reply = 0
        self.total_steps = 0
        self.step_samples = 0
        self.stopped = False
        self.diverged = False
        self.optimizer_reset = False
        self.metrics: Callable[[], str] = str
        self.items_used: Callable[[], str] = str
        self.optimizer_file: Callable[[], str] = str
        self.shared: SharedParameters | None = None
        self.optimizer_weights: OptimizerWeights | None = None
        self.reply: Reply | None = None
        self._options = exchange_options if exchange_options is not None else ExchangeOptions()
        self.traits = WorkerTraits()
        self.uplink: Uplink | None = None
        if self._options.upload != "fp32":
            # Workers that share memory on the host compute their pushes in it.
            device = binding.device if gradient is None else "cpu"
            self.uplink = Uplink(binding.layout, self._options.upload, packed, device)
        self._sends_packed = sends_packed
        self._binding = binding
        self._clock = clock
        self._model = binding.new_flat()
        self._gradient = binding.new_flat() if gradient is None else gradient
        # What OptimizerWeights.leave() has returned, until a model is adopted.
        self._left: list[int] | None = None
        self._sequence = 0
        self._samples = 0
        self._tokens = 0
        self._stepped = False
        self._timed_steps = 0
        self._compute_seconds = 0.0
        self._exchange_seconds = 0.0
        self._answer_seconds = 0.0
        self._wait_seconds = 0.0
        self._step_started_at: float | None = None
        self._push_made_at = 0.0
        self._push_seconds = 0.0
        self._overlap_steps = 0
        self._local_progress: LocalProgress | None = None

    @property
    def round(self) -> int:
        """Number of the current round in this session, from 1."""
        return self._sequence + 1

    @property
    def round_units(self) -> int:
        """Progress of the present round: its steps or, if workers have batch sizes of their own, its samples."""
        return self._samples if self.step_samples and self.round_steps > 0 else self.round_steps

    @property
    def step_units(self) -> int:
        """Progress in a step of this worker."""
        return self.step_samples or 1

    @property
    def model(self) -> Tensor:
        """Model of the last dispatch, flat fp32, rounded to the dtypes of the worker's parameters."""
        return self._model

    @property
    def hello(self) -> Hello:
        """Message with which this worker joins."""
        options, traits = self._options, self.traits
        return Hello(
            PROTOCOL_VERSION,
            self.number,
            self.session,
            self._binding.layout.fingerprint,
            upload=options.upload,
            download=options.download,
            dtypes=self._binding.layout.dtypes,
            device=traits.device,
            precision=traits.precision,
            software=traits.software,
            system=traits.system,
            shuffle=traits.shuffle,
            step_samples=self.step_samples,
        )

    @property
    def gradient(self) -> Tensor:
        """Pseudo-gradient of the last push as the server gets it, flat fp32. The next push overwrites this memory.

        Undefined if it was computed on another device and the exchange needs only its packed bytes.
        """
        return self._gradient

    @property
    def overlaps(self) -> bool:
        """Whether this worker goes on training while the push of this round is in flight."""
        # The average of parameters that the module moves itself comes in an exchange of its own.
        moves_parameters = self.shared is not None and bool(self.shared.numbers)
        return self.reply is not None and self.reply.overlap_steps > 0 and not moves_parameters

    @property
    def synchronous(self) -> bool:
        """Whether this worker hands in gradients, because the run is in its synchronous beginning."""
        return self.reply is not None and self.reply.synchronous and not self.stopped

    def count_step(self) -> None:
        """Count an optimizer step. Called by a hook of the optimizer, so that skipped steps are not counted."""
        self.round_steps += 1
        self.steps_since_reply += 1
        self.total_steps += 1
        self._stepped = True

    def end_step(self, samples: int, tokens: int = 0) -> None:
        """End an optimizer step of the training loop, whether the optimizer took the step or skipped it.

        Args:
            samples: number of samples in the step's batches.
            tokens: number of tokens in the step's batches.

        """
        now = self._clock()
        if self._step_started_at is not None:
            # A skipped step takes compute time as well. The first step (compilation, cold caches) and interrupted
            # steps have no start time, so they are left out of the speed.
            self._compute_seconds += now - self._step_started_at
            self._timed_steps += self._stepped
        self._samples += samples
        self._tokens += tokens
        self._stepped = False
        self._step_started_at = now

    def leave_out_step(self) -> None:
        """Leave the current step out of the speed, because validation or saving takes time during the step."""
        self._step_started_at = None

    def make_push(self, *, final: bool = False, stop: bool = False, request_stop: bool = False) -> Push:
        """End the round and make its push. If the push has steps, :attr:`gradient` holds its pseudo-gradient.

        In the synchronous beginning, the push says that the worker has taken its last synchronous step, and may hand in
        the worker's weights.

        Args:
            final: whether this worker takes no more steps.
            stop: whether this worker asks that training end for all workers.
            request_stop: whether this worker asks that training end once the minimum of rank 0's trainer is reached.

        Returns:
            The header of the push.

        """
        assert self.reply is not None
        assert not self.stopped
        if self.optimizer_weights is not None:
            self._left = self.optimizer_weights.leave()
        self._wait_for_device()
        if self.synchronous:
            return self._make_hand_over(final, stop, request_stop)
        on_device = None if self.uplink is None else self.uplink.vector
        vector = self._gradient if on_device is None else on_device
        if self.round_steps > 0:
            self._binding.subtract_from(self._model, vector)
        push = replace(
            self._new_header(),
            final=final,
            stop=stop,
            request_stop=request_stop,
            overlap_steps=self._overlap_steps,
            answer_seconds=self._answer_seconds,
            wait_seconds=self._wait_seconds,
        )
        if self.shared is not None and self.round_steps > 0:
            self.shared.push(push)
        self._forget_steps()
        overlaps = self.overlaps and not final
        if overlaps:
            self._local_progress = self._local_progress or LocalProgress(self._binding)
            self._local_progress.mark(vector if push.steps > 0 else None)
        if self.uplink is not None and push.steps > 0:
            self.uplink.pack(vector, push.sequence)
            if on_device is not None and not self._sends_packed:
                self._gradient.copy_(on_device)
        if overlaps:
            self._arrive(trains=True)
            # Compute time excludes the making of the push.
            self._step_started_at = self._clock()
            self._push_seconds = self._step_started_at - self._push_made_at
        return push

    def make_gradient_push(self, factor: float) -> Push:
        """Make the push of a step of the synchronous beginning. :attr:`gradient` then holds the module's gradients.

        Args:
            factor: factor that makes the module's gradients the mean over the batches of the step.

        Returns:
            The header of the push.

        """
        assert self.synchronous
        self._wait_for_device()
        absent = pack_numbers(read_gradients(self._binding, self._gradient, factor))
        # If too many parameters have none, here and there, zeros stand for them.
        push = replace(self._new_header(), contents="gradient", absent=absent if len(absent) <= MAX_TEXT else "")
        self._forget_steps()
        return push

    def adopt_mean(self, reply: Reply) -> bool:
        """Replace the module's gradients by the mean that came with a reply, for the inner optimizer's step.

        Args:
            reply: the reply to a push of :meth:`make_gradient_push`.

        Returns:
            Whether the reply has a mean. If the worker has missed the step, the reply comes with a model instead. Then
            the module's gradients are removed, and the worker adopts the model after the optimizer's step.

        """
        if not reply.averaged:
            drop_gradients(self._binding)
            return False
        parameters = sum(entry.kind == "parameter" for entry in self._binding.entries)
        write_gradients(self._binding, self._model, unpack_numbers(reply.absent, parameters))
        self.begin_step(reply)
        return True

    def begin_step(self, reply: Reply) -> None:
        """Begin a step of the synchronous beginning. The worker continues from its weights, not from a model."""
        self.reply = reply
        self.steps_since_reply = 0
        now = self._clock()
        self._step_started_at = now if self._sequence > 0 else None
        if self._sequence > 0:
            self._exchange_seconds = max(0.0, now - self._push_made_at - reply.wait_seconds)

    def make_second_hand_over(self, reply: Reply) -> Push:
        """Make the push of a worker that is asked for its weights after it has taken its last synchronous step.

        Args:
            reply: the reply to the push of :meth:`make_push`.

        Returns:
            The header of the push.

        """
        self.begin_step(reply)
        self._wait_for_device()
        return self._make_hand_over(final=False, stop=False, request_stop=False)

    def _make_hand_over(self, final: bool, stop: bool, request_stop: bool) -> Push:
        """Make the push at the end of the synchronous beginning, or of the run within it.

        Gradients that are accumulated but not handed in are lost, as under DDP.
        """
        assert self.reply is not None
        self._forget_steps()
        sends = final or self.reply.send_weights
        if sends:
            self._binding.read(self._gradient)
            # The moments of all workers are equal, so they need not be averaged.
            self._gradient[self._binding.layout.model_numel :].fill_(math.nan)
        contents = "weights" if sends else "gradient"
        return replace(self._new_header(), final=final, stop=stop, request_stop=request_stop, contents=contents)

    def _wait_for_device(self) -> None:
        """Wait for the steps that the loop has launched. That time belongs to the round, not to the exchange."""
        launched_at = self._clock()
        self._binding.synchronize()
        self._push_made_at = self._clock()
        if self._timed_steps > 0:
            self._compute_seconds += self._push_made_at - launched_at

    def _new_header(self) -> Push:
        """Return the header of the next push, with the steps since the last one."""
        assert self.reply is not None
        self._sequence += 1
        return Push(
            worker=self.number,
            session=self.session,
            sequence=self._sequence,
            incarnation=self.reply.incarnation,
            base_version=self.reply.version,
            steps=self.round_steps,
            samples=self._samples,
            timed_steps=self._timed_steps,
            compute_seconds=self._compute_seconds,
            exchange_seconds=self._exchange_seconds,
            final=False,
            stop=False,
            items_used=self.items_used(),
            metrics=self.metrics(),
            optimizer_file=self.optimizer_file(),
            tokens=self._tokens,
        )

    def accepts(self, reply: Reply) -> bool:
        """Return whether what was learned while a push was in flight counts after the reply to it."""
        return not reply.stop and reply.refused in (None, ALREADY_APPLIED)

    def adopt(self, reply: Reply, answered_at: float | None = None, waited: float = 0.0) -> None:
        """Begin a new round: load :attr:`model`, which came with the reply, into the module.

        Args:
            reply: the reply.
            answered_at: with overlap, time at which the reply arrived. What was learned since the push is kept, unless
                the push was refused or training has ended.
            waited: with overlap, seconds that the worker has waited for the reply.

        """
        began_at = self._clock()
        if self.uplink is not None and reply.refused not in (None, ALREADY_APPLIED):
            self.uplink.drop()
        if answered_at is not None and self.optimizer_weights is not None:
            self._left = self.optimizer_weights.leave()
        if self.round_steps > 0 and self.accepts(reply):
            assert self._local_progress is not None
            self._local_progress.load_onto(self._model)
        else:
            self._forget_steps()
            self._binding.load(self._model)
            self._load_moments()
        self._overlap_steps = self.round_steps
        if self.shared is not None:
            self.shared.adopt(self.number, self.session, reply)
        self._arrive(trains=not reply.stop)
        self.reply = reply
        self.stopped = reply.stop
        self.steps_since_reply = 0
        # Compute time excludes the exchange, so the next step starts now. The session's first step is not timed.
        now = self._clock()
        self._step_started_at = now if self._sequence > 0 else None
        if self._sequence > 0:
            self.diverged = reply.refused is not None and reply.refused.startswith(NOT_FINITE)
            self.optimizer_reset = reply.reset_optimizer
            if reply.refused is not None and reply.refused != ALREADY_APPLIED:
                # Rank 0 warns, and usually writes to the same console.
                _log.info("worker %d: push %d was refused: %s", self.number, self._sequence, reply.refused)
            self._wait_seconds = waited
            if answered_at is None:
                self._exchange_seconds = max(0.0, now - self._push_made_at - reply.wait_seconds)
                self._answer_seconds = 0.0
            else:
                self._exchange_seconds = self._push_seconds + now - began_at
                self._answer_seconds = max(0.0, answered_at - self._push_made_at - reply.wait_seconds)

    def _forget_steps(self) -> None:
        self.round_steps = 0
        self._samples = 0
        self._tokens = 0
        self._timed_steps = 0
        self._compute_seconds = 0.0

    def _arrive(self, trains: bool) -> None:
        """Let the inner optimizers continue from the module's weights.

        Args:
            trains: whether more steps follow. Otherwise, the module keeps the weights that the optimizers show.

        """
        left, self._left = self._left, None
        if self.optimizer_weights is not None and left is not None:
            self.optimizer_weights.arrive(left if trains else ())

    def _load_moments(self) -> None:
        """Load the second moments that came with the reply into the inner optimizers."""
        self._binding.load_moments(self._model)
