"""Detection of ended processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lightning_async_localsgd.launch.liveness import has_ended, is_running, process_identity

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")

CODE = """
from lightning_async_localsgd.launch.liveness import process_identity
print(process_identity(), flush=True)
input()
"""


def test_ended_process_is_detected() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        identity = other.stdout.readline().strip()
        assert not has_ended(identity)
        assert is_running(identity)
        other.stdin.close()
        other.stdout.read()
        while not has_ended(identity):  # A zombie, because its exit code has not been read yet.
            pass
    assert has_ended(identity)
    assert not is_running(identity)
    assert not has_ended(process_identity())


def test_reused_process_number_is_another_process() -> None:
    identity = process_identity()
    assert has_ended(identity + "0")  # Another start time.


def test_invisible_process_counts_as_alive() -> None:
    assert not has_ended("")
    assert not has_ended("elsewhere:pid:[1]/1/1")
