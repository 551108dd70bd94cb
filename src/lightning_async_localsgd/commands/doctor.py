"""``doctor``: what is wrong with this machine, or with the way to a server, and what to do about it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from lightning_async_localsgd.commands.errors import OK, PROBLEMS, CommandError
from lightning_async_localsgd.commands.sources import add_server_options, server_address

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_async_localsgd.commands.checks import Finding

_SIGNS = {"ok": "ok     ", "warning": "warning", "problem": "PROBLEM"}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "doctor",
        help="check this machine, and the way to a server",
        description="Check versions, registration by name, encryption, limits, GPUs and leftover processes of this "
        "machine, and whether a server can be reached with the token in ASYNC_LOCALSGD_TOKEN. The exit code is 3 if "
        "there is a problem; warnings do not count.",
        allow_abbrev=False,
    )
    parser.add_argument("server", metavar="HOST:PORT", nargs="?", help="address of the server of a running training")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_server_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the subcommand and return its exit code."""
    findings = []
    for finding in _findings(options):
        findings.append(finding)
        if not options.json:
            print(as_text(finding), flush=True)
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    return PROBLEMS if any(finding.status == "problem" for finding in findings) else OK


def as_text(finding: Finding) -> str:
    """Return a finding for people."""
    line = f"{_SIGNS[finding.status]}  {finding.check}: {finding.text}"
    return line + (f"\n         -> {finding.remedy}" if finding.remedy else "")


def _findings(options: argparse.Namespace) -> Iterator[Finding]:
    from lightning_async_localsgd.commands import checks

    address = None
    if options.server is not None:
        address = server_address(options.server)
        if address is None or not address.startswith("tcp://"):
            raise CommandError(f"{options.server!r} is not a server's address; use HOST:PORT, with a port up to 65535")
    yield from checks.check_versions()
    yield from checks.check_encryption()
    yield from checks.check_limits()
    yield from checks.check_processes()
    if address is not None:
        yield from checks.check_server(address, not options.no_encryption, options.timeout)
    yield from checks.check_libraries()
