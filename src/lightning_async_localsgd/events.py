"""Everything that happens to a run's coordinator, in order, so that it can be played again.

The coordinator knows no clock: with the same events at the same times it decides the same. What workers have computed
is not in the log; whoever plays it again computes it anew, see :mod:`.simulation.replay`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning_async_localsgd.messages import Hello, Lease, LeaseRequest, Push, Reply

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from torch import Tensor

FORMAT = 1
"""Of the file; raised when an earlier version's could not be read any more."""

Kind = Literal[
    "begin", "join", "revive", "push", "leave", "lease", "pause", "resume", "replan", "stop", "dispatch", "end"
]

_MESSAGES = {"hello": Hello, "push": Push, "request": LeaseRequest, "lease": Lease}
"""The class of each message that an event may have, by the name under which it has it."""


@dataclass(frozen=True)
class Event:
    """Something that has happened, or was decided.

    Args:
        kind: what: ``begin`` and ``end`` of training, what workers do (``join``, ``revive``, ``push``, ``leave``,
            ``lease``, ``pause``, ``resume``), ``replan`` (its data is of another length than expected), ``stop``, or a
            ``dispatch`` with its replies.
        seconds: when, by the server's clock; None where time does not matter.
        content: messages and plain values by name.

    """

    kind: Kind
    seconds: float | None = None
    content: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def fingerprint(theta: Tensor) -> str:
    """A hash of every bit of a flat model in the host's memory."""
    return hashlib.sha256(theta.numpy().tobytes()).hexdigest()


def read_events(path: str | PathLike[str]) -> list[Event]:
    """The events in a file that :class:`.AsyncLocalSGDCallback` has written.

    Raises:
        ValueError: it is no such file, of another version, or holds more or less than one run.

    """
    events = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            events.append(_event(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no event log: line {number} cannot be read ({error})") from error
    if not events or events[0].kind != "begin":
        raise ValueError(f"{path} is no event log: it does not begin with the beginning of a run")
    if events[0].content.get("format") != FORMAT:
        raise ValueError(
            f"{path} is an event log of format {events[0].content.get('format')}, and format {FORMAT} can be read; "
            "replay it with the version of lightning-async-localsgd that has written it"
        )
    if sum(event.kind == "begin" for event in events) > 1:
        raise ValueError(f"{path} holds more than one run, and one is replayed; give each run a file of its own")
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
