"""How a launcher detects that a restarted process has joined."""

from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys

import pytest

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
