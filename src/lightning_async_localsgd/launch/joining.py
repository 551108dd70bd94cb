"""Joining a training that is already running.

Two kinds of workers join, and the evaluator (:data:`ROLE_ENV`), which joins like the second kind:

* a worker whose process the launcher has restarted, which *rejoins* under its old number, see :data:`REJOIN_ENV`;
* a *late joiner*: a worker that was not among those the run was started with.

Both run the user's script and find the server's address in their environment. A joining worker asks the server for
access, receives what the initial ranks have agreed on, and skips the ranks' collective operations before training. A
worker that rejoins takes part in the collective operations after training. A late joiner leaves when training ends.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.launch.run_name import RUN_ENV
from lightning_async_localsgd.protocol.messages import EVALUATOR, JoinInfo, worker_name
from lightning_async_localsgd.protocol.options import check_token

if TYPE_CHECKING:
    from lightning_async_localsgd.wire.auth import Endpoints

_log = logging.getLogger(__name__)

JOIN_ENV = "ASYNC_LOCALSGD_JOIN"
"""Environment variable with the server address of a running training, ``tcp://host:port``."""

TOKEN_ENV = "ASYNC_LOCALSGD_TOKEN"
"""Environment variable with the run's token. The strategy's option ``token`` takes precedence."""

REJOIN_ENV = "ASYNC_LOCALSGD_REJOIN"
"""Environment variable that the launcher sets for a restarted worker, see :meth:`.JoinTicket.variables`."""

ROLE_ENV = "ASYNC_LOCALSGD_ROLE"
"""Environment variable with the role of a process that joins: ``worker``, the default, or ``evaluator``."""

_calls = 0
_fits = 0
_grants: dict[str, JoinGrant] = {}


def token_of(option: str | None) -> str | None:
    """Return the user's token, or None if neither the strategy's option nor the environment has one.

    Raises:
        ValueError: the token is too short or has white space around it, see :func:`.check_token`.

    """
    token, source = (option, "exchange.token") if option is not None else (os.environ.get(TOKEN_ENV), TOKEN_ENV)
    if token is None:
        return None
    return check_token(token, source)


def is_evaluator() -> bool:
    """Return whether this process joins as the evaluator.

    Raises:
        ValueError: the role is unknown, or there is no training to join.

    """
    role = os.environ.get(ROLE_ENV) or "worker"
    if role not in ("worker", "evaluator"):
        raise ValueError(f"{ROLE_ENV}={role!r} is unknown; use 'worker' or 'evaluator'")
    if role == "evaluator" and not os.environ.get(JOIN_ENV):
        raise ValueError(
            f"{ROLE_ENV}='evaluator' needs a running training; set {JOIN_ENV} to the address of its server, "
            "tcp://host:port"
        )
    return role == "evaluator"


@dataclass(frozen=True)
class Invitation:
    """A running training to join, as named by the environment.

    Args:
        address: server address.
        token: the run's token.
        encrypted: whether the server uses CURVE encryption at this address.
        worker: number of a restarted worker; -1 for a late joiner, :data:`.EVALUATOR` for the evaluator.
        restart_count: how often this worker has been restarted.

    """

    address: str
    token: str = field(repr=False)
    encrypted: bool
    worker: int = -1
    restart_count: int = 0

    @property
    def late_joiner(self) -> bool:
        """Whether this process is not one of the ranks that the run was started with."""
        return self.worker in (-1, EVALUATOR)


def restart_count() -> int:
    """Return how often the launcher has restarted this worker during the current training."""
    return int(_rejoin_settings().get("restart_count", 0))


def _rejoin_settings() -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(os.environ.get(REJOIN_ENV, "{}"))
    return settings


def invitation(token: str | None, encrypt: bool | None) -> Invitation | None:
    """Return the training that the environment names, or None if this process starts a run of its own.

    Args:
        token: the strategy's option.
        encrypt: the strategy's ``exchange.encrypt``.

    Raises:
        ValueError: the address is invalid, or has no token to go with it.

    """
    evaluates = is_evaluator()
    address = os.environ.get(JOIN_ENV)
    if not address:
        return None
    secret = token_of(token)
    if not re.fullmatch(r"ipc://.+|tcp://.+:[0-9]+", address):
        raise ValueError(f"{JOIN_ENV}={address!r} is not a server address; use tcp://host:port")
    if secret is None:
        raise ValueError(
            f"{JOIN_ENV}={address!r} needs the token of that run; set {TOKEN_ENV} to the token that rank 0 was "
            "started with"
        )
    settings = _rejoin_settings()
    encrypted = bool(settings.get("encrypted", address.startswith("tcp://") and encrypt is not False))
    worker = EVALUATOR if evaluates else int(settings.get("worker", -1))
    return Invitation(address, secret, encrypted, worker, restart_count())


@dataclass(frozen=True)
class JoinGrant:
    """The server's permission to join its training.

    Args:
        endpoints: how to reach the server.
        info: what the initial ranks have agreed on.
        late_joiner: see :attr:`Invitation.late_joiner`.

    """

    endpoints: Endpoints
    info: JoinInfo
    late_joiner: bool

    @property
    def name(self) -> str:
        """What this process is called in the run."""
        return worker_name(self.info.worker)

    @property
    def evaluates(self) -> bool:
        """Whether this process is the run's evaluator."""
        return self.info.worker == EVALUATOR


def enter(invited: Invitation, timeout: float, expected_workers: int | None = None) -> JoinGrant:
    """Ask the server for permission to join, once in the lifetime of this process.

    Args:
        invited: which server.
        timeout: seconds to reach the server.
        expected_workers: option of this process's strategy, which must be that of the run if it is set.

    Raises:
        ExchangeError: the server cannot be reached, or rejects this process.
        ValueError: the run begins with another number of workers. The text names this host.

    """
    if invited.address not in _grants:
        from lightning_async_localsgd.wire.join_info import request_join_info

        endpoints, info = request_join_info(
            invited.address, invited.token, invited.worker, encrypted=invited.encrypted, timeout=timeout
        )
        if expected_workers not in (None, info.workers):
            raise ValueError(
                f"host {socket.gethostname()} has expected_workers={expected_workers}, but the run at "
                f"{invited.address} begins with {info.workers} worker(s); use the same value on every host"
            )
        os.environ.setdefault(RUN_ENV, info.run_name)
        _grants[invited.address] = JoinGrant(endpoints, info, invited.late_joiner)
        _log.warning("joining the run at %s as %s", invited.address, worker_name(info.worker))
    return _grants[invited.address]


def next_call() -> int:
    """Return the number of the Trainer call that this process is about to begin."""
    return _calls + 1


def begin_call(fitting: bool) -> tuple[int, int]:
    """Count a call of the Trainer (``fit``, ``validate``, ...) in this process.

    Returns:
        The number of calls and the number of fits so far, this one included. All ranks run the same script, so their
        numbers agree.

    """
    global _calls, _fits
    _calls += 1
    _fits += fitting
    return _calls, _fits


def takes_part(grant: JoinGrant, fitting: bool) -> bool:
    """Return whether a joining process takes part in the Trainer call that its script has reached.

    Calls before the joined fit are already over, so they are skipped and counted. In calls after the joined fit only
    initial ranks take part.

    Raises:
        SystemExit: the joined fit has ended and this process is a late joiner.

    """
    joined = grant.info.fit_number
    if (fitting and _fits + 1 == joined) or (_fits >= joined and not grant.late_joiner):
        return True
    if _fits >= joined:
        _log.warning("fit %d of the script, which this process joined late, has ended; exiting", joined)
        raise SystemExit(0)
    begin_call(fitting)
    _log.warning("skipping a call of the Trainer, without results: this process joins fit %d of the script", joined)
    return False
