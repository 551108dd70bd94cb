"""Whether a process that was started again has joined, seen from the one that has started it."""

from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys

import pytest

from lightning_async_localsgd.children import Child


def test_who_has_many_files_open_sees_who_has_joined() -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most[1] != resource.RLIM_INFINITY and most[1] < 4096:
        pytest.skip(f"no process may have more than {most[1]} files open here")
    told, tell = os.pipe()
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        child = Child(process, [], {}, ".")
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, most[1]))
        try:
            child._told = fcntl.fcntl(told, fcntl.F_DUPFD, 2000)
            assert child.booting
            os.write(tell, b"!")
            assert not child.booting
            child.forget_pipe()
            assert not child.booting
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, most)
            os.close(told)
            os.close(tell)
