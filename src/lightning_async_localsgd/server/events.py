"""Events of a run's coordinator, and the recording that a run can be replayed from.

The coordinator uses no clock: the same events at the same times lead to the same decisions. The log does not contain
what workers computed. A replay computes that again, see :mod:`.simulation.replay`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning_async_localsgd.protocol.messages import Hello, Lease, LeaseRequest, Push, Reply

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from torch import Tensor

FORMAT = 3
"""Format number of recordings. Raised when those of the previous format cannot be read any more."""

Kind = Literal[
    "begin",
    "join",
    "revive",
    "push",
    "leave",
    "lease",
    "recall",
    "interrupt",
    "continue",
    "replan",
    "stop",
    "dispatch",
    "end",
]

_MESSAGES = {"hello": Hello, "push": Push, "request": LeaseRequest, "lease": Lease}
"""Classes of the messages in :attr:`Event.content`, by key."""


@dataclass(frozen=True)
class Event:
    """Something that happened to the coordinator, or that it decided.

    Args:
        kind: ``begin`` and ``end`` of training, what workers do (``join``, ``revive``, ``push``, ``leave``, ``lease``,
            ``interrupt``, ``continue``), ``recall`` (rank 0 is about to validate), ``replan`` (the data has another
            length than expected), ``stop``, or a ``dispatch`` with its replies.
        seconds: time on the server's clock; None where time does not matter.
        content: messages and plain values by key.

    """

    kind: Kind
    seconds: float | None = None
    content: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def fingerprint(theta: Tensor) -> str:
    """Return a hash of every bit of a flat model on the CPU."""
    return hashlib.sha256(theta.numpy().tobytes()).hexdigest()


def read_events(path: str | PathLike[str]) -> list[Event]:
    """Return the events in a file that :class:`.AsyncLocalSGDCallback` has written.

    Raises:
        ValueError: The file is no recording, has another format, or does not hold exactly one run.

    """
    events = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            fields = json.loads(line)
            # Checked before the message fields, which are different in other formats.
            found = fields["content"].get("format") if fields["kind"] == "begin" else FORMAT
            if found == FORMAT:
                events.append(_event(fields))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no recording: line {number} cannot be read ({error})") from error
        if found != FORMAT:
            raise ValueError(
                f"{path} is a recording of format {found}, and only format {FORMAT} can be read; replay it with the "
                "version of lightning-async-localsgd that wrote it"
            )
    if not events or events[0].kind != "begin":
        raise ValueError(f"{path} is no recording: its first event is not the beginning of a run")
    if sum(event.kind == "begin" for event in events) > 1:
        raise ValueError(
            f"{path} holds more than one run, and only one can be replayed; write each run to its own file"
        )
    return events


def _event(line: dict[str, Any]) -> Event:
    if line["kind"] not in get_args(Kind):
        raise ValueError(f"unknown kind {line['kind']!r}")
    content = dict(line["content"])
    for name, message in _MESSAGES.items():
        if name in content:
            content[name] = message(**content[name])
    if "replies" in content:
        content["replies"] = {int(worker): Reply(**reply) for worker, reply in content["replies"].items()}
    return Event(line["kind"], line["seconds"], content)
