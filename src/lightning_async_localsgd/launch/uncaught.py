"""Errors that only say that something else has failed first. Uncaught, they are printed in one line."""

from __future__ import annotations

import sys
import weakref
from types import TracebackType

from lightning_async_localsgd.protocol.exchange import ExchangeError


class FollowingError(RuntimeError):
    """This process cannot continue because another one has failed. The text names the other one and its failure."""


def follows_another(exception: BaseException, rank: int) -> bool:
    """Return whether a failure in another process has caused the exception, so that its traceback says nothing.

    Args:
        exception: what ends this process.
        rank: this process's global rank. In rank 0, which holds the server, an error of the exchange has its cause.

    """
    return isinstance(exception, FollowingError) or (rank > 0 and isinstance(exception, ExchangeError))


def print_line(exception: BaseException, name: str) -> None:
    """Print in one line that another failure ends this process.

    Args:
        exception: what ends this process.
        name: what this process is, such as ``"rank 3"``.

    """
    print(f"{name} ends: {exception}", file=sys.stderr, flush=True)


def print_in_one_line(exception: BaseException, rank: int, name: str | None = None) -> bool:
    """Print the exception without its traceback if nothing catches it, and if another failure has caused it.

    The traceback would lead to the code that waits for other processes. With many ranks, many of these tracebacks would
    hide that of the first failure.

    Args:
        exception: what ends this process.
        rank: this process's global rank.
        name: what this process is, if it is not one of the ranks.

    Returns:
        Whether another failure has caused the exception.

    """
    if not follows_another(exception, rank):
        return False
    # If the script catches the exception, its frames, which hold the model, must not stay alive.
    previous, reference = sys.excepthook, weakref.ref(exception)

    def hook(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        if value is reference():
            print_line(value, name or f"rank {rank}")
        else:
            previous(kind, value, traceback)

    sys.excepthook = hook
    return True
