"""The join request of a process that was not there when the run started.

A process that knows the token needs only the server's address to get everything else from the server.
"""

from __future__ import annotations

import dataclasses
import hmac
import secrets
import time

import zmq

from lightning_async_localsgd.protocol.exchange import ExchangeError
from lightning_async_localsgd.protocol.messages import PROTOCOL_VERSION, JoinInfo, JoinRequest, MessageError
from lightning_async_localsgd.wire import frames
from lightning_async_localsgd.wire.auth import Endpoints, proof
from lightning_async_localsgd.wire.connection import Connection, ConnectionLost, dial_with_retries
from lightning_async_localsgd.wire.questions import ask, broken, unproven, unreachable


def request_join_info(
    address: str, token: str, worker: int, *, encrypted: bool, timeout: float
) -> tuple[Endpoints, JoinInfo]:
    """Request from the server at ``address`` what is needed to join its run.

    Args:
        address: address of the server.
        token: the run's secret.
        worker: number of the worker whose earlier process is replaced; -1 for a new worker.
        encrypted: whether the server's traffic at that address is encrypted.
        timeout: seconds for connecting to the server and getting its answer.

    Returns:
        The endpoints for a :class:`.WireExchange`, and the server's answer.

    Raises:
        ExchangeError: the server cannot be reached, does not accept the token, does not know the token itself, speaks
            another protocol, or has no run to join.

    """
    until = time.monotonic() + timeout
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        endpoints = Endpoints.from_token(address, "", token, encrypted)
        connection = dial_with_retries(
            lambda seconds: Connection(context, endpoints, timeout, seconds), timeout, timeout, time.sleep, address
        )
        try:
            info = _request(connection, address, token, worker, until)
        finally:
            connection.close()
    except ConnectionLost as lost:
        raise unreachable(address, encrypted, timeout, lost) from lost
    except MessageError as error:
        raise broken(address, error) from error
    finally:
        context.term()
    if info.refused is not None:
        raise ExchangeError(f"the server at {address} refused: {info.refused}")
    return dataclasses.replace(endpoints, incarnation=info.incarnation), info


def with_proof(info: JoinInfo, token: str, nonce: str) -> JoinInfo:
    """Return ``info`` with the proof that its sender knows the token."""
    unsigned = dataclasses.replace(info, proof="")
    return dataclasses.replace(info, proof=proof(token, nonce.encode(), unsigned.encode().decode()))


def _request(connection: Connection, address: str, token: str, worker: int, until: float) -> JoinInfo:
    nonce = secrets.token_hex(frames.NONCE_BYTES)
    question = frames.JOIN_REQUEST + JoinRequest(PROTOCOL_VERSION, worker, nonce).encode()
    unknown = (
        f"understand protocol {PROTOCOL_VERSION}: install the same version of lightning-async-localsgd on every machine"
    )
    header = ask(connection, address, question, frames.JOIN_INFO, until, unknown)
    if header is None:
        raise ConnectionLost("the server accepted the connection, but does not answer")
    info = JoinInfo.decode(header[1:])
    if not hmac.compare_digest(info.proof.encode(), with_proof(info, token, nonce).proof.encode()):
        raise unproven(address)
    return info
