"""Who may talk to the server, and how a worker knows that it is the server it talks to.

Authentication happens inside libzmq, before anything reaches Python: a peer that does not speak ZMTP, speaks an old
version of it, or does not know the secret is dropped during the handshake. On one host the mechanism is PLAIN (nothing
leaves the machine), between hosts CURVE, which encrypts as well. PLAIN alone would let whoever takes over the address
of a dead server pose as it. So the token itself is never sent: a worker's password is derived from it, and the server
proves its own knowledge of the token on a nonce of the worker's before the worker sends or believes anything.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85

_DOMAIN = b"async_localsgd"
_ZAP_ADDRESS = "inproc://zeromq.zap.01"
_USERNAME = b"worker"


@dataclass(frozen=True)
class Endpoints:
    """One way to a server, complete with what is needed to be let in; handed to the workers by the launcher.

    Args:
        address: of the server's socket, ``ipc://...`` or ``tcp://host:port``.
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

    @property
    def encrypted(self) -> bool:
        """Whether the traffic is encrypted."""
        return self.server_key is not None


class Secrets:
    """The server's secrets: a token and, for encrypted traffic, one pair of keys for itself and one for all workers.

    Args:
        token: secret of this run.
        encrypt: whether keys are needed.

    """

    def __init__(self, token: str, encrypt: bool) -> None:
        self.token = token
        self.server_keys: tuple[bytes, bytes] | None = zmq.curve_keypair() if encrypt else None
        self.worker_keys: tuple[bytes, bytes] | None = zmq.curve_keypair() if encrypt else None

    def endpoints(self, address: str, incarnation: str, encrypted: bool) -> Endpoints:
        """What a worker needs to dial ``address``."""
        if not encrypted:
            return Endpoints(address, incarnation, self.token)
        assert self.server_keys is not None
        assert self.worker_keys is not None
        public, secret = (key.decode() for key in self.worker_keys)
        return Endpoints(address, incarnation, self.token, self.server_keys[0].decode(), public, secret)

    def guard(self, socket: zmq.Socket[bytes], encrypted: bool) -> None:
        """Makes a socket that is about to be bound ask the gatekeeper about every peer."""
        socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
        if encrypted:
            assert self.server_keys is not None
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.CURVE_SECRETKEY, self.server_keys[1])
        else:
            socket.setsockopt(zmq.PLAIN_SERVER, 1)


class Gatekeeper:
    """Answers libzmq's question (ZAP, RFC 27) whether a peer may come in.

    Not pyzmq's authenticator, since that runs a thread of its own and writes passwords to the debug log.

    Args:
        context: of the guarded sockets; questions come from all sockets of one context.
        secrets_: what peers must know.

    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], secrets_: Secrets) -> None:
        self.socket = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(_ZAP_ADDRESS)
        self._password = password(secrets_.token)
        self._public = None if secrets_.worker_keys is None else z85.decode(secrets_.worker_keys[0])

    def answer(self) -> None:
        """Answers all questions that have been asked."""
        while self.socket.poll(0):
            version, request, _, _, _, mechanism, *credentials = self.socket.recv_multipart()
            welcome = self._knows(mechanism, credentials)
            status = [b"200", b"OK"] if welcome else [b"400", b"wrong credentials"]
            self.socket.send_multipart([version, request, *status, b"", b""])

    def _knows(self, mechanism: bytes, credentials: list[bytes]) -> bool:
        if mechanism == b"PLAIN" and len(credentials) == 2:
            return hmac.compare_digest(credentials[1], self._password)
        if mechanism == b"CURVE" and len(credentials) == 1 and self._public is not None:
            return hmac.compare_digest(credentials[0], self._public)
        return False


def introduce(socket: zmq.Socket[bytes], endpoints: Endpoints) -> None:
    """Gives a socket that is about to dial what the gatekeeper asks for."""
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
    """What a worker shows; the token does not follow from it."""
    return _derived(token, b"worker").encode()


def proof(token: str, nonce: bytes, statement: str) -> str:
    """What only someone who knows the token can say about ``nonce``: that ``statement`` is the server's."""
    return _derived(token, b"server" + nonce + statement.encode())


def is_proof(claimed: str, token: str, nonce: bytes, statement: str) -> bool:
    """Whether ``claimed`` is :func:`proof` of the rest."""
    return hmac.compare_digest(claimed.encode(), proof(token, nonce, statement).encode())


def new_token() -> str:
    """A random token for one run."""
    return secrets.token_hex(32)


def _derived(token: str, purpose: bytes) -> str:
    return hmac.new(token.encode(), purpose, hashlib.sha256).hexdigest()
