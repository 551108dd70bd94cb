"""The words that workers and the server exchange.

Plain values only: no tensor, no socket and no clock is known here, so that the live server, the wire and a simulated
cluster use the very same ones. A message crosses the wire as a JSON object; whoever receives one decodes it with
:meth:`Message.decode`, which refuses anything that is not exactly the message it claims to be.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, TypeVar

_M = TypeVar("_M", bound="Message")

PROTOCOL_VERSION = 6
"""Raised whenever a peer of the version before would misread a message."""

ALREADY_APPLIED = "already applied"
"""Why a push that was sent again is refused; its worker goes on as if the first copy had been answered."""

NOT_FINITE = "holds NaN or infinite values"
"""Why a push of a worker that has diverged is refused."""

MAX_HEADER_BYTES = 64 * 1024
"""No message header is larger; a longer one is refused before it is parsed."""

MAX_TEXT = 16 * 1024
"""No text inside a message is longer, in characters."""


class MessageError(ValueError):
    """What arrived is not the message it claims to be. The text says what is wrong with it."""


@dataclass(frozen=True)
class Message:
    """Base of all messages: frozen dataclasses of ``int``, ``float``, ``bool``, ``str`` and ``str | None``."""

    def encode(self) -> bytes:
        """The message as a JSON object in UTF-8."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def decode(cls: type[_M], data: bytes) -> _M:
        """The message in ``data``.

        Raises:
            MessageError: ``data`` is too long, no JSON object, or its fields are not exactly this message's.

        """
        if len(data) > MAX_HEADER_BYTES:
            raise MessageError(f"{cls.__name__} of {len(data)} bytes; at most {MAX_HEADER_BYTES} are read")
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise MessageError(f"{cls.__name__} is not JSON: {error}") from None
        fields = {field.name: field.type for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or values.keys() != fields.keys():
            raise MessageError(f"{cls.__name__} must have exactly the fields {sorted(fields)}")
        for name, kind in fields.items():
            values[name] = _checked(cls.__name__, name, str(kind), values[name])
        return cls(**values)


def _checked(message: str, name: str, kind: str, value: Any) -> Any:
    """``value`` if it is of the annotated ``kind``, within the bounds that keep later arithmetic safe."""
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
    """Whether ``value`` is a short text that can be written in UTF-8; JSON may hold halves of surrogate pairs."""
    return type(value) is str and len(value) <= MAX_TEXT and not any("\ud800" <= letter <= "\udfff" for letter in value)


@dataclass(frozen=True)
class Hello(Message):
    """A worker's first words.

    Args:
        protocol: the sender's :data:`PROTOCOL_VERSION`.
        worker: the worker's number (its global rank).
        session: random name of this life of the worker; a restarted worker has another one.
        fingerprint: of the ordered (name, shape, dtype) list of everything exchanged.
        rejoining: the session goes on over a new connection, because the old one broke before a push was answered:
            that push follows, and no model is wanted before it.

    """

    protocol: int
    worker: int
    session: str
    fingerprint: str
    rejoining: bool = False


@dataclass(frozen=True)
class Push(Message):
    """Header of a pseudo-gradient (theta_dispatched - theta_local).

    Args:
        worker: the worker's number.
        session: the worker's session, as in its :class:`Hello`.
        sequence: counts this session's pushes from 1; a push that is sent again keeps its number.
        incarnation: of the server that dispatched the base model.
        base_version: version of the dispatched model that the round started from.
        steps: real local optimizer steps in the round; 0 is allowed in a last push and applies nothing.
        samples: samples (rows of batches) taken in the round.
        timed_steps: how many of the steps ``compute_seconds`` covers (first steps, and steps interrupted by
            validation or a checkpoint, are left out of both).
        compute_seconds: seconds of computing for ``timed_steps`` steps.
        exchange_seconds: seconds that this worker's previous exchange took, waiting for the window excluded.
        final: this worker hands in its last round and waits for the final model.
        stop: this worker asks that training end for everybody (``trainer.should_stop``).
        used: how many items of its leases this session has trained on so far, in the order in which they were
            granted, for each stream where that has changed since the last push: a JSON object, or "" for none.
        metrics: what this worker's module logged since its last push, for rank 0's loggers: a JSON object, or "".
        inner: name of the file in which this worker has last saved its inner optimizers' states, which holds the
            content's hash; "" if there is none.
        tokens: taken in the round, see :func:`.batch_tokens`.
        asks: this worker would have training end for everybody, as soon as rank 0 finds a minimum reached.

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
    used: str = ""
    metrics: str = ""
    inner: str = ""
    tokens: int = 0
    asks: bool = False


@dataclass(frozen=True)
class Reply(Message):
    """Header of a dispatch: the global model and what to do with it.

    Args:
        incarnation: random name of this start of the server.
        sequence: of the push that is answered; 0 answers a :class:`Hello`.
        version: of the global model that follows (pushes applied so far).
        staleness: of the push that is answered: versions between its base and its merge; 0 for a hello.
        local_steps: optimizer steps to take in the next round; 0 if and only if ``stop``.
        progress: local steps of all workers together that the server expects to be done by now.
        pace: how many local steps of all workers together go by for one step of this worker (>= 1).
        wait_seconds: seconds between the push's arrival and this dispatch (grace window, quorum, or end of the budget).
        stop: training is over; the model that follows is the final one.
        refused: why the push was not applied, in one line; None if it was.
        shared: what rank 0 has decided for everybody (learning rates that follow a metric): a JSON object, or "".
        asked: how often rank 0 has asked the workers to save their inner optimizers' states, which they do at the end
            of a round.
        renew: begin the round with fresh states of the inner optimizers.

    """

    incarnation: str
    sequence: int
    version: int
    staleness: int
    local_steps: int
    progress: float
    pace: float
    wait_seconds: float
    stop: bool
    refused: str | None
    shared: str = ""
    asked: int = 0
    renew: bool = False


@dataclass(frozen=True)
class LeaseRequest(Message):
    """A worker asks for the next items of an epoch's order.

    Args:
        worker: the worker's number.
        session: the worker's session.
        number: counts this session's requests from 1; a request that is sent again keeps its number and gets the same
            answer.
        stream: name of the data loader, the same on all ranks.
        items: items (batches, usually) of one epoch of all ranks together.
        unit: items are leased in multiples of this, but for the last ones of an epoch.
        epoch: the epoch that the worker is in.
        any_later: a later epoch, the one that is being handed out, will do as well.
        ordered: the order means something (data that is not shuffled): it is handed out from its beginning to its end.

    """

    worker: int
    session: str
    number: int
    stream: str
    items: int
    unit: int
    epoch: int
    any_later: bool
    ordered: bool = False


@dataclass(frozen=True)
class Lease(Message):
    """Answers a :class:`LeaseRequest`: items ``start`` to ``stop`` (exclusive) of the epoch's order are the worker's.

    Args:
        number: of the request.
        epoch: whose order it is; another one than was asked for where items of a dead worker come back.
        start: first item.
        stop: one past the last; equal to ``start`` if the epoch asked for is over.
        refused: why nothing is granted, in one line; None if nothing is wrong.

    """

    number: int
    epoch: int
    start: int
    stop: int
    refused: str | None


@dataclass(frozen=True)
class Knock(Message):
    """Somebody who has not been there from the beginning asks what they need to know before they can join.

    Args:
        protocol: the sender's :data:`PROTOCOL_VERSION`.
        worker: the worker's number if it takes the place of an earlier process; -1 asks for a number of its own.
        nonce: random; the server proves its knowledge of the token on it.

    """

    protocol: int
    worker: int
    nonce: str


@dataclass(frozen=True)
class Facts(Message):
    """Answers a :class:`Knock`.

    Args:
        incarnation: random name of this start of the server.
        proof: that the server knows the token.
        worker: the worker's number.
        workers: workers that the run was started with.
        seed: of the order of the training data.
        fit: how many fits the script has come to, this one included.
        folder: name of the run's folder.
        unshared: hash of what all workers need and what is not exchanged: frozen parameters.
        epoch: that rank 0 is in.
        ahead: global steps that are counted beyond what the run calls done.
        refused: why there is nothing to join, in one line; None if nothing is wrong.

    """

    incarnation: str
    proof: str
    worker: int
    workers: int
    seed: int
    fit: int
    folder: str
    unshared: str
    epoch: int = 0
    ahead: int = 0
    refused: str | None = None
