"""``watch``: the state of a running or finished run in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.commands import text
from lightning_async_localsgd.commands.errors import OK, MissingExtraError
from lightning_async_localsgd.commands.sources import (
    Source,
    SourceEndedError,
    add_server_options,
    open_source,
    positive,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Group

_STYLES = {
    "computing": "green", "exchanging": "cyan", "waiting": "yellow", "validating": "blue", "away": "red",
    "quarantined": "bold red", "finished": "dim",
}  # fmt: skip


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "watch",
        help="show the state of a running or finished run",
        description="Show the state of a run: of its event file, or of its server, which is asked and not changed. "
        "A server needs the token of the run in the environment variable ASYNC_LOCALSGD_TOKEN.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "target", metavar="DIR|tcp://HOST:PORT", help="folder of the run, its event file, or the address of its server"
    )
    parser.add_argument("--once", action="store_true", help="show the present state and end")
    parser.add_argument("--json", action="store_true", help="print the present state as JSON and end")
    parser.add_argument(
        "--interval", type=positive, default=1.0, metavar="SECONDS", help="between two looks (default: 1)"
    )
    add_server_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the subcommand and return its exit code."""
    live = not (options.once or options.json) and sys.stdout.isatty()
    if live and find_spec("rich") is None:
        raise MissingExtraError("watch, unless --once or --json is given,", "rich")
    with contextlib.closing(open_source(options.target, not options.no_encryption, options.timeout)) as source:
        if options.json:
            print(json.dumps(source.state(), indent=2))
        elif live:
            with contextlib.suppress(KeyboardInterrupt):  # It is how a user ends it.
                _follow(source, options.interval)
        else:
            print(as_text(source.state()))
    return OK


def as_text(state: Mapping[str, Any]) -> str:
    """Return the state of a run as plain text."""
    lines = [*text.headlines(state), "", text.table(text.WORKER_COLUMNS, text.worker_rows(state))]
    faults = text.fault_lines(state)
    return "\n".join([*lines, *(["", *faults] if faults else [])])


def as_renderable(state: Mapping[str, Any]) -> Group:
    """Return the state of a run for a terminal, made with rich."""
    from rich.console import Group
    from rich.markup import escape
    from rich.padding import Padding
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table(expand=True)
    for column in text.WORKER_COLUMNS:
        table.add_column(column, justify="left" if column == "state" else "right")
    for worker, row in zip(state["workers"], text.worker_rows(state), strict=True):
        style = _STYLES.get(worker["state"], "")
        cells = [escape(cell) for cell in row]
        cells[1] = f"[{style}]{cells[1]}[/]" if style else cells[1]
        table.add_row(*cells)
    total = state["total"]
    parts: list[Any] = [escape(line) for line in text.headlines(state)]
    if total:
        # The bar itself does not end its line.
        parts.insert(1, Padding(ProgressBar(total=total, completed=min(state["progress"], total)), 0))
    parts.append(table)
    faults = text.fault_lines(state)
    if faults:
        parts.append(Panel("\n".join(map(escape, faults)), title="faults", border_style="red"))
    return Group(*parts)


def _follow(source: Source, interval: float) -> None:
    """Show the state until the run ends, or until the user does."""
    from rich.live import Live

    state = source.state()
    with Live(as_renderable(state), auto_refresh=False) as live:
        while not state["ended"]:
            time.sleep(interval)
            try:
                state = source.state()
            except SourceEndedError as error:
                # A server ends with its run, and takes its answers with it.
                live.console.print(f"{error}; this is the last state that it told", markup=False, highlight=False)
                break
            live.update(as_renderable(state), refresh=True)
