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
        raise ExchangeError(
            f"the server at {address} could not be reached within {timeout:g} s: {lost}; check that the run is not "
            "over, that its port can be reached from here, that the server uses "
            f"{'encryption' if encrypted else 'no encryption'} at that address, and that the token is the same"
        ) from lost
    except MessageError as error:
        raise ExchangeError(f"the program that listens at {address} broke the protocol: {error}") from error
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
    if not connection.send(frames.JOIN_REQUEST + JoinRequest(PROTOCOL_VERSION, worker, nonce).encode()):
        raise ConnectionLost("the connection accepts no message")
    while (left := until - time.monotonic()) > 0:
        if not connection.wait(left):
            continue
        header = connection.receive()
        connection.skip_rest()
        if header[:1] == frames.REFUSE:
            raise ExchangeError(f"the server at {address} refused: {header[1:].decode(errors='replace')}")
        if header[:1] == frames.UNKNOWN:
            raise ExchangeError(
                f"the server at {address} does not understand protocol {PROTOCOL_VERSION}: install the same version of "
                "lightning-async-localsgd on every machine"
            )
        if header[:1] != frames.JOIN_INFO:
            raise MessageError(f"unexpected message of kind {header[:1]!r}")
        info = JoinInfo.decode(header[1:])
        if not hmac.compare_digest(info.proof.encode(), with_proof(info, token, nonce).proof.encode()):
            raise ExchangeError(
                f"the program that listens at {address} is not the run's server: it does not know the token"
            )
        return info
    raise ConnectionLost("the server accepted the connection, but does not answer")
