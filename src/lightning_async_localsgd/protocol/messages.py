"""The messages that workers and the server exchange.

Plain values only, without tensors, sockets or clocks, so that the live server, the wire and a simulated cluster use the
same messages. On the wire a message is a JSON object. The receiver decodes it with :meth:`Message.decode`, which
refuses anything that is not exactly the expected message.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

_M = TypeVar("_M", bound="Message")

PROTOCOL_VERSION = 11
"""Raised whenever a peer of the previous version would misread a message."""

ALREADY_APPLIED = "already applied"
"""Why a push that is sent twice is refused. The worker goes on as if its first copy had been answered."""

NOT_FINITE = "holds NaN or infinite values"
"""Why a push of a worker that has diverged is refused."""

DOES_NOT_FIT = "does not fit into the memory"
"""Part of the reason for which a worker ends whose own batches are too large. Without it, the run cannot be meant."""

EVALUATOR = 2**31 - 1
"""Number of the evaluator in messages. The evaluator is no worker: it validates the global model for rank 0."""

MAX_HEADER_BYTES = 64 * 1024
"""Longer message headers are refused before they are parsed."""

MAX_TEXT = 16 * 1024
"""Longest text in a message, in characters."""


Contents = Literal["round", "gradient", "weights"]
"""What a push hands in: a round's pseudo-gradient; in the synchronous beginning, the mean of a worker's gradients, or
the weights that all workers have reached."""


def worker_name(number: int) -> str:
    """Return how people call a worker with this number: the evaluator is not a worker.

    Example::

        >>> worker_name(3), worker_name(EVALUATOR)
        ('worker 3', 'the evaluator')

    """
    return "the evaluator" if number == EVALUATOR else f"worker {number}"


class MessageError(ValueError):
    """Received data is not the expected message. The text says what is wrong with the data."""


@dataclass(frozen=True)
class Message:
    """Base of all messages: frozen dataclasses of ``int``, ``float``, ``bool``, ``str`` and ``str | None``."""

    def encode(self) -> bytes:
        """Return the message as a JSON object in UTF-8."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def decode(cls: type[_M], data: bytes) -> _M:
        """Return the message in ``data``.

        Raises:
            MessageError: ``data`` is too long, is not a JSON object, or does not have exactly this message's fields.

        """
        if len(data) > MAX_HEADER_BYTES:
            raise MessageError(f"{cls.__name__} has {len(data)} bytes, the limit is {MAX_HEADER_BYTES}")
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise MessageError(f"{cls.__name__} is not JSON: {error}") from None
        fields = {field.name: field.type for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or values.keys() != fields.keys():
            raise MessageError(f"{cls.__name__} must have exactly the fields {sorted(fields)}")
        for name, kind in fields.items():
            values[name] = _check_value(cls.__name__, name, str(kind), values[name])
        return cls(**values)


def _check_value(message: str, name: str, kind: str, value: Any) -> Any:
    """Return ``value`` if it has the type ``kind`` and is within the bounds that keep later arithmetic safe."""
    good = False
    if kind == "int":
        good = type(value) is int and abs(value) < 2**53
    elif kind == "bool":
        good = type(value) is bool
    elif kind == "float":
        good = type(value) in (int, float) and abs(value) < 2**53 and math.isfinite(value)
        value = float(value) if good else value
    elif kind == "str":
        good = _is_text(value)
    elif kind == "str | None":
        good = value is None or _is_text(value)
    if not good:
        raise MessageError(f"{message}.{name} must be {kind}, got {str(value)[:80]!r}")
    return value


def _is_text(value: Any) -> bool:
    """Return whether ``value`` is a short text that UTF-8 can encode. JSON may hold halves of surrogate pairs."""
    return type(value) is str and len(value) <= MAX_TEXT and not any("\ud800" <= letter <= "\udfff" for letter in value)


@dataclass(frozen=True)
class Hello(Message):
    """The first message of a worker over a connection.

    Args:
        protocol: the sender's :data:`PROTOCOL_VERSION`.
        worker: the worker's number (its global rank).
        session: random name of this life of the worker. A restarted worker has another session.
        fingerprint: hash of the ordered (name, shape) list of everything exchanged.
        reconnecting: the session continues over a new connection, because the old one broke while a push was
            unanswered. The worker sends that push again next, and needs no model before.
        upload: how the parameters of the worker's pushes travel, see :attr:`.ExchangeOptions.upload`.
        download: how it expects the parameters of models to travel, see :attr:`.ExchangeOptions.download`.
        dtypes: dtypes of the exchanged tensors in the worker's module, see :attr:`.Layout.dtypes`.
        device: see :class:`.WorkerTraits`, as for the fields below.
        precision: precision of training.
        software: version of torch, such as ``"torch 2.9.0"``.
        system: operating system and machine.
        shuffle: hash of the order in which the worker shuffles.
        step_samples: samples in a local step of the worker, if workers have batch sizes of their own; otherwise 0.

    """

    protocol: int
    worker: int
    session: str
    fingerprint: str
    reconnecting: bool = False
    upload: str = "fp32"
    download: str = "fp32"
    dtypes: str = ""
    device: str = ""
    precision: str = ""
    software: str = ""
    system: str = ""
    shuffle: str = ""
    step_samples: int = 0


@dataclass(frozen=True)
class Push(Message):
    """Header of a pseudo-gradient (theta_dispatched - theta_local).

    Args:
        worker: the worker's number.
        session: the worker's session, as in its :class:`Hello`.
        sequence: counts this session's pushes from 1. A push that is sent again keeps its number.
        incarnation: random name of the start of the server that dispatched the base model.
        base_version: version of the dispatched model that the round started from.
        steps: real local optimizer steps in the round. A last push may have 0 steps; nothing is applied then.
        samples: samples (rows of batches) trained on in the round.
        timed_steps: number of steps that ``compute_seconds`` covers. Both leave out first steps, and steps that
            validation or a checkpoint interrupted.
        compute_seconds: seconds of computing for ``timed_steps`` steps.
        exchange_seconds: seconds that training stood still for this worker's previous exchange, without the wait for
            the dispatch window.
        final: this worker takes no more steps and waits for the final model.
        stop: end training for all workers now (``trainer.should_stop``).
        items_used: for each data stream whose count has changed since the last push, the number of leased items that
            this session has trained on so far, in the order in which they were granted: a JSON object, or "".
        metrics: values that this worker's module has logged since its last push, for rank 0's loggers: a JSON object,
            or "".
        optimizer_file: name of the file in which this worker last saved the states of its inner optimizers, with a
            hash of the contents; "" if nothing was saved.
        tokens: tokens trained on in the round, see :func:`.batch_tokens`.
        request_stop: end training for all workers as soon as rank 0 has reached its minimum of steps or epochs.
        overlap_steps: how many of the first steps were taken before the base model had arrived.
        answer_seconds: with overlap, seconds until the answer to the previous push arrived, without the wait for the
            dispatch window; 0 without.
        wait_seconds: with overlap, seconds that training stood still because that answer was late; 0 without.
        contents: what the push hands in, see :data:`Contents`. A push of weights has no steps. A ``"gradient"`` without
            steps only says that the worker has taken the last step of the synchronous beginning. Gradients and weights
            travel as fp32, without second moments.
        absent: numbers of the parameters that have no gradient, see :func:`.pack_numbers`. Their part is zero.

    """

    worker: int
    session: str
    sequence: int
    incarnation: str
    base_version: int
    steps: int
    samples: int
    timed_steps: int
    compute_seconds: float
    exchange_seconds: float
    final: bool
    stop: bool
    items_used: str = ""
    metrics: str = ""
    optimizer_file: str = ""
    tokens: int = 0
    request_stop: bool = False
    overlap_steps: int = 0
    answer_seconds: float = 0.0
    wait_seconds: float = 0.0
    contents: str = "round"
    absent: str = ""

    @property
    def has_data(self) -> bool:
        """Whether a vector follows the header."""
        return self.steps > 0 or self.contents == "weights"

    @property
    def has_known_contents(self) -> bool:
        """Whether :attr:`contents` is one of :data:`Contents`."""
        return self.contents in get_args(Contents)


@dataclass(frozen=True)
class Reply(Message):
    """Header of a dispatch: the global model, and what to do with it.

    Args:
        incarnation: random name of this start of the server.
        sequence: number of the push that is answered; 0 answers a :class:`Hello`.
        version: version of the global model that follows (pushes applied so far).
        staleness: versions between the base of the answered push and its merge; 0 for a hello.
        local_steps: optimizer steps to take in the next round; 0 if ``stop``. If ``synchronous``, local steps' worth of
            batches whose gradients the worker accumulates and hands in; 0 at the end of the synchronous beginning.
        progress: local steps of all workers together that the server expects to be done by now. If workers have batch
            sizes of their own, these are samples.
        progress_per_step: by how much ``progress`` grows while this worker takes one step, at least by that step.
        wait_seconds: seconds between the push's arrival and this dispatch (dispatch window, quorum, end of the budget).
        stop: training is over. The model that follows is the final one.
        refused: why the push was not applied, in one line; None if it was applied.
        broadcast: values that rank 0 has set for all workers (learning rates that follow a metric): a JSON object, or
            "".
        save_request: how often rank 0 has requested so far that workers save the states of their inner optimizers. A
            worker saves at the end of a round after the number has grown.
        reset_optimizer: begin the round with fresh states of the inner optimizers.
        overlap_steps: optimizer steps that the worker may take after those of the round, while its push is in flight.
            If 0, the worker waits for the answer.
        shared: numbers of the frozen parameters that change in training, see :func:`.pack_numbers`. Workers exchange
            them with :class:`Share`.
        encoding: how the parameters of the model that follows travel: ``"fp32"``, ``"bf16"``, or ``"int8"``, the
            difference to the model that the worker holds. ``"mean"`` if ``averaged``: fp32, without second moments.
        synchronous: the worker hands in gradients, see ``local_steps``. It has no round of its own.
        averaged: the vector that follows is not the model, but the mean of the gradients of all workers, with which the
            worker takes an optimizer step, and of their buffers.
        absent: numbers of the parameters for which no worker has a gradient, see :func:`.pack_numbers`.
        send_weights: the worker hands in its weights once it has taken the step, so that the server gets the model.

    """

    incarnation: str
    sequence: int
    version: int
    staleness: int
    local_steps: int
    progress: float
    progress_per_step: float
    wait_seconds: float
    stop: bool
    refused: str | None
    broadcast: str = ""
    save_request: int = 0
    reset_optimizer: bool = False
    overlap_steps: int = 0
    shared: str = ""
    encoding: str = "fp32"
    synchronous: bool = False
    averaged: bool = False
    absent: str = ""
    send_weights: bool = False


@dataclass(frozen=True)
class Share(Message):
    """Header of a worker's values of frozen parameters that the module moves itself, such as a teacher.

    The values follow like those of a push. The answer is a :class:`Reply` with the run's values of these parameters,
    of which only ``sequence`` and ``shared`` are meaningful.

    Args:
        worker: the worker's number.
        session: the worker's session.
        sequence: number of the push that comes next, or 0 with the first model.
        incarnation: random name of the start of the server.
        parameters: numbers of the parameters, see :func:`.pack_numbers`.
        merge: move the run's values towards the worker's. Otherwise the worker only asks for the run's values.

    """

    worker: int
    session: str
    sequence: int
    incarnation: str
    parameters: str
    merge: bool


@dataclass(frozen=True)
class LeaseRequest(Message):
    """A worker requests the next items of an epoch.

    Args:
        worker: the worker's number.
        session: the worker's session.
        number: counts this session's requests from 1. A request that is sent again keeps its number and gets the same
            answer.
        stream: name of the data loader, the same on all ranks.
        items: items (usually batches) of one epoch, all ranks together.
        unit: leases are multiples of this many items, except at the end of an epoch.
        epoch: the epoch that the worker is in.
        allow_later_epoch: accept items of the epoch that is being leased now, even if it is later.
        ordered: the order matters (the data is not shuffled), so lease items in order, from the first to the last.
        own_unit: items are samples, and other workers may request them in units of other sizes.

    """

    worker: int
    session: str
    number: int
    stream: str
    items: int
    unit: int
    epoch: int
    allow_later_epoch: bool
    ordered: bool = False
    own_unit: bool = False


@dataclass(frozen=True)
class Lease(Message):
    """Answers a :class:`LeaseRequest`: the worker may train on items ``start`` to ``stop`` (exclusive) of an epoch.

    Args:
        number: number of the request.
        epoch: the epoch in whose order the items are counted. It differs from the requested epoch if items of a lost
            worker are leased again.
        start: first item.
        stop: one past the last item; equal to ``start`` if the requested epoch is over.
        refused: why no items are granted, in one line; None if the request was fine.

    """

    number: int
    epoch: int
    start: int
    stop: int
    refused: str | None


@dataclass(frozen=True)
class JoinRequest(Message):
    """A process that was not there from the start requests what it needs to know to join.

    Args:
        protocol: the sender's :data:`PROTOCOL_VERSION`.
        worker: number of the worker whose earlier process this one replaces; -1 requests a new number.
        nonce: random. The server proves on it that it knows the token.

    """

    protocol: int
    worker: int
    nonce: str


@dataclass(frozen=True)
class StatusRequest(Message):
    """A process that knows the token asks for the state of the run. It changes nothing.

    Args:
        protocol: the sender's :data:`PROTOCOL_VERSION`.
        nonce: random, new in each request. The server proves on it that it knows the token.

    """

    protocol: int
    nonce: str


@dataclass(frozen=True)
class JoinInfo(Message):
    """Answers a :class:`JoinRequest` with what the initial workers have agreed on.

    Args:
        workers: number of workers that the run was started with.
        seed: seed of the order of the training data.
        fit_number: number of the script's fits so far, this one included.
        run_name: name of the run's folder.
        frozen_digest: hashes of the frozen parameters, which all workers need and which are not exchanged.
        epoch: the epoch that rank 0 is in.
        step_offset: global steps that the trainer has counted beyond the steps of this run.
        incarnation: random name of this start of the server.
        proof: proves that the server knows the token.
        worker: number of the worker that joins; -1 if there is none.
        refused: why the run cannot be joined, in one line; None if it can.
        batch_size: description of the workers' batch sizes, if they have sizes of their own; otherwise "".

    """

    workers: int
    seed: int
    fit_number: int
    run_name: str
    frozen_digest: str
    epoch: int = 0
    step_offset: int = 0
    incarnation: str = ""
    proof: str = ""
    worker: int = -1
    refused: str | None = None
    batch_size: str = ""
