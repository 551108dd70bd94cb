"""Which training the environment names, and in which calls of the Trainer a joining process takes part."""

from __future__ import annotations

import json
import secrets
from typing import Any

import pytest

from lightning_async_localsgd import AsyncLocalSGDStrategy, ExchangeOptions
from lightning_async_localsgd.launch import joining
from lightning_async_localsgd.launch.joining import (
    JOIN_ENV,
    REJOIN_ENV,
    ROLE_ENV,
    TOKEN_ENV,
    JoinGrant,
    invitation,
    restart_count,
    takes_part,
    token_of,
)
from lightning_async_localsgd.protocol.messages import EVALUATOR, JoinInfo

SECRET = secrets.token_hex(16)


@pytest.fixture(autouse=True)
def _fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (JOIN_ENV, TOKEN_ENV, REJOIN_ENV, ROLE_ENV):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(joining, "_calls", 0)
    monkeypatch.setattr(joining, "_fits", 0)


def grant(fit: int, late_joiner: bool) -> JoinGrant:
    info = JoinInfo(3, seed=0, fit_number=fit, run_name="r", frozen_digest="", incarnation="i", proof="p", worker=4)
    return JoinGrant(None, info, late_joiner)  # type: ignore[arg-type] # Nothing connects here.


def test_without_an_address_no_training_is_joined() -> None:
    assert invitation(SECRET, None) is None


@pytest.mark.parametrize("by_option", [True, False])
def test_late_joiner_needs_an_address_and_the_token(monkeypatch: pytest.MonkeyPatch, by_option: bool) -> None:
    monkeypatch.setenv(JOIN_ENV, "tcp://host:29600")
    if not by_option:
        monkeypatch.setenv(TOKEN_ENV, SECRET)
    invited = invitation(SECRET if by_option else None, None)
    assert invited is not None
    assert (invited.address, invited.worker) == ("tcp://host:29600", -1)
    assert invited.late_joiner
    assert invited.encrypted
    assert SECRET not in repr(invited)


def test_error_for_a_missing_token_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOIN_ENV, "tcp://host:29600")
    with pytest.raises(ValueError, match="ASYNC_LOCALSGD_TOKEN"):
        invitation(None, None)


@pytest.mark.parametrize("address", ["host:29600", "tcp://host", "tcp://host:http", "http://host:1", "29600"])
def test_invalid_address_is_rejected(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv(JOIN_ENV, address)
    with pytest.raises(ValueError, match=f"ASYNC_LOCALSGD_JOIN='{address}' is not a server address"):
        invitation(SECRET, None)


def test_restarted_worker_keeps_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOIN_ENV, "tcp://127.0.0.1:29600")
    assert restart_count() == 0
    monkeypatch.setenv(REJOIN_ENV, json.dumps({"worker": 2, "fit": 1, "encrypted": False, "restart_count": 3}))
    invited = invitation(SECRET, None)
    assert invited is not None
    assert (invited.worker, invited.restart_count, invited.late_joiner, invited.encrypted) == (2, 3, False, False)
    assert restart_count() == 3


def test_unix_sockets_and_plain_tcp_are_not_encrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOIN_ENV, "ipc://@x")
    assert not invitation(SECRET, None).encrypted  # type: ignore[union-attr]
    monkeypatch.setenv(JOIN_ENV, "tcp://host:1")
    assert not invitation(SECRET, False).encrypted  # type: ignore[union-attr]


@pytest.mark.parametrize("source", ["exchange.token", TOKEN_ENV])
def test_short_token_is_rejected_without_being_shown(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setenv(TOKEN_ENV, "hidden")
    with pytest.raises(ValueError, match=f"{source} has 6 characters") as rejected:
        token_of("hidden" if source == "exchange.token" else None)
    assert "hidden" not in str(rejected.value)


def test_strategy_rejects_a_short_token() -> None:
    with pytest.raises(ValueError, match="token has 3 characters"):
        ExchangeOptions(token="abc")


@pytest.mark.parametrize("late_joiner", [True, False])
def test_calls_before_the_joined_fit_are_skipped(late_joiner: bool) -> None:
    second = grant(fit=2, late_joiner=late_joiner)
    assert not takes_part(second, fitting=False)
    assert not takes_part(second, fitting=True)
    assert not takes_part(second, fitting=False)
    assert takes_part(second, fitting=True)
    assert (joining._calls, joining._fits) == (3, 1), "the joined fit itself is counted when it begins"


@pytest.mark.parametrize("fitting", [True, False])
def test_only_initial_ranks_take_part_after_the_joined_fit(fitting: bool) -> None:
    joining._fits = 1  # The joined fit.
    assert takes_part(grant(fit=1, late_joiner=False), fitting)
    with pytest.raises(SystemExit) as ended:
        takes_part(grant(fit=1, late_joiner=True), fitting)
    assert ended.value.code == 0


@pytest.mark.parametrize(
    "option",
    [
        {"max_restarts": -1},
        {"max_restarts": 1.5},
        {"checkpoint_every": 0},
        {"checkpoint_every": 2.5},
        {"checkpoint_every": True},
    ],
)
def test_error_for_an_option_out_of_range_names_its_value(option: dict[str, Any]) -> None:
    ((name, value),) = option.items()
    with pytest.raises((ValueError, TypeError), match=name) as rejected:
        AsyncLocalSGDStrategy(**option)
    assert repr(value) in str(rejected.value)


def test_evaluator_joins_like_a_late_joiner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOIN_ENV, "tcp://host:29600")
    monkeypatch.setenv(ROLE_ENV, "evaluator")
    invited = invitation(SECRET, None)
    assert invited is not None
    assert invited.worker == EVALUATOR
    assert invited.late_joiner


@pytest.mark.parametrize(("role", "text"), [("evaluator", JOIN_ENV), ("judge", "'worker' or 'evaluator'")])
def test_errors_for_a_role_name_the_way_out(monkeypatch: pytest.MonkeyPatch, role: str, text: str) -> None:
    monkeypatch.setenv(ROLE_ENV, role)
    with pytest.raises(ValueError, match=f"ASYNC_LOCALSGD_ROLE='{role}'.*{text}"):
        invitation(SECRET, None)
