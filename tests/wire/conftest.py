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
from tests.wire.fakes import PATIENCE, FakeServer, Wire, sockets_of_ours, wait_for
from tests.wire.programs import Program, Start


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """No test may leave a thread of ours or a listening socket behind."""
    yield
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("async_localsgd")]
    assert not names
    wait_for(lambda: not sockets_of_ours(), "the sockets are closed")


@pytest.fixture
def wire() -> Iterator[Wire]:
    with contextlib.ExitStack() as stack:
        yield Wire(stack)


@pytest.fixture(params=["ipc", "tcp", "curve"])
def way(request: pytest.FixtureRequest, wire: Wire) -> Callable[..., tuple[FakeServer, WireServer, Endpoints]]:
    """Opens a server on each kind of way in turn."""

    def open_(numel: int = 1000, **options: Any) -> tuple[FakeServer, WireServer, Endpoints]:
        kind = request.param
        fake, server = wire.server(numel, ipc=kind == "ipc", tcp=kind != "ipc", encrypt=kind == "curve", **options)
        endpoints = server.local_endpoints if kind == "ipc" else server.endpoints
        assert endpoints is not None
        return fake, server, endpoints

    return open_


@pytest.fixture
def start() -> Iterator[Start]:
    # Copies of a process that has imported everything once, and has done nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.wire.programs"])
    # It listens on a file in the folder for temporary files as it is now: a test may give itself one whose path is too
    # long for a socket's.
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
