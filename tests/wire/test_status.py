"""Watching a run over the wire: the rules are those of joining, and nothing changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lightning_async_localsgd.protocol.exchange import ExchangeError
from lightning_async_localsgd.protocol.messages import PROTOCOL_VERSION, MessageError, StatusRequest
from lightning_async_localsgd.wire import Endpoints, WireServer, frames
from lightning_async_localsgd.wire.status import ServerEndedError, StatusClient, pack_status, unpack_status
from tests.wire.fakes import FakeServer, WireHarness, wait_for

OpenWire = Callable[..., tuple[FakeServer, WireServer, Endpoints]]

TOKEN = "a token that only the run knows"


def client(endpoints: Endpoints, token: str = TOKEN, timeout: float = 30.0) -> StatusClient:
    return StatusClient(endpoints.address, token, encrypted=endpoints.encrypted, timeout=timeout)


def test_state_is_asked_for_again_and_again_and_nothing_joins(open_wire: OpenWire) -> None:
    fake, server, endpoints = open_wire(token=TOKEN)
    with client(endpoints) as watching:
        assert watching.request() == {"progress": 3}
        fake.status = '{"progress": 4}'
        assert watching.request() == {"progress": 4}
    assert fake.status_requests == 2
    assert (fake.joined, fake.join_requests, fake.pushed) == ([], [], [])
    assert server.rejected_messages == server.rejected_connections == 0


def test_state_of_a_large_run_fits(open_wire: OpenWire) -> None:
    fake, _, endpoints = open_wire(token=TOKEN)
    fake.status = '{"text": "' + "x" * 600_000 + '"}'
    with client(endpoints) as watching:
        assert len(watching.request()["text"]) == 600_000


def test_watching_needs_the_token(open_wire: OpenWire) -> None:
    fake, _, endpoints = open_wire(token=TOKEN)
    with pytest.raises(ExchangeError, match=r"does not accept this worker's token|could not be reached"):
        client(endpoints, "a token of another run", timeout=1.0)
    assert fake.status_requests == 0


def test_answer_of_a_program_without_the_token_is_refused() -> None:
    message = pack_status('{"progress": 3}', TOKEN, "nonce")
    assert unpack_status(message, TOKEN, "nonce") == {"progress": 3}
    assert unpack_status(message, TOKEN, "another nonce") is None
    assert unpack_status(message.replace(b"3", b"4"), TOKEN, "nonce") is None
    for text in ("no JSON", "[1]"):
        with pytest.raises(MessageError):
            unpack_status(pack_status(text, TOKEN, "nonce"), TOKEN, "nonce")


def test_status_request_of_another_protocol_version_is_refused(open_wire: OpenWire, wire: WireHarness) -> None:
    fake, _, endpoints = open_wire(token=TOKEN)
    peer = wire.raw(endpoints)
    peer.send(frames.STATUS_REQUEST + b'{"protocol": 99}')
    assert f"protocol 99, the server {PROTOCOL_VERSION}".encode() in peer.receive(frames.REFUSE)[0]
    assert fake.status_requests == 0


@pytest.mark.parametrize(
    "message", [b"", b"{}", b"[" * 50_000, StatusRequest(PROTOCOL_VERSION, "0" * 65).encode()],
    ids=["empty", "no fields", "deep", "nonce"],
)  # fmt: skip
def test_invalid_status_request_is_counted(open_wire: OpenWire, wire: WireHarness, message: bytes) -> None:
    fake, server, endpoints = open_wire(token=TOKEN)
    wire.raw(endpoints).send(frames.STATUS_REQUEST + message)
    wait_for(lambda: server.rejected_messages == 1)
    assert fake.status_requests == 0


def test_end_of_the_server_is_told(open_wire: OpenWire) -> None:
    _, server, endpoints = open_wire(token=TOKEN)
    watching = client(endpoints, timeout=5.0)
    server.close()
    with pytest.raises(ServerEndedError, match="is gone"):
        watching.request()
    watching.close()
