"""The first words of somebody who has not been there from the beginning: asks the server what it takes to join.

Whoever knows the token is let in and told; nothing else is needed than the server's address.
"""

from __future__ import annotations

import dataclasses
import hmac
import secrets
import time

import zmq

from lightning_async_localsgd.exchange import ExchangeError
from lightning_async_localsgd.messages import PROTOCOL_VERSION, Facts, Knock, MessageError
from lightning_async_localsgd.wire import frames
from lightning_async_localsgd.wire.auth import Endpoints, proof
from lightning_async_localsgd.wire.link import Link, LinkLost, retry


def knock(address: str, token: str, worker: int, *, encrypted: bool, timeout: float) -> tuple[Endpoints, Facts]:
    """Asks the server at ``address`` what is needed to join its training.

    Args:
        address: of the server.
        token: the run's secret.
        worker: number of the worker whose place is taken; -1 for a new one.
        encrypted: whether the server's traffic at that address is encrypted.
        timeout: seconds for reaching the server and getting its answer.

    Returns:
        The way to the server, complete for a :class:`.WireExchange`, and what it has told.

    Raises:
        ExchangeError: the server cannot be reached, does not let us in, is not the one it claims to be, speaks another
            protocol, or has nothing to join.

    """
    until = time.monotonic() + timeout
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        way = Endpoints.of(address, "", token, encrypted)
        link = retry(lambda seconds: Link(context, way, timeout, seconds), timeout, timeout, time.sleep, address)
        try:
            facts = _ask(link, address, token, worker, until)
        finally:
            link.close()
    except LinkLost as lost:
        raise ExchangeError(
            f"the server at {address} could not be reached within {timeout:g} s: {lost}; see whether the training still"
            f" runs, whether its port can be reached from here, whether it is {'' if encrypted else 'un'}encrypted "
            "there, too, and whether the token is the same"
        ) from lost
    except MessageError as error:
        raise ExchangeError(f"whoever listens at {address} answers nonsense: {error}") from error
    finally:
        context.term()
    if facts.refused is not None:
        raise ExchangeError(f"the server at {address} refuses: {facts.refused}")
    return dataclasses.replace(way, incarnation=facts.incarnation), facts


def signed(facts: Facts, token: str, nonce: str) -> Facts:
    """``facts`` with the proof that whoever tells them knows the token."""
    unsigned = dataclasses.replace(facts, proof="")
    return dataclasses.replace(facts, proof=proof(token, nonce.encode(), unsigned.encode().decode()))


def _ask(link: Link, address: str, token: str, worker: int, until: float) -> Facts:
    nonce = secrets.token_hex(frames.NONCE_BYTES)
    if not link.send(frames.KNOCK + Knock(PROTOCOL_VERSION, worker, nonce).encode()):
        raise LinkLost("the connection takes nothing")
    while (left := until - time.monotonic()) > 0:
        if not link.wait(left):
            continue
        header = link.receive()
        link.skip()
        if header[:1] == frames.REFUSE:
            raise ExchangeError(f"the server at {address} refuses: {header[1:].decode(errors='replace')}")
        if header[:1] == frames.UNKNOWN:
            raise ExchangeError(
                f"the server at {address} does not understand protocol {PROTOCOL_VERSION}: install the same version of "
                "lightning-async-localsgd on every machine"
            )
        if header[:1] != frames.FACTS:
            raise MessageError(f"{header[:1]!r} was not to be expected")
        facts = Facts.decode(header[1:])
        if not hmac.compare_digest(facts.proof.encode(), signed(facts, token, nonce).proof.encode()):
            raise ExchangeError(f"whoever listens at {address} does not know the token; it is not that run's server")
        return facts
    raise LinkLost("it lets us in, but does not answer")
