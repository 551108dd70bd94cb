"""Asks the server of a running training for the state of the run. This changes nothing in the run.

The rules are those of joining: the process must know the token, and the server proves that it knows the token, too.
"""

from __future__ import annotations

import hmac
import json
import secrets
import time
from typing import TYPE_CHECKING, Any

import zmq
from typing_extensions import Self

from lightning_async_localsgd.protocol.exchange import ExchangeError
from lightning_async_localsgd.protocol.messages import PROTOCOL_VERSION, MessageError, StatusRequest
from lightning_async_localsgd.wire import frames
from lightning_async_localsgd.wire.auth import Endpoints, proof
from lightning_async_localsgd.wire.connection import Connection, ConnectionLost, dial_with_retries
from lightning_async_localsgd.wire.questions import ask, broken, unproven, unreachable

if TYPE_CHECKING:
    from types import TracebackType

_PROOF_BYTES = 64


def pack_status(text: str, token: str, nonce: str) -> bytes:
    """Return the message with a state and the proof that its sender knows the token."""
    return frames.STATUS + proof(token, nonce.encode(), text).encode() + text.encode()


def unpack_status(header: bytes, token: str, nonce: str) -> dict[str, Any] | None:
    """Return the state in a message of :func:`pack_status`; None if its sender does not know the token.

    Raises:
        MessageError: It is no such message.

    """
    claimed, text = header[1 : 1 + _PROOF_BYTES], header[1 + _PROOF_BYTES :].decode(errors="replace")
    if not hmac.compare_digest(claimed, proof(token, nonce.encode(), text).encode()):
        return None
    try:
        state = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"the state is not JSON: {error}") from None
    if not isinstance(state, dict):
        raise MessageError("the state is no JSON object")
    return state


class ServerEndedError(ExchangeError):
    """The server has closed the connection."""


class StatusClient:
    """A connection to a server over which its state is asked for. Use it as a context manager.

    Args:
        address: address of the server.
        token: the run's secret.
        encrypted: whether the server's traffic at that address is encrypted.
        timeout: seconds for connecting, and for each answer.

    Raises:
        ExchangeError: The server cannot be reached, does not accept the token, or speaks another protocol.

    """

    def __init__(self, address: str, token: str, *, encrypted: bool, timeout: float) -> None:
        self._address, self._token, self._timeout = address, token, timeout
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        endpoints = Endpoints.from_token(address, "", token, encrypted)
        try:
            self._connection = dial_with_retries(
                lambda seconds: Connection(self._context, endpoints, timeout, seconds),
                timeout, timeout, time.sleep, address,
            )  # fmt: skip
        except ConnectionLost as lost:
            self._context.term()
            raise unreachable(address, encrypted, timeout, lost) from lost
        except BaseException:
            self._context.term()
            raise

    def request(self) -> dict[str, Any]:
        """Return the state of the run, see :meth:`.RunState.as_dict`.

        Raises:
            ServerEndedError: The server has ended.
            ExchangeError: The server does not answer, or does not know the token itself.

        """
        try:
            return self._request(time.monotonic() + self._timeout)
        except ConnectionLost as lost:
            raise ServerEndedError(
                f"the server at {self._address} is gone ({lost}): the run is over, or rank 0 has ended"
            ) from lost
        except MessageError as error:
            raise broken(self._address, error) from error

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, until: float) -> dict[str, Any]:
        nonce = secrets.token_hex(frames.NONCE_BYTES)
        question = frames.STATUS_REQUEST + StatusRequest(PROTOCOL_VERSION, nonce).encode()
        unknown = (
            "answer questions about its state: install the same version of lightning-async-localsgd on both machines"
        )
        header = ask(self._connection, self._address, question, frames.STATUS, until, unknown)
        if header is None:
            raise ExchangeError(
                f"the server at {self._address} accepted the connection, but has not answered for {self._timeout:g} s"
            )
        state = unpack_status(header, self._token, nonce)
        if state is None:
            raise unproven(self._address)
        return state
