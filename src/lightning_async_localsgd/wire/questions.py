"""What a process without a session asks a server: the question, and what can be wrong with the answer."""

from __future__ import annotations

import time

from lightning_async_localsgd.protocol.exchange import ExchangeError
from lightning_async_localsgd.protocol.messages import MessageError
from lightning_async_localsgd.wire import frames
from lightning_async_localsgd.wire.connection import Connection, ConnectionLost


def ask(
    connection: Connection, address: str, question: bytes, answer_kind: bytes, until: float, unknown: str
) -> bytes | None:
    """Ask a server, and return its answer.

    Args:
        connection: the connection to the server.
        address: address of the server, for errors.
        question: the message to send.
        answer_kind: first byte of the answer.
        until: when to give up, in seconds of the monotonic clock.
        unknown: what a server that does not know the question cannot do, and the way out.

    Returns:
        The answer with its first byte; None if there is none in time.

    Raises:
        ConnectionLost: The connection has ended.
        ExchangeError: The server refuses, or does not know the question.
        MessageError: The answer is of another kind.

    """
    if not connection.send(question):
        raise ConnectionLost("the connection accepts no message")
    while (left := until - time.monotonic()) > 0:
        if not connection.wait(left):
            continue
        header = connection.receive()
        connection.skip_rest()
        if header[:1] == frames.REFUSE:
            raise ExchangeError(f"the server at {address} refused: {header[1:].decode(errors='replace')}")
        if header[:1] == frames.UNKNOWN:
            raise ExchangeError(f"the server at {address} does not {unknown}")
        if header[:1] != answer_kind:
            raise MessageError(f"unexpected message of kind {header[:1]!r}")
        return header
    return None


def unreachable(address: str, encrypted: bool, timeout: float, lost: ConnectionLost) -> ExchangeError:
    """Return the error that a server cannot be reached."""
    encryption = "encryption" if encrypted else "no encryption"
    return ExchangeError(
        f"the server at {address} could not be reached within {timeout:g} s: {lost}; check that the run is not over, "
        f"that its port can be reached from here, that the server uses {encryption} at that address, and that the "
        "token is the same"
    )


def unproven(address: str) -> ExchangeError:
    """Return the error that an answer has no proof that its sender knows the token."""
    return ExchangeError(f"the program that listens at {address} is not the run's server: it does not know the token")


def broken(address: str, error: MessageError) -> ExchangeError:
    """Return the error that an answer is no answer."""
    return ExchangeError(f"the program that listens at {address} broke the protocol: {error}")
