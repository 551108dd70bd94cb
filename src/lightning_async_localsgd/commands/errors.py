"""Exit codes of the commands, and the error that ends a command."""

from __future__ import annotations

OK = 0
"""The command has done what it was asked to do."""

FAILED = 1
"""The command could not: no such file, no such server, no such extra."""

USAGE = 2
"""The command line is wrong."""

PROBLEMS = 3
"""``doctor`` has found a problem."""


INTERRUPTED = 130
"""Ctrl-C has ended the command, as shells say it."""


class CommandError(Exception):
    """Ends a command with :data:`FAILED` and a text for the user."""


class MissingExtraError(CommandError):
    """A command needs a package of the extra ``tools``."""

    def __init__(self, command: str, package: str) -> None:
        super().__init__(
            f"{command} needs the package {package}, which is not installed; install the extra: "
            "pip install 'lightning-async-localsgd[tools]'"
        )
