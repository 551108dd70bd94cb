"""Where the commands get the state of a run from: its event file, or its server."""

from __future__ import annotations

import argparse
import os
import re
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_async_localsgd.commands.errors import CommandError
from lightning_async_localsgd.launch.joining import TOKEN_ENV, token_of
from lightning_async_localsgd.server.event_file import EventReader, NoEventFileError, find_event_file
from lightning_async_localsgd.server.run_state import RunState

if TYPE_CHECKING:
    from pathlib import Path


class SourceEndedError(CommandError):
    """The server has ended, so there will be no other state."""


class Source(ABC):
    """Gives the state of a run, again and again."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return the present state, see :meth:`.RunState.as_dict`.

        Raises:
            CommandError: There is none, or no more.

        """

    @abstractmethod
    def close(self) -> None:
        """Free what the source holds."""


class FileSource(Source):
    """The event file of a run on this machine.

    Args:
        target: the file, or a folder that contains it.

    Raises:
        CommandError: There is no such file.

    """

    def __init__(self, target: str) -> None:
        try:
            self._path: Path = find_event_file(target)
        except NoEventFileError as error:
            raise CommandError(str(error)) from error
        self._reader = EventReader(self._path)
        self._state = RunState()
        self._zero = 0.0

    @override
    def state(self) -> dict[str, Any]:
        try:
            self._reader.feed(self._take_in)
            silent = max(0.0, time.time() - self._path.stat().st_mtime)
        except (NoEventFileError, OSError) as error:
            raise CommandError(str(error)) from error
        run = self._state.run
        if run is None:
            raise CommandError(f"{self._path} holds no run")
        now = None
        if not self._state.ended and not run.get("virtual"):
            # The file is only followed on the machine that writes it, or on one whose clock agrees.
            now = self._zero + time.time()
        return {**self._state.as_dict(now), "silent_seconds": silent}

    @override
    def close(self) -> None:
        self._reader.close()

    def _take_in(self, line: dict[str, Any]) -> None:
        if line["kind"] == "run":
            self._zero = float(line["seconds"]) - float(line["time"])
        self._state.add(line)


class ServerSource(Source):
    """The server of a running training.

    Args:
        address: address of the server, ``tcp://HOST:PORT``.
        token: the run's secret.
        encrypted: whether the server encrypts at that address.
        timeout: seconds for connecting and for an answer.

    Raises:
        CommandError: The server cannot be reached, or does not accept the token.

    """

    def __init__(self, address: str, token: str, encrypted: bool, timeout: float) -> None:
        from lightning_async_localsgd.protocol.exchange import ExchangeError
        from lightning_async_localsgd.wire.status import ServerEndedError, StatusClient

        self._error, self._ended = ExchangeError, ServerEndedError
        try:
            self._client = StatusClient(address, token, encrypted=encrypted, timeout=timeout)
        except ExchangeError as error:
            raise CommandError(str(error)) from error

    @override
    def state(self) -> dict[str, Any]:
        try:
            return self._client.request()
        except self._ended as error:
            raise SourceEndedError(str(error)) from error
        except self._error as error:
            raise CommandError(str(error)) from error

    @override
    def close(self) -> None:
        self._client.close()


def server_address(target: str) -> str | None:
    """Return the server's address in ``tcp://HOST:PORT`` or ``HOST:PORT``; None if the target is neither."""
    match = re.fullmatch(r"(?:tcp://)?\S+:(\d{1,5})", target)
    if match is not None and 0 < int(match[1]) < 65536:
        return target if target.startswith("tcp://") else f"tcp://{target}"
    return target if target.startswith("ipc://") else None


def server_token() -> str:
    """Return the token of the run that the environment names.

    Raises:
        CommandError: There is none, or it is no valid token.

    """
    try:
        token = token_of(None)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if token is None:
        raise CommandError(
            f"a server only answers who knows its token; set the environment variable {TOKEN_ENV} to the token that "
            "rank 0 was started with. A run that was started without a token cannot be asked; use its event file"
        )
    return token


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that ask a server."""
    parser.add_argument(
        "--no-encryption", action="store_true", help="the server does not encrypt (exchange.encrypt=False)"
    )
    parser.add_argument(
        "--timeout",
        type=positive,
        default=10.0,
        metavar="SECONDS",
        help="for connecting to the server and for its answer (default: 10)",
    )


def open_source(target: str, encrypted: bool, timeout: float) -> Source:
    """Return the source that a user means: a server's address, or a file or folder.

    Raises:
        CommandError: The source cannot be used.

    """
    address = None if os.path.exists(target) else server_address(target)
    if address is None:
        return FileSource(target)
    return ServerSource(address, server_token(), encrypted and not address.startswith("ipc://"), timeout)


def positive(text: str) -> float:
    """Return the number in a command line argument, which must be above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a finite number > 0")
    return value
