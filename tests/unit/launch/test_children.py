"""How a launcher detects that a process has joined, and why it could not."""

from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys
from collections.abc import Callable

import pytest

from lightning_async_localsgd.launch import children
from lightning_async_localsgd.launch.children import Child


def test_joining_is_detected_with_a_descriptor_above_1023() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] != resource.RLIM_INFINITY and limits[1] < 4096:
        pytest.skip(f"the limit of open files is {limits[1]} here")
    reader, writer = os.pipe()
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        child = Child(process, [], {}, ".")
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, limits[1]))
        try:
            child._joined_pipe = fcntl.fcntl(reader, fcntl.F_DUPFD, 2000)
            assert child.rejoining
            os.write(writer, b"!")
            assert not child.rejoining
            child.close_pipe()
            assert not child.rejoining
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            os.close(reader)
            os.close(writer)


@pytest.mark.parametrize(
    ("report", "read"),
    [(lambda: children.report_failure("no data"), "no data"), (children.report_joined, ""), (lambda: None, "")],
)
def test_process_that_has_ended_has_said_why_it_could_not_join(
    monkeypatch: pytest.MonkeyPatch, report: Callable[[], None], read: str
) -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader):
        monkeypatch.setenv(children._JOINED_PIPE_ENV, f"{writer}:{os.getpid()}")
        report()
        if children._JOINED_PIPE_ENV in os.environ:
            os.close(writer)
        assert children.read_report(reader) == read
