"""What crosses the wire, byte by byte.

Every message starts with a frame whose first byte is its kind; what follows it depends on the kind:

=========  =====================================  ==========================================================
kind       rest of the first frame                further frames
=========  =====================================  ==========================================================
HELLO      :class:`Hello` as JSON                 a nonce that the server proves its knowledge of the token on
WELCOME    :class:`Welcome` as JSON               none
REFUSE     the reason, UTF-8                      the server's layout description (zlib, JSON), or empty
PUSH       :class:`Push` as JSON                  none
GO         transfer (the push's sequence)         none
DATA       transfer, offset in bytes              the bytes
REPLY      transfer (the server's own count)      :class:`Reply` as JSON
MODEL      transfer, offset in bytes              the bytes
CREDIT     transfer, frames received so far       none
BEAT       :class:`Beat` as JSON                  none
ANSWER     :class:`Answer` as JSON                none
ASK        :class:`LeaseRequest` as JSON          none
LEASE      :class:`Lease` as JSON                 none
KNOCK      :class:`Knock` as JSON                 none
FACTS      :class:`Facts` as JSON                 none
UNKNOWN    nothing                                none
BYE        nothing                                none
=========  =====================================  ==========================================================

An upload waits for GO, so that the server needs memory only for those it has asked for. A download runs on credit: the
server sends at most :data:`WINDOW` frames more than the worker has confirmed, and so never waits for a slow one. During
an upload the server sends CREDIT now and then, which says only that it moves. BEAT and ASK come over a connection of
their own, so that neither waits for bulk data; so does KNOCK, from somebody who is no worker yet.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.layout import Layout
from lightning_async_localsgd.messages import PROTOCOL_VERSION, Message, MessageError

if TYPE_CHECKING:
    from torch import Tensor

FRAME_BYTES = 1 << 20
"""Bulk data travels in frames of this size: the best of 256 KiB to 4 MiB, and far better than one huge frame, for
which fresh memory is needed each time."""

WINDOW = 16
"""Frames of a download that may be on their way unconfirmed."""

CONFIRM_EVERY = 4
"""Frames of a download that are confirmed together, at most."""

CONFIRM_SECONDS = 0.5
"""What a thin link takes longer for is confirmed frame by frame, so that both sides see that it moves."""

MAX_FRAME_BYTES = FRAME_BYTES + 4096
"""Larger frames make libzmq drop the connection before it reserves memory for them."""

MAX_DESCRIPTION_BYTES = 64 << 20
"""A layout description is not unpacked beyond this size."""

NONCE_BYTES = 16

HELLO, WELCOME, REFUSE, PUSH, GO, DATA, REPLY, MODEL, CREDIT, BEAT, ANSWER, ASK, LEASE, KNOCK, FACTS, UNKNOWN, BYE = (
    bytes([code]) for code in b"HWNPGDRMCBAKLOFUX"
)

_TRANSFER = struct.Struct("<cQ")
_PART = struct.Struct("<cQQ")


@dataclass(frozen=True)
class Welcome(Message):
    """The server's answer to a hello that it passes on.

    Args:
        incarnation: random name of this start of the server.
        proof: that the server knows the token, see :func:`.auth.proof`.

    """

    incarnation: str
    proof: str


@dataclass(frozen=True)
class Beat(Message):
    """A worker is alive.

    Args:
        worker: the worker's number.
        session: the worker's session.
        nonce: random, new in each beat.

    """

    worker: int
    session: str
    nonce: str


@dataclass(frozen=True)
class Answer(Message):
    """The server is alive.

    Args:
        incarnation: random name of this start of the server.
        wanted: version of the dispatch whose round the worker is to hand in at the next step; -1 for none.
        proof: that the server knows the token.

    """

    incarnation: str
    wanted: int
    proof: str


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a flat contiguous fp32 tensor in CPU memory, without a copy."""
    return tensor.detach().numpy().data.cast("B")


def keep_freed_memory() -> None:
    """Makes the C library keep the memory of one received frame for the next.

    libzmq allocates every frame anew. glibc starts by returning blocks of that size to the system as soon as they are
    freed, and page faults on fresh memory then cost more than all copies. Once it has seen a larger block being freed
    it no longer does so; most training processes have freed one by themselves, but nothing says that ours has. The
    block here is never touched, so it takes no memory.
    """
    block = bytes(31 << 20)
    del block


def milliseconds(seconds: float) -> int:
    """For a poll, rounded up: rounded down, the last millisecond of a wait would be spent spinning."""
    return math.ceil(seconds * 1000)


def frame_count(size: int) -> int:
    """Frames that ``size`` bytes travel in."""
    return -(-size // FRAME_BYTES)


def pack_transfer(kind: bytes, transfer: int) -> bytes:
    """First frame of GO and REPLY."""
    return _TRANSFER.pack(kind, transfer)


def unpack_transfer(header: bytes) -> int:
    """The transfer that a GO or REPLY is about.

    Raises:
        MessageError: the frame has another size.

    """
    if len(header) != _TRANSFER.size:
        raise MessageError(f"a transfer's header of {len(header)} bytes, expected {_TRANSFER.size}")
    return int(_TRANSFER.unpack(header)[1])


def pack_part(kind: bytes, transfer: int, number: int) -> bytes:
    """First frame of DATA, MODEL (``number``: offset) and CREDIT (``number``: frames)."""
    return _PART.pack(kind, transfer, number)


def unpack_part(header: bytes) -> tuple[int, int]:
    """Transfer and offset, or transfer and frames.

    Raises:
        MessageError: the frame has another size.

    """
    if len(header) != _PART.size:
        raise MessageError(f"a part's header of {len(header)} bytes, expected {_PART.size}")
    _, transfer, number = _PART.unpack(header)
    return int(transfer), int(number)


def other_protocol(data: bytes, who: str) -> str | None:
    """Why ``who`` is refused if its first message, which may have other fields than ours, is of another protocol."""
    try:
        values = json.loads(data[:FRAME_BYTES])
    except (ValueError, RecursionError):
        return None
    version = values.get("protocol") if isinstance(values, dict) else None
    if type(version) is not int or version == PROTOCOL_VERSION or abs(version) > 2**53:
        return None
    return (
        f"{who} speaks protocol {version}, the server {PROTOCOL_VERSION}: install the same version of "
        "lightning-async-localsgd on every machine"
    )


def pack_layout(layout: Layout) -> bytes:
    """A layout's description for a REFUSE; empty where it would not fit a frame."""
    packed = zlib.compress(json.dumps(layout.describe(), separators=(",", ":")).encode())
    return packed if len(packed) <= FRAME_BYTES else b""


def unpack_layout(data: bytes) -> Layout | None:
    """What :func:`pack_layout` has packed; None if it is empty.

    Raises:
        MessageError: it is no layout description.

    """
    if not data:
        return None
    try:
        unpacked = zlib.decompressobj().decompress(data, MAX_DESCRIPTION_BYTES)
        description: Any = json.loads(unpacked)
        return Layout.from_description(description)
    except (zlib.error, ValueError, RecursionError) as error:
        raise MessageError(f"no layout description: {error}") from None


class Waker:
    """Wakes a thread that polls sockets, from any other thread."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        """What to poll for reading."""
        return self._reader.fileno()

    def wake(self) -> None:
        """Makes the poll return; does nothing once closed."""
        # Full: the thread is going to wake up anyway. Closed: there is no thread any more.
        with contextlib.suppress(OSError):
            self._writer.send(b"\0")

    def clear(self) -> None:
        """To be called by the woken thread before it looks for work."""
        with contextlib.suppress(BlockingIOError):
            while self._reader.recv(4096):
                pass

    def close(self) -> None:
        """Frees the sockets."""
        self._reader.close()
        self._writer.close()
