"""Who may talk to the server, and how a worker knows that it is the server it talks to.

Authentication happens inside libzmq, before anything reaches Python: a peer that does not speak ZMTP, speaks an old
version of it, or does not know the secret is dropped during the handshake. On one host the mechanism is PLAIN (nothing
leaves the machine), between hosts CURVE, which encrypts as well. PLAIN alone would let whoever takes over the address
of a dead server pose as it. So the token itself is never sent: a worker's password is derived from it, and the server
proves its own knowledge of the token on a nonce of the worker's before the worker sends or believes anything.

Everything follows from the token, CURVE's keys as well, so that whoever knows it can join with an address alone.
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
    from lightning_async_localsgd.options import ExchangeOptions

_log = logging.getLogger(__name__)

_DOMAIN = b"async_localsgd"
_ZAP_ADDRESS = "inproc://zeromq.zap.01"
_USERNAME = b"worker"


SHORTEST_TOKEN = 16
"""Characters of a token that a user has chosen."""

_WITHOUT_CURVE = "the libzmq of this Python was built without CURVE; `pip install pyzmq` brings one that has it"


@dataclass(frozen=True)
class Endpoints:
    """One way to a server, complete with what is needed to be let in. Usually made by :meth:`of`.

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

    @classmethod
    def of(cls, address: str, incarnation: str, token: str, encrypted: bool) -> Endpoints:
        """The way to the server at ``address`` with that token; keys are derived from the token."""
        if not encrypted:
            return cls(address, incarnation, token)
        (server_key, _), (public_key, secret_key) = _keys(token, b"server"), _keys(token, b"worker")
        return cls(address, incarnation, token, server_key.decode(), public_key.decode(), secret_key.decode())

    @property
    def encrypted(self) -> bool:
        """Whether the traffic is encrypted."""
        return self.server_key is not None

    @property
    def nearby(self) -> bool:
        """Whether there is no network in between: if nobody listens there, the server's process has ended."""
        if not self.address.startswith("tcp://"):
            return True
        host = self.address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"


class Secrets:
    """The server's secrets: a token and, for encrypted traffic, one pair of keys for itself and one for all workers.

    Args:
        token: secret of this run.
        encrypt: whether keys are needed.

    """

    def __init__(self, token: str, encrypt: bool) -> None:
        self.token = token
        self.server_keys = _keys(token, b"server") if encrypt else None
        self.worker_keys = _keys(token, b"worker") if encrypt else None

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


def checked_token(token: str, where: str) -> str:
    """``token`` as it is.

    Args:
        token: chosen by a user.
        where: the option or environment variable that it comes from.

    Raises:
        TypeError: it is no text.
        ValueError: it is too short, or has white space around it, which is said without showing it.

    """
    advice = 'take what `python -c "import secrets; print(secrets.token_hex(32))"` prints'
    if not isinstance(token, str):
        raise TypeError(f"{where} is of type {type(token).__name__} and must be a text: {advice}")
    if len(token) < SHORTEST_TOKEN:
        raise ValueError(
            f"{where} has {len(token)} characters; passwords and keys are made of it, so it needs at least "
            f"{SHORTEST_TOKEN} that nobody can guess: {advice}"
        )
    if token != token.strip() or not token.isprintable():
        raise ValueError(f"{where} has white space around it, or characters that cannot be printed: {advice}")
    return token


def require_encryption(options: ExchangeOptions, distant: bool) -> bool:
    """Whether traffic over ``tcp`` is to be encrypted.

    Args:
        options: the user's.
        distant: whether other hosts take part, or may do so later.

    Raises:
        ValueError: traffic between hosts would not be encrypted, and the user has not said that this is all right.

    """
    possible = zmq.has("curve")
    if options.encrypt and not possible:
        raise ValueError(f"exchange.encrypt=True is impossible: {_WITHOUT_CURVE}")
    encrypted = distant and possible if options.encrypt is None else options.encrypt
    if distant and not encrypted:
        reason = "exchange.encrypt=False" if options.encrypt is False else _WITHOUT_CURVE
        if not options.insecure:
            raise ValueError(
                f"other hosts than rank 0's may take part, and weights and password would cross the network in the "
                f"open ({reason}): leave exchange.encrypt unset, with a libzmq that has CURVE, or say "
                "exchange.insecure=True if everybody on that network may read and change the model"
            )
        _log.warning(
            "exchange.insecure=True: weights and password cross the network unencrypted (%s); whoever is on it can read"
            " and change the model",
            reason,
        )
    return encrypted


def _derived(token: str, purpose: bytes) -> str:
    return hmac.new(token.encode(), purpose, hashlib.sha256).hexdigest()


def _keys(token: str, whose: bytes) -> tuple[bytes, bytes]:
    """A public and a secret CURVE key, the same ones wherever the token is known."""
    secret = z85.encode(bytes.fromhex(_derived(token, b"curve key of the " + whose)))
    return zmq.curve_public(secret), secret
