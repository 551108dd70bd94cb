"""Processes that have ended are told from those that live."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lightning_async_localsgd.liveness import has_ended, this_process

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems tell nothing")


def test_a_process_is_seen_to_end() -> None:
    code = "from lightning_async_localsgd.liveness import this_process; print(this_process(), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        name = other.stdout.readline().strip()
        assert not has_ended(name)
        other.stdin.close()
        other.stdout.read()
        while not has_ended(name):  # A zombie: nobody has asked for its exit code.
            pass
    assert has_ended(name)
    assert not has_ended(this_process())


def test_a_number_that_is_used_again_is_another_process() -> None:
    name = this_process()
    assert has_ended(name + "0")


def test_what_cannot_be_seen_from_here_has_not_ended() -> None:
    assert not has_ended("")
    assert not has_ended("elsewhere:pid:[1]/1/1")
