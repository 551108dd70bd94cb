"""Authentication of workers to the server, and of the server to workers.

Authentication happens inside libzmq, before anything reaches Python: a peer that does not speak ZMTP, speaks an old
version of it, or does not know the token is dropped during the handshake. On one host the mechanism is PLAIN, because
nothing leaves the machine. Between hosts it is CURVE, which also encrypts. With PLAIN alone, a program that takes over
the address of a dead server could pose as the server. So the token itself is never sent: a worker's password is derived
from the token, and the server proves that it knows the token, on a nonce from the worker, before the worker sends or
believes anything.

Everything is derived from the token, CURVE's keys included, so that a process that knows the token needs nothing but
the server's address to join.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import zmq
from zmq.utils import z85

if TYPE_CHECKING:
    from lightning_async_localsgd.protocol.options import ExchangeOptions

_log = logging.getLogger(__name__)

_DOMAIN = b"async_localsgd"
_ZAP_ADDRESS = "inproc://zeromq.zap.01"
_USERNAME = b"worker"


_NO_CURVE = "the libzmq of this Python was built without CURVE; `pip install pyzmq` installs one that has it"


@dataclass(frozen=True)
class Endpoints:
    """The address of a server, with the credentials it asks for. Usually made by :meth:`from_token`.

    Args:
        address: address of the server's socket, ``ipc://...`` or ``tcp://host:port``.
        incarnation: random name of this start of the server.
        token: secret of this run.
        server_key: the server's CURVE public key; None without encryption.
        public_key: the workers' CURVE public key.
        secret_key: the workers' CURVE secret key.

    """

    address: str
    incarnation: str
    token: str = field(repr=False)
    server_key: str | None = field(default=None, repr=False)
    public_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)

    @classmethod
    def from_token(cls, address: str, incarnation: str, token: str, encrypted: bool) -> Endpoints:
        """Return the endpoints of the server at ``address``, with keys derived from the token."""
        if not encrypted:
            return cls(address, incarnation, token)
        (server_key, _), (public_key, secret_key) = _key_pair(token, b"server"), _key_pair(token, b"worker")
        return cls(address, incarnation, token, server_key.decode(), public_key.decode(), secret_key.decode())

    @property
    def encrypted(self) -> bool:
        """Whether the traffic is encrypted."""
        return self.server_key is not None

    @property
    def same_host(self) -> bool:
        """Whether the server is on this machine. If it is, and no process listens there, the server has ended."""
        if not self.address.startswith("tcp://"):
            return True
        host = self.address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"


class Secrets:
    """The server's secrets: a token and, for encrypted traffic, a key pair for itself and one for all workers.

    Args:
        token: secret of this run.
        encrypt: whether keys are needed.

    """

    def __init__(self, token: str, encrypt: bool) -> None:
        self.token = token
        self.server_keys = _key_pair(token, b"server") if encrypt else None
        self.worker_keys = _key_pair(token, b"worker") if encrypt else None

    def require_credentials(self, socket: zmq.Socket[bytes], encrypted: bool) -> None:
        """Make a socket that is not bound yet ask the :class:`Authenticator` about every peer."""
        socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
        if encrypted:
            assert self.server_keys is not None
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.CURVE_SECRETKEY, self.server_keys[1])
        else:
            socket.setsockopt(zmq.PLAIN_SERVER, 1)


class Authenticator:
    """Answers libzmq's requests to authenticate peers (ZAP, RFC 27).

    pyzmq has an authenticator, too, but it runs a thread of its own and writes passwords to the debug log.

    Args:
        context: context of the sockets. Requests come from all sockets of one context.
        secrets_: what peers must know.

    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], secrets_: Secrets) -> None:
        self.socket = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(_ZAP_ADDRESS)
        self._password = password(secrets_.token)
        self._public = None if secrets_.worker_keys is None else z85.decode(secrets_.worker_keys[0])

    def answer(self) -> None:
        """Answer all requests that have arrived."""
        while self.socket.poll(0):
            version, request, _, _, _, mechanism, *credentials = self.socket.recv_multipart()
            accepted = self._accepts(mechanism, credentials)
            status = [b"200", b"OK"] if accepted else [b"400", b"wrong credentials"]
            self.socket.send_multipart([version, request, *status, b"", b""])

    def _accepts(self, mechanism: bytes, credentials: list[bytes]) -> bool:
        if mechanism == b"PLAIN" and len(credentials) == 2:
            return hmac.compare_digest(credentials[1], self._password)
        if mechanism == b"CURVE" and len(credentials) == 1 and self._public is not None:
            return hmac.compare_digest(credentials[0], self._public)
        return False


def set_credentials(socket: zmq.Socket[bytes], endpoints: Endpoints) -> None:
    """Give a socket that is not connected yet the credentials that the server asks for."""
    if endpoints.server_key is not None:
        assert endpoints.public_key is not None
        assert endpoints.secret_key is not None
        socket.setsockopt(zmq.CURVE_SERVERKEY, endpoints.server_key.encode())
        socket.setsockopt(zmq.CURVE_PUBLICKEY, endpoints.public_key.encode())
        socket.setsockopt(zmq.CURVE_SECRETKEY, endpoints.secret_key.encode())
    else:
        socket.setsockopt(zmq.PLAIN_USERNAME, _USERNAME)
        socket.setsockopt(zmq.PLAIN_PASSWORD, password(endpoints.token))


def password(token: str) -> bytes:
    """Return the password that workers send. The token cannot be derived from it."""
    return _derive(token, b"worker").encode()


def proof(token: str, nonce: bytes, statement: str) -> str:
    """Return a proof that a server which knows the token makes ``statement`` in answer to ``nonce``."""
    return _derive(token, b"server" + nonce + statement.encode())


def is_proof(claimed: str, token: str, nonce: bytes, statement: str) -> bool:
    """Return whether ``claimed`` is the :func:`proof` of the other arguments."""
    return hmac.compare_digest(claimed.encode(), proof(token, nonce, statement).encode())


def new_token() -> str:
    """Return a random token for one run."""
    return secrets.token_hex(32)


def require_encryption(options: ExchangeOptions, distant: bool) -> bool:
    """Return whether traffic over ``tcp`` is encrypted.

    Args:
        options: the user's options.
        distant: whether other hosts take part, or may do so later.

    Raises:
        ValueError: traffic between hosts would not be encrypted, and the user has not set ``insecure=True``; or
            encryption is requested, and libzmq was built without CURVE.

    """
    possible = zmq.has("curve")
    if options.encrypt and not possible:
        raise ValueError(f"exchange.encrypt=True is not possible: {_NO_CURVE}")
    encrypted = distant and possible if options.encrypt is None else options.encrypt
    if distant and not encrypted:
        reason = "exchange.encrypt=False" if options.encrypt is False else _NO_CURVE
        if not options.insecure:
            raise ValueError(
                "hosts other than rank 0's may take part, and weights and password would cross the network unencrypted "
                f"({reason}). Leave exchange.encrypt unset, with a libzmq that has CURVE; or, if every host on the "
                "network may read and change the model, set exchange.insecure=True"
            )
        _log.warning(
            "exchange.insecure=True: weights and password cross the network unencrypted (%s). Every host on the network"
            " can read and change the model",
            reason,
        )
    return encrypted


def _derive(token: str, purpose: bytes) -> str:
    return hmac.new(token.encode(), purpose, hashlib.sha256).hexdigest()


def _key_pair(token: str, owner: bytes) -> tuple[bytes, bytes]:
    """Return the public and the secret CURVE key of ``owner``, always the same ones for a token."""
    secret = z85.encode(bytes.fromhex(_derive(token, b"curve key of the " + owner)))
    return zmq.curve_public(secret), secret
