"""What the environment says about a training to join, and which of a script's runs a process takes part in."""

from __future__ import annotations

import json
import secrets
from typing import Any

import pytest

from lightning_async_localsgd import AsyncLocalSGDStrategy, joining
from lightning_async_localsgd.joining import JOIN, REJOIN, TOKEN, Entry, invitation, takes_part, token_of
from lightning_async_localsgd.messages import Facts

SECRET = secrets.token_hex(16)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (JOIN, TOKEN, REJOIN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(joining, "_runs", 0)
    monkeypatch.setattr(joining, "_fits", 0)


def entry(fit: int, stranger: bool) -> Entry:
    facts = Facts("i", "p", worker=4, workers=3, seed=0, fit=fit, folder="f", unshared="")
    return Entry(None, facts, stranger)  # type: ignore[arg-type] # nobody dials here


def test_without_an_address_nobody_is_invited() -> None:
    assert invitation(SECRET, None) is None


@pytest.mark.parametrize("by_option", [True, False])
def test_a_stranger_needs_an_address_and_the_token(monkeypatch: pytest.MonkeyPatch, by_option: bool) -> None:
    monkeypatch.setenv(JOIN, "tcp://host:29600")
    if not by_option:
        monkeypatch.setenv(TOKEN, SECRET)
    invited = invitation(SECRET if by_option else None, None)
    assert invited is not None
    assert (invited.address, invited.worker) == ("tcp://host:29600", -1)
    assert invited.stranger
    assert invited.encrypted
    assert SECRET not in repr(invited)


def test_an_address_without_a_token_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOIN, "tcp://host:29600")
    with pytest.raises(ValueError, match="ASYNC_LOCALSGD_TOKEN"):
        invitation(None, None)


@pytest.mark.parametrize("address", ["host:29600", "tcp://host", "tcp://host:http", "http://host:1", "29600"])
def test_an_address_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv(JOIN, address)
    with pytest.raises(ValueError, match=f"ASYNC_LOCALSGD_JOIN='{address}'"):
        invitation(SECRET, None)


def test_a_worker_that_is_started_again_keeps_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOIN, "tcp://127.0.0.1:29600")
    monkeypatch.setenv(REJOIN, json.dumps({"worker": 2, "fit": 1, "encrypted": False, "life": 3}))
    invited = invitation(SECRET, None)
    assert invited is not None
    assert (invited.worker, invited.life, invited.stranger, invited.encrypted) == (2, 3, False, False)


def test_unix_sockets_and_plain_tcp_are_not_encrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOIN, "ipc://@x")
    assert not invitation(SECRET, None).encrypted  # type: ignore[union-attr]
    monkeypatch.setenv(JOIN, "tcp://host:1")
    assert not invitation(SECRET, False).encrypted  # type: ignore[union-attr]


@pytest.mark.parametrize("where", ["token", TOKEN])
def test_a_short_token_is_refused_without_being_shown(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setenv(TOKEN, "geheim")
    with pytest.raises(ValueError, match=f"{where} has 6 characters") as refused:
        token_of("geheim" if where == "token" else None)
    assert "geheim" not in str(refused.value)


def test_the_strategy_refuses_a_short_token() -> None:
    with pytest.raises(ValueError, match="token has 3 characters"):
        AsyncLocalSGDStrategy(token="abc")


@pytest.mark.parametrize("stranger", [True, False])
def test_what_comes_before_the_fit_that_is_joined_is_passed_over(stranger: bool) -> None:
    second = entry(fit=2, stranger=stranger)
    assert not takes_part(second, fitting=False)
    assert not takes_part(second, fitting=True)
    assert not takes_part(second, fitting=False)
    assert takes_part(second, fitting=True)
    assert (joining._runs, joining._fits) == (3, 1), "the one that it takes part in counts when it begins"


@pytest.mark.parametrize("fitting", [True, False])
def test_what_comes_after_is_for_the_ranks_of_the_beginning(fitting: bool) -> None:
    joining._fits = 1  # The one that it has joined.
    assert takes_part(entry(fit=1, stranger=False), fitting)
    with pytest.raises(SystemExit) as ended:
        takes_part(entry(fit=1, stranger=True), fitting)
    assert ended.value.code == 0


@pytest.mark.parametrize(
    "option",
    [
        {"max_restarts": -1},
        {"max_restarts": 1.5},
        {"checkpoint_every": 0},
        {"checkpoint_every": 2.5},
        {"checkpoint_every": True},
        {"max_update_norm": 0.0},
        {"max_update_norm": "often"},
    ],
)
def test_options_out_of_range_are_named(option: dict[str, Any]) -> None:
    ((name, value),) = option.items()
    with pytest.raises((ValueError, TypeError), match=name) as refused:
        AsyncLocalSGDStrategy(**option)
    assert repr(value) in str(refused.value)
