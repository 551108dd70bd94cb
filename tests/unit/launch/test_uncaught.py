"""Errors that follow another failure: one line each, and at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lightning_async_localsgd.launch import lost_ranks
from lightning_async_localsgd.launch.liveness import process_identity
from lightning_async_localsgd.launch.lost_ranks import raise_if_rank_lost, remember_lost
from lightning_async_localsgd.launch.rendezvous import RendezvousError
from lightning_async_localsgd.launch.uncaught import FollowingError, print_in_one_line
from lightning_async_localsgd.protocol.exchange import ExchangeError

SCRIPT = """
import sys
from lightning_async_localsgd.launch.uncaught import FollowingError, print_in_one_line
errors = {"following": FollowingError("rank 1 is gone"), "first": ValueError("a fault")}
print_in_one_line(errors[sys.argv[1]], 3)
raise errors[sys.argv[2]]
"""


def run(noted: str, raised: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, noted, raised], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_following_error_is_printed_in_one_line() -> None:
    assert run("following", "following") == (1, "rank 3 ends: rank 1 is gone\n")


@pytest.mark.parametrize("noted", ["first", "following"])
def test_first_error_keeps_its_traceback(noted: str) -> None:
    code, text = run(noted, "first")
    assert code == 1
    assert text.startswith("Traceback (most recent call last)")
    assert text.endswith("ValueError: a fault\n")


@pytest.mark.parametrize("error", [ExchangeError("gone"), RendezvousError("missing"), FollowingError("ended")])
def test_errors_that_follow_another_failure(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    assert print_in_one_line(error, 1)
    assert print_in_one_line(error, 0) == isinstance(error, FollowingError), "the server is in rank 0"
    assert not print_in_one_line(ValueError("a fault"), 1)


# --------------------------------------------------------------------- lost ranks


@pytest.fixture(autouse=True)
def _nobody_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_ranks, "_lost", {})


def test_lost_rank_is_named_with_its_reason() -> None:
    raise_if_rank_lost()
    remember_lost({1: ("", "it ended with ValueError: a fault")})
    with pytest.raises(FollowingError, match=r"fit has lost rank 1 \(it ended with ValueError: a fault\)"):
        raise_if_rank_lost()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_lost_rank_that_is_still_running_may_come() -> None:
    remember_lost({1: (process_identity(), "it was silent for 60 s")})
    raise_if_rank_lost()
    remember_lost({1: (process_identity() + "0", "it was silent for 60 s")})
    with pytest.raises(FollowingError, match="rank 1"):
        raise_if_rank_lost()
    remember_lost({})  # All ranks saw the end of the next fit.
    raise_if_rank_lost()
