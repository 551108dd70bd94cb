"""The console script ``lightning-async-localsgd``: one subcommand a module.

A subcommand's module imports what it needs when it runs. So `--help` is quick, and `run` stays a small process.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from lightning_async_localsgd.commands import doctor, plan, report, watch
from lightning_async_localsgd.commands.errors import FAILED, INTERRUPTED, OK, CommandError
from lightning_async_localsgd.server.journal import package_version

COMMANDS = (watch, report, plan, doctor)

_EPILOG = """exit codes: 0 the command has done what it was asked to do; 1 it could not; 2 the command line is wrong;
3 doctor has found a problem. `run` ends with the exit code of the script."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="lightning-async-localsgd",
        description="Watch, report, plan and check asynchronous trainings.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lightning-async-localsgd {package_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    run = commands.add_parser(
        "run",
        add_help=False,
        help="run a training script, and restart it if its first process is killed "
        "(the same as python -m lightning_async_localsgd)",
    )
    run.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: arguments of the command; None uses those of this process.

    Returns:
        The exit code.

    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["run"]:
        # Its arguments are the supervisor's, and those of the script.
        from lightning_async_localsgd.launch import supervisor

        return supervisor.main(given[1:], prog="lightning-async-localsgd run")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # Of a terminal that is not Unicode.
            stream.reconfigure(errors="replace")
    options = make_parser().parse_args(given)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except CommandError as error:
        print(f"lightning-async-localsgd {options.command}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # The reader of the output, such as `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
