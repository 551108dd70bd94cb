"""The format of the messages on the wire.

The first byte of every message's first frame is the message's kind:

==============  =====================================  =====================================================
kind            rest of the first frame                further frames
==============  =====================================  =====================================================
HELLO           :class:`.Hello` as JSON                nonce on which the server proves that it knows the token
WELCOME         :class:`Welcome` as JSON               none
REFUSE          the reason, UTF-8                      the server's layout description (zlib, JSON), or empty
PUSH            :class:`.Push` as JSON                 none
SHARE           :class:`.Share` as JSON                none
GO              transfer (the push's sequence)         none
DATA            transfer, offset in bytes              the bytes
REPLY           transfer (the server's own count)      :class:`.Reply` as JSON
MODEL           transfer, offset in bytes              the bytes
CREDIT          transfer, frames received so far       none
PING            :class:`Ping` as JSON                  none
PONG            :class:`Pong` as JSON                  none
LEASE_REQUEST   :class:`.LeaseRequest` as JSON         none
LEASE           :class:`.Lease` as JSON                none
JOIN_REQUEST    :class:`.JoinRequest` as JSON          none
JOIN_INFO       :class:`.JoinInfo` as JSON             none
STATUS_REQUEST  :class:`.StatusRequest` as JSON        none
STATUS          proof (see :mod:`.status`), JSON       none
UNKNOWN         nothing                                none
BYE             the reason, UTF-8, or empty            none
==============  =====================================  =====================================================

The bytes of a DATA after a PUSH, and of a MODEL, are fp32 values, or a packed vector as :class:`.Codec` makes it. The
HELLO says how pushes travel, and each REPLY how its model does.

Uploads (PUSH or SHARE, GO, DATA): a worker sends the data only after the server's GO, so that the server needs memory
only for the uploads it has asked for. During an upload the server sends a CREDIT now and then, to show that the upload
moves.

Downloads (REPLY, MODEL, CREDIT): the server sends at most :data:`WINDOW` frames more than the worker has confirmed with
CREDIT, and so never waits for a slow worker.

PING and LEASE_REQUEST use a connection of their own, so that they never wait for bulk data. JOIN_REQUEST comes from a
process that is no worker yet, and STATUS_REQUEST from one that only watches, also over connections of their own.
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

from lightning_async_localsgd.protocol.layout import Layout
from lightning_async_localsgd.protocol.messages import PROTOCOL_VERSION, Message, MessageError

if TYPE_CHECKING:
    from torch import Tensor

FRAME_BYTES = 1 << 20
"""Size of the frames that bulk data is sent in. The fastest of 256 KiB to 4 MiB, and much faster than one huge frame,
which would need fresh memory each time."""

WINDOW = 16
"""Frames of a download that may be sent without confirmation."""

CONFIRM_EVERY = 4
"""Frames of a download that are confirmed together, at most."""

CONFIRM_SECONDS = 0.5
"""Frames are confirmed one by one if they take longer, so that both sides see that a slow transfer moves."""

MAX_FRAME_BYTES = FRAME_BYTES + 4096
"""If a peer sends a larger frame, libzmq drops the connection before it allocates memory for the frame."""

MAX_DESCRIPTION_BYTES = 64 << 20
"""Size up to which a layout description is unpacked."""

MAX_REASON_BYTES = 500
"""Length up to which the reason for a goodbye is read."""

NONCE_BYTES = 16

# The codes of HELLO, JOIN_REQUEST, REFUSE and UNKNOWN never change, so that versions can tell each other that they
# differ.
HELLO = b"H"
WELCOME = b"W"
REFUSE = b"N"
PUSH = b"P"
SHARE = b"S"
GO = b"G"
DATA = b"D"
REPLY = b"R"
MODEL = b"M"
CREDIT = b"C"
PING = b"B"
PONG = b"A"
LEASE_REQUEST = b"K"
LEASE = b"L"
JOIN_REQUEST = b"O"
JOIN_INFO = b"F"
STATUS_REQUEST = b"Q"
STATUS = b"T"
UNKNOWN = b"U"
BYE = b"X"

_TRANSFER = struct.Struct("<cQ")
_PART = struct.Struct("<cQQ")


@dataclass(frozen=True)
class Welcome(Message):
    """The server's answer to an accepted :class:`.Hello`.

    Args:
        incarnation: random name of this start of the server.
        proof: proves that the server knows the token, see :func:`.auth.proof`.

    """

    incarnation: str
    proof: str


@dataclass(frozen=True)
class Ping(Message):
    """A worker's heartbeat.

    Args:
        worker: the worker's number.
        session: the worker's session.
        nonce: random, new in each ping.

    """

    worker: int
    session: str
    nonce: str


@dataclass(frozen=True)
class Pong(Message):
    """The server's answer to a :class:`Ping`.

    Args:
        incarnation: random name of this start of the server.
        recalled_version: version of the dispatch whose round the worker must push at its next step; -1 for none.
        proof: proves that the server knows the token.

    """

    incarnation: str
    recalled_version: int
    proof: str


def memory_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a flat contiguous fp32 or uint8 tensor in CPU memory, without a copy."""
    return tensor.detach().numpy().data.cast("B")


def keep_freed_memory() -> None:
    """Make the C library reuse the memory of one received frame for the next.

    libzmq allocates memory for every frame. By default glibc returns blocks of that size to the system as soon as they
    are freed, and then page faults on fresh memory cost more than all copies. glibc stops doing so once it has seen a
    larger block being freed. Most training processes have freed one anyway; the block here makes sure of it. It is
    never touched, so it takes no memory.
    """
    block = bytes(31 << 20)
    del block


def milliseconds(seconds: float) -> int:
    """Convert a poll timeout to milliseconds, rounded up. Rounding down would busy-wait in the last millisecond."""
    return math.ceil(seconds * 1000)


def frame_count(size: int) -> int:
    """Return the number of frames that ``size`` bytes are sent in."""
    return -(-size // FRAME_BYTES)


def pack_transfer(kind: bytes, transfer: int) -> bytes:
    """Return the first frame of a GO or REPLY."""
    return _TRANSFER.pack(kind, transfer)


def unpack_transfer(header: bytes) -> int:
    """Return the transfer of a GO or REPLY.

    Raises:
        MessageError: the frame has another size.

    """
    if len(header) != _TRANSFER.size:
        raise MessageError(f"a transfer header has {len(header)} bytes, expected {_TRANSFER.size}")
    return int(_TRANSFER.unpack(header)[1])


def pack_part(kind: bytes, transfer: int, number: int) -> bytes:
    """Return the first frame of a DATA or MODEL (``number``: offset), or of a CREDIT (``number``: frames)."""
    return _PART.pack(kind, transfer, number)


def unpack_part(header: bytes) -> tuple[int, int]:
    """Return the transfer and the offset of a DATA or MODEL, or the transfer and the frames of a CREDIT.

    Raises:
        MessageError: the frame has another size.

    """
    if len(header) != _PART.size:
        raise MessageError(f"a part header has {len(header)} bytes, expected {_PART.size}")
    _, transfer, number = _PART.unpack(header)
    return int(transfer), int(number)


def pack_reason(reason: str) -> bytes:
    """Return the reason of a BYE, cut to the size that is read."""
    return reason.encode(errors="replace")[:MAX_REASON_BYTES]


def unpack_reason(header: bytes) -> str:
    """Return the reason of a BYE as one line of printable text, or an empty text."""
    text = header[1 : 1 + MAX_REASON_BYTES].decode(errors="replace")
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def protocol_mismatch(data: bytes, sender: str) -> str | None:
    """Return why ``sender`` is refused if its first message is of another protocol; None if the protocol is ours.

    A message of another protocol may have other fields, so only the field ``protocol`` is read.
    """
    try:
        values = json.loads(data[:FRAME_BYTES])
    except (ValueError, RecursionError):
        return None
    version = values.get("protocol") if isinstance(values, dict) else None
    if type(version) is not int or version == PROTOCOL_VERSION or abs(version) > 2**53:
        return None
    return (
        f"{sender} speaks protocol {version}, the server {PROTOCOL_VERSION}: install the same version of "
        "lightning-async-localsgd on every machine"
    )


def pack_layout(layout: Layout) -> bytes:
    """Return a layout's description for a REFUSE; empty if the description does not fit into a frame."""
    packed = zlib.compress(json.dumps(layout.describe(), separators=(",", ":")).encode())
    return packed if len(packed) <= FRAME_BYTES else b""


def unpack_layout(data: bytes) -> Layout | None:
    """Return the layout that :func:`pack_layout` has packed; None if ``data`` is empty.

    Raises:
        MessageError: ``data`` is not a layout description.

    """
    if not data:
        return None
    try:
        unpacked = zlib.decompressobj().decompress(data, MAX_DESCRIPTION_BYTES)
        description: Any = json.loads(unpacked)
        return Layout.from_description(description)
    except (zlib.error, ValueError, RecursionError) as error:
        raise MessageError(f"invalid layout description: {error}") from None


class Waker:
    """Wakes a thread that polls sockets, from any other thread."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        """Return the descriptor to poll for reading."""
        return self._reader.fileno()

    def wake(self) -> None:
        """Make the poll return. Does nothing once closed."""
        # If the socket is full, the thread is about to wake up anyway. If it is closed, the thread has ended.
        with contextlib.suppress(OSError):
            self._writer.send(b"\0")

    def clear(self) -> None:
        """Clear the wake-up. To be called by the woken thread before it looks for work."""
        with contextlib.suppress(BlockingIOError):
            while self._reader.recv(4096):
                pass

    def close(self) -> None:
        """Free the sockets."""
        self._reader.close()
        self._writer.close()
