from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from typing import Any

import pytest

from lightning_async_localsgd.wire import Endpoints, WireServer
from tests.wire.fakes import PATIENCE, FakeServer, WireHarness, sockets_of_ours, wait_for
from tests.wire.programs import Program, Start


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """Check that no test leaves one of our threads or a listening socket behind."""
    yield
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("async_localsgd")]
    assert not names
    wait_for(lambda: not sockets_of_ours(), "the sockets are closed")


@pytest.fixture
def wire() -> Iterator[WireHarness]:
    with contextlib.ExitStack() as stack:
        yield WireHarness(stack)


@pytest.fixture(params=["ipc", "tcp", "curve"])
def open_wire(
    request: pytest.FixtureRequest, wire: WireHarness
) -> Callable[..., tuple[FakeServer, WireServer, Endpoints]]:
    """Return a function that opens a server. Each test runs with ipc, tcp, and encrypted tcp."""

    def open_(numel: int = 1000, **options: Any) -> tuple[FakeServer, WireServer, Endpoints]:
        kind = request.param
        fake, server = wire.server(numel, ipc=kind == "ipc", tcp=kind != "ipc", encrypt=kind == "curve", **options)
        endpoints = server.local_endpoints if kind == "ipc" else server.endpoints
        assert endpoints is not None
        return fake, server, endpoints

    return open_


@pytest.fixture
def start() -> Iterator[Start]:
    # Processes are forked from a server process that has imported everything once, and has done nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.wire.programs"])
    # The fork server listens on a socket file in the present temporary folder. A test may switch to a folder whose path
    # is too long for a socket file.
    forkserver.ensure_running()
    programs: list[Program] = []

    def start_(target: Callable[..., None], *args: Any) -> Program:
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(theirs, *args), daemon=True)
        process.start()
        theirs.close()
        programs.append(Program(process, ours))
        return programs[-1]

    yield start_
    for program in programs:
        if program.process.is_alive():
            os.kill(program.pid, signal.SIGCONT)
            os.kill(program.pid, signal.SIGKILL)
        program.process.join(PATIENCE)
        program.pipe.close()
