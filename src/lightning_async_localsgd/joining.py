"""Taking part in a training that runs already: a worker that was started again, or a machine that was not there before.

Both are the user's own script, told by its environment where the server is. It knocks there, learns what the ranks of
the beginning agreed on among themselves, and has no part in what they do together before training. A rank that was
started again (:data:`REJOIN`) meets the others in what they do together afterwards; a stranger leaves when training
ends.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.messages import Facts

if TYPE_CHECKING:
    from lightning_async_localsgd.wire.auth import Endpoints

_log = logging.getLogger(__name__)

JOIN = "ASYNC_LOCALSGD_JOIN"
"""Address of the server of a running training, ``tcp://host:port``."""

TOKEN = "ASYNC_LOCALSGD_TOKEN"
"""Secret of a run, unless the strategy's ``token`` says it."""

REJOIN = "ASYNC_LOCALSGD_REJOIN"
"""Set by the launcher for a worker that it starts again, see :meth:`.JoinTicket.variables`."""

RUN = "ASYNC_LOCALSGD_RUN"
"""Name of the run's folder, for whoever goes on with the same run."""

_runs = 0
_fits = 0
_entries: dict[str, Entry] = {}


def token_of(option: str | None) -> str | None:
    """The user's token: the strategy's option, or what the environment says; None if there is none.

    Raises:
        ValueError: it is no good, see :func:`.checked_token`.

    """
    token, where = (option, "token") if option is not None else (os.environ.get(TOKEN), TOKEN)
    if token is None:
        return None
    from lightning_async_localsgd.wire.auth import checked_token

    return checked_token(token, where)


@dataclass(frozen=True)
class Invitation:
    """What the environment says about a running training.

    Args:
        address: of its server.
        token: its secret.
        encrypted: whether its server speaks CURVE at that address.
        worker: the number of a worker that was started again; -1 for a stranger.
        life: how often it has been started again.

    """

    address: str
    token: str = field(repr=False)
    encrypted: bool
    worker: int = -1
    life: int = 0

    @property
    def stranger(self) -> bool:
        """Whether this process has no place among the ranks that the run was started with."""
        return self.worker < 0


def rejoining() -> dict[str, Any]:
    """What the launcher tells a worker that it has started again; empty in any other process."""
    told: dict[str, Any] = json.loads(os.environ.get(REJOIN, "{}"))
    return told


def invitation(token: str | None, encrypt: bool | None) -> Invitation | None:
    """What the environment says; None if this process is to start a run of its own.

    Args:
        token: the strategy's option.
        encrypt: the strategy's ``exchange.encrypt``.

    Raises:
        ValueError: it says something that makes no sense.

    """
    address = os.environ.get(JOIN)
    if not address:
        return None
    secret = token_of(token)
    if not re.fullmatch(r"ipc://.+|tcp://.+:[0-9]+", address):
        raise ValueError(f"{JOIN}={address!r} is no address of a server; it looks like tcp://host:port")
    if secret is None:
        raise ValueError(
            f"{JOIN}={address!r} needs the secret of that run: set {TOKEN} to what rank 0 was started with"
        )
    told = rejoining()
    encrypted = bool(told.get("encrypted", address.startswith("tcp://") and encrypt is not False))
    return Invitation(address, secret, encrypted, int(told.get("worker", -1)), int(told.get("life", 0)))


@dataclass(frozen=True)
class Entry:
    """The way into a running training.

    Args:
        endpoints: its server.
        facts: what the ranks of the beginning have agreed on.
        stranger: see :attr:`Invitation.stranger`.

    """

    endpoints: Endpoints
    facts: Facts
    stranger: bool


def enter(invited: Invitation, timeout: float) -> Entry:
    """Knocks at the server, once in the life of this process.

    Raises:
        ExchangeError: it cannot be reached, or refuses.

    """
    if invited.address not in _entries:
        from lightning_async_localsgd.wire.knock import knock

        endpoints, facts = knock(
            invited.address, invited.token, invited.worker, encrypted=invited.encrypted, timeout=timeout
        )
        os.environ.setdefault(RUN, facts.folder)
        _entries[invited.address] = Entry(endpoints, facts, invited.stranger)
        _log.warning("joining the run at %s as worker %d", invited.address, facts.worker)
    return _entries[invited.address]


def begin_run(fitting: bool) -> tuple[int, int]:
    """A run (fit, validate, ...) of this process begins.

    Returns:
        Runs, and how many of them are fits, with this one. All ranks run the same script, so their counts agree.

    """
    global _runs, _fits
    _runs += 1
    _fits += fitting
    return _runs, _fits


def takes_part(entry: Entry, fitting: bool) -> bool:
    """Whether a process that joins has a part in the run that its script has come to; if not, that one is counted.

    What comes before the fit that it joins is over. What comes after it needs a place among the ranks.

    Raises:
        SystemExit: nothing more of the script is for this process.

    """
    joined = entry.facts.fit
    if (fitting and _fits + 1 == joined) or (_fits >= joined and not entry.stranger):
        return True
    if _fits >= joined:
        _log.warning("fit %d of the script, which this process has joined, is over; the rest goes without it", joined)
        raise SystemExit(0)
    begin_run(fitting)
    _log.warning("this process joins fit %d of the script; what comes before is passed over, without results", joined)
    return False
